"""Every method inside `nnx.Optimizer` under `nnx.jit`, and around NNX states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import sparsejax as sj
from tests.conformance import suite

STEPS = 4
LR = 1e-2


class Model(nnx.Module):
    """The problem of `suite` with a norm; kernels `[d_in, d_out]`."""

    def __init__(self, rngs, dtype):
        options = {"rngs": rngs, "param_dtype": dtype}
        self.first = nnx.Linear(8, 8, **options)
        self.norm = nnx.LayerNorm(8, **options)
        self.second = nnx.Linear(8, 4, use_bias=False, **options)

    def __call__(self, x):
        return self.second(self.norm(jnp.tanh(self.first(x))))


def make_model(dtype=jnp.float32):
    """Its kernels are those of `suite.make_params`."""
    model, params = Model(nnx.Rngs(0), dtype), suite.make_params(dtype=dtype)
    model.first.kernel[...] = params["first"]["kernel"]
    model.second.kernel[...] = params["second"]["kernel"]
    return model


def label(params):
    """Kernels are sparse, all else is not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "sparse" if "kernel" in str(path) else "dense", params
    )


def plain(tx):
    return tx


def partition(tx):
    return optax.partition({"sparse": tx, "dense": optax.adam(LR)}, label)


def chain(tx):
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


OPTIMIZERS = [optax.adamw(LR), optax.sgd(LR, momentum=0.9), contrib.muon(LR)]
WRAPPERS = [plain, partition, chain]
DTYPES = [jnp.float32, jnp.bfloat16]
CASES = [
    (
        method,
        i % 3,
        WRAPPERS[i // 3 % 3],
        jnp.float32 if method == "adams" else DTYPES[i % 2],
    )
    for i, method in enumerate(suite.METHODS)
]


@pytest.mark.parametrize(
    ("method", "optimizer", "wrap", "dtype"),
    CASES,
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_in_nnx_optimizer(method, optimizer, wrap, dtype):
    model = make_model(dtype)
    tx = wrap(suite.build(method, OPTIMIZERS[optimizer]))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = suite.Traces()
    x, y = suite.batch()

    @nnx.jit
    @traces
    def step(model, optimizer):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            params = sj.forward_params(optimizer.opt_state, params)
            return jnp.mean((nnx.merge(graphdef, params, rest)(x) - y) ** 2)

        optimizer.update(model, jax.grad(loss)(params))
        return suite.record(nnx.state(model, nnx.Param), optimizer.opt_state)

    names = [f"{name}.value" for name in suite.NAMES]
    spec = suite.spec(optimizer.opt_state)
    for i in range(STEPS):
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        seen = step(model, optimizer)
        suite.check_step(method, seen, before, names=names, at=f"step {i}")
        assert suite.spec(optimizer.opt_state) == spec
    assert traces.count == 1


@pytest.mark.filterwarnings("ignore:the sparse model has 0")  # `mask_decay` at step 0
@pytest.mark.parametrize("method", suite.METHODS)
def test_a_plain_dict_gives_the_same_bits(method):
    """An `nnx.Optimizer`'s state serves a plain dict of the same leaves, and back."""
    model = make_model()
    tx = suite.build(method, optax.adamw(LR), pattern=suite.two_four)
    params = nnx.state(model, nnx.Param)
    plain = nnx.to_pure_dict(params)
    in_nnx = nnx.Optimizer(model, tx, wrt=nnx.Param).opt_state
    in_dict = tx.init(plain)

    def read(state, params):
        found = sj.forward_params(state, params), sj.sparse_params(state, params)
        for tree in found:
            assert jax.tree.structure(tree) == jax.tree.structure(params)
        return jax.tree.leaves((*found, sj.masks_of(state)))

    wanted = read(in_dict, plain)
    for state, given in ((in_nnx, plain), (in_nnx, params), (in_dict, params)):
        for got, want in zip(read(state, given), wanted, strict=True):
            np.testing.assert_array_equal(got, want)

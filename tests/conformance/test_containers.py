"""Params of any pytree: lists, dataclasses, bare arrays, None, stacked layers."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax as sj
from tests.conformance import suite

LR = 1e-2
STEPS = 4


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Module:
    weight: Any
    scale: Any
    rate: float = dataclasses.field(default=0.1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Callable:
    """A module that is a tree and callable, as in Equinox."""

    weight: Any
    layers: list

    def __call__(self, x):
        return x @ self.weight


def kernel(shape=(8, 4)):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)


CONTAINERS = {
    "bare": lambda: kernel(),
    "list": lambda: [kernel(), kernel((8, 8))],
    "tuple": lambda: (kernel(), jnp.ones(4), (kernel((8, 8)),)),
    "namedtuple": lambda: [Layer(kernel(), jnp.ones(4)), Layer(kernel((8, 8)), None)],
    "dataclass": lambda: Module(kernel(), jnp.ones(4)),
    "callable": lambda: Callable(kernel(), [Callable(kernel(), [])]),
    "none": lambda: {"a": None, "b": {"kernel": kernel(), "none": None}, "c": None},
    "nested": lambda: {"a": [{"w": kernel()}, (kernel(), None)], "b": Layer({}, ())},
}
# each container with a hard, a dynamic and a soft method, all methods in turn
METHODS = list(suite.METHODS)
CASES = [
    (container, METHODS[(3 * i + j) % len(METHODS)])
    for i, container in enumerate(CONTAINERS)
    for j in range(3)
]


@pytest.mark.parametrize(("container", "method"), CASES)
def test_any_container(container, method):
    """Through `scan`, which holds the structure of the carry to that of `init`."""
    params = CONTAINERS[container]()
    tx = suite.build(method, optax.adamw(LR), pattern=suite.two_four)
    wanted = kernel()

    def loss(params):
        return sum(
            jnp.sum((leaf[..., :1] - 3 * wanted[:, :1]) ** 2) + jnp.sum(leaf**3)
            for leaf in jax.tree.leaves(params)
            if leaf.ndim == 2
        )

    def body(carry, _):
        carry = suite.take_step(tx, *carry, loss=loss)
        return carry, suite.record(*carry)

    @suite.fast_jit
    def run(params):
        return jax.lax.scan(body, (params, tx.init(params)), length=STEPS)

    (after, state), seen = run(params)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for tree in (sj.masks_of(state), sj.forward_params(state, after)):
        is_none = lambda leaf: leaf is None  # noqa: E731
        leaves = jax.tree.leaves(tree, is_leaf=is_none)
        assert len(leaves) == len(jax.tree.leaves(params, is_leaf=is_none))
    names = [name for name, leaf in suite.flat(params).items() if leaf.ndim == 2]
    before = params
    for step in range(STEPS):
        now = jax.tree.map(lambda x, step=step: x[step], seen)
        suite.check_step(method, now, before, names=names, pattern=suite.two_four)
        before = now["params"]


@pytest.mark.parametrize("method", suite.METHODS)
def test_stacked_layers_are_pruned_each_on_its_own(method):
    """A leaf `[layers, d_in, d_out]` equals its layers as leaves of their own."""
    layers = jnp.stack([kernel((8, 8)), 3 * kernel((16, 8))[:8]])
    stacked, apart = {"kernel": layers}, {"a": layers[0], "b": layers[1]}

    def forward(kernels):
        def layer(x, kernel):
            return jnp.tanh(x @ kernel), None

        return jnp.sum(jax.lax.scan(layer, suite.batch()[0], kernels)[0] ** 2)

    def run(params, loss, stacked):
        def pattern(path, leaf):
            return sj.Unstructured()

        tx = suite.build(method, optax.sgd(LR), pattern=pattern, stacked=stacked)

        def body(carry, _):
            carry = suite.take_step(tx, *carry, loss=loss)
            return carry, suite.record(*carry)

        @suite.fast_jit
        def run(params):
            state = tx.init(params)
            if method in suite.DYNAMIC or method == "static_sparse":
                # random scores are drawn for a leaf, so the first masks are set equal
                first = jnp.tile(jnp.array([True, False]), 32).reshape(8, 8)
                masks = jax.tree.map(lambda m: jnp.broadcast_to(first, m.shape), params)
                state = state._replace(masks=masks)
            return jax.lax.scan(body, (params, state), length=3)[1]

        seen = run(params)
        return [jax.tree.map(lambda x, i=i: x[i], seen) for i in range(3)]

    got = run(stacked, lambda p: forward(p["kernel"]), 1)
    want = run(apart, lambda p: forward(jnp.stack([p["a"], p["b"]])), 0)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        for key in ("masks", "params", "forward", "sparse"):
            if method == "sparse_evolution":
                continue  # grows at random: only the counts compare
            both = jnp.stack([b[key]["a"], b[key]["b"]])
            np.testing.assert_allclose(a[key]["kernel"], both, rtol=1e-4, atol=1e-6)
        if method != "structure_decay" or i:  # begins dense
            assert (a["masks"]["kernel"].sum((1, 2)) == 32).all()


def test_stacked_per_leaf_and_patterns_per_leaf():
    """Prefix trees of patterns, sparsities and stacked axes; each leaf its own."""
    params = {
        "layers": {"q": kernel((2, 8, 8)), "bias": jnp.ones((2, 8))},
        "conv": kernel((3, 3, 4, 8)),
        "dense_general": kernel((8, 2, 4)),
        "head": kernel((8, 6)),
        "out": kernel((4, 4)),
        "kept": kernel((4, 8)),
    }
    sparsity = {
        "layers": 0.75,
        "conv": None,
        "dense_general": None,
        "head": 0.5,
        "out": sj.schedules.cubic(0.5, begin=0, end=4),
        "kept": None,
    }
    pattern = {
        "layers": sj.Block((4, 4)),
        "conv": sj.NM(1, 4),
        "dense_general": sj.NM(1, 2, axis=0),
        "head": sj.Channel(-1),
        "out": sj.Unstructured(),
        "kept": sj.Unstructured(),
    }
    where = {name: name != "kept" for name in params} | {
        "layers": {"q": True, "bias": False}
    }
    stacked = {name: int(name == "layers") for name in params}
    tx = sj.magnitude_prune(
        optax.adam(LR),
        sparsity,
        update_every=1,
        where=where,
        pattern=pattern,
        stacked=stacked,
    )

    @suite.fast_jit
    def step(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = suite.fast_jit(tx.init)(params)
    for _ in range(5):
        params, state = step(params, state)
    params, masks = jax.tree.map(np.asarray, (params, sj.masks_of(state)))
    zeroed = sj.apply_masks(params, masks)
    assert masks["kept"] is None and masks["layers"]["bias"] is None
    jax.tree.map(np.testing.assert_array_equal, params, zeroed)
    blocks = masks["layers"]["q"].reshape(2, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4)
    blocks = blocks.reshape(2, 4, 16)
    assert (blocks.sum(2) % 16 == 0).all() and (blocks.sum((1, 2)) == 16).all()
    assert (masks["conv"].reshape(3, 3, 1, 4, 8).sum(3) == 1).all()
    assert (masks["dense_general"].reshape(4, 2, 2, 4).sum(1) == 1).all()
    assert sorted(masks["head"].sum(0)) == [0, 0, 0, 8, 8, 8]
    assert masks["out"].sum() == 8


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any
    out: Any


@pytest.mark.parametrize("argument", ["masks", "sparsity", "where", "stacked"])
@pytest.mark.parametrize("wrap", ["partition", "masked"])
def test_trees_of_arguments_inside_wrappers(argument, wrap):
    """They mirror all params; what the wrapper hides has entries too."""
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.normal(size=(8, 4)), jnp.float32) for _ in range(4)]
    params = {"attention": Attention(*weights), "bias": jnp.ones(4)}
    chosen = {"attention": Attention(True, True, False, False), "bias": False}
    trees = {
        "masks": {"masks": sj.prune(params, 0.5, where=chosen)},
        "sparsity": {"sparsity": jax.tree.map(lambda c: 0.5 if c else None, chosen)},
        "where": {"sparsity": 0.5, "where": chosen},
        "stacked": {"sparsity": 0.5, "stacked": jax.tree.map(lambda c: 0, chosen)},
    }[argument]
    if argument != "masks":
        trees["key"] = jax.random.key(0)
    method = sj.static_sparse(optax.adam(0.1), **trees)
    if wrap == "masked":
        tx = optax.masked(method, chosen)
    else:
        labels = jax.tree.map(lambda c: "sparse" if c else "dense", chosen)
        tx = optax.partition({"sparse": method, "dense": optax.adam(0.1)}, labels)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    final = sj.sparse_params(state, params)
    kept = [int(jnp.sum(w != 0)) for w in final["attention"]]
    assert kept == [16, 16, 32, 32]


def test_prune_of_a_whole_state():
    """Beside the weights it may hold keys and counts."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)

    state = nnx.state(Model(nnx.Rngs(0)))
    masks = sj.prune(state, 0.5)
    assert int(masks["linear"]["kernel"][...].sum()) == 16
    assert sum(m is not None for m in jax.tree.leaves(masks)) == 1

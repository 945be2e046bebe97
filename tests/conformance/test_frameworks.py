"""Real params trees: Flax NNX, Flax Linen, Equinox and Haiku, each with its own names.

The same small model everywhere: an embedding, a norm with scale and bias, two linear
layers. What the default `where` chooses, and the axis that N:M needs, are pinned here:

- Flax: kernels `[d_in, d_out]`; the defaults do.
- Haiku: `w` is `[d_in, d_out]`, so `NM(2, 4)` does; its embedding is called
  `embeddings`, which the default does not know: exclude it by `where`.
- Equinox: `weight` is `[d_out, d_in]`, so N:M needs `axis=-1`; an embedding's is called
  `weight` too: exclude it by `where`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import sparsejax as sj
from tests.conformance import suite

STEPS = 4
TOKENS = jnp.arange(12).reshape(4, 3)


@dataclasses.dataclass(frozen=True)
class Framework:
    """A model as its framework sees it.

    Attributes:
      params: what the optimizer gets.
      apply: (params, tokens) -> outputs `[..., 4]`.
      default: the leaves that the default `where` chooses.
      linear: those of the linear layers.
      axis: of their inputs.
    """

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    default: list[str]
    linear: list[str]
    axis: int = -2


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, tokens):
        return self.second(jnp.tanh(self.first(self.norm(self.embed(tokens)))))


def make_nnx():
    graphdef, params = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param)
    names = ["['first']['kernel'].value", "['second']['kernel'].value"]
    apply = lambda params, tokens: nnx.merge(graphdef, params)(tokens)  # noqa: E731
    return Framework(params, apply, names, names)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.LayerNorm()(linen.Embed(12, 8)(tokens))
        return linen.Dense(4)(jnp.tanh(linen.Dense(8)(x)))


def make_linen():
    model = LinenModel()
    params = model.init(jax.random.key(0), TOKENS)
    names = [f"['params']['Dense_{i}']['kernel']" for i in range(2)]
    return Framework(params, model.apply, names, names)


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(12, 8, key=keys[0])
        self.norm = eqx.nn.LayerNorm(8)
        self.layers = [
            eqx.nn.Linear(8, 8, key=keys[1]),
            eqx.nn.Linear(8, 4, key=keys[2]),
        ]

    def __call__(self, token):
        x = jnp.tanh(self.layers[0](self.norm(self.embed(token))))
        return self.layers[1](x)


def make_equinox():
    model = EquinoxModel(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, tokens):
        return jax.vmap(jax.vmap(eqx.combine(params, static)))(tokens)

    linear = [".layers[0].weight", ".layers[1].weight"]
    return Framework(params, apply, [".embed.weight", *linear], linear, axis=-1)


def make_haiku():
    def forward(tokens):
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(
            hk.Embed(12, 8)(tokens)
        )
        return hk.Linear(4)(jnp.tanh(hk.Linear(8)(x)))

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), TOKENS)
    linear = ["['linear']['w']", "['linear_1']['w']"]
    default = ["['embed']['embeddings']", *linear]
    return Framework(params, model.apply, default, linear)


FRAMEWORKS = {
    "nnx": make_nnx,
    "linen": make_linen,
    "equinox": make_equinox,
    "haiku": make_haiku,
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_the_default_governs(framework):
    """No bias and no norm in any of them."""
    model = FRAMEWORKS[framework]()
    masks = jax.eval_shape(sj.magnitude_prune(optax.sgd(0.1), 0.5).init, model.params)
    found, _ = jax.tree_util.tree_flatten_with_path(masks.masks)
    assert [jax.tree_util.keystr(path) for path, _ in found] == model.default


def without_embeddings(path, leaf):
    """The default rule for models whose embeddings have names of their own."""
    return sj.patterns.is_default_governed(path, leaf) and (
        "embed" not in jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize("method", ["rigl", "sr_ste"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_trains(framework, method):
    model = FRAMEWORKS[framework]()
    pattern = sj.NM(2, 4, axis=model.axis)
    tx = suite.build(
        method,
        optax.adam(1e-2),
        pattern=lambda path, leaf: pattern,
        where=without_embeddings,
    )
    targets = jnp.sin(jnp.arange(48.0)).reshape(4, 3, 4)

    def loss(params):
        return jnp.mean((model.apply(params, TOKENS) - targets) ** 2)

    @suite.fast_jit
    def run(params):
        carry, losses = (params, tx.init(params)), []
        for _ in range(STEPS):
            losses.append(loss(sj.forward_params(carry[1], carry[0])))
            carry = suite.take_step(tx, *carry, loss=loss)
        sparse = sj.sparse_params(carry[1], carry[0])
        return carry[0], sparse, sj.masks_of(carry[1]), losses

    params, sparse, masks, losses = run(model.params)
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    assert jax.tree.structure(sparse) == jax.tree.structure(model.params)
    assert losses[-1] < losses[0]
    params, sparse, masks = map(suite.flat, (params, sparse, masks))
    assert sorted(masks) == model.linear
    for name, weight in params.items():
        if name not in model.linear:
            np.testing.assert_array_equal(sparse[name], weight)
            continue
        assert ((weight != 0).mean() <= 0.5) == (method in suite.HARD)
        inputs_last = np.moveaxis(sparse[name], model.axis, -1)
        groups = (inputs_last != 0).reshape(-1, 4).sum(axis=1)
        assert (groups <= 2).all() if method in suite.HARD else (groups == 2).all()

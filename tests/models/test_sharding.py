"""A decoder on a mesh whose axes are explicit, as `jax.make_mesh` makes them now."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax import attention, decode, models, nn

CONFIG = models.DecoderConfig(
    vocab_size=32,
    d_model=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    d_ff=32,
)
select = functools.partial(
    attention.topk_blocks, num_kept=2, causal=True, block_shape=(4, 4)
)
LAYERS = {
    "dense": {},
    "spark": {
        "attention": functools.partial(nn.SparkAttention, k=2, split=2),
        "ffn": functools.partial(nn.SparkFFN, k=4, split=8),
    },
    "blocks": {
        "attention": functools.partial(nn.BlockAttention, select=select),
        "ffn": functools.partial(nn.BlockSparseFFN, block_shape=(8, 8)),
    },
}
SELECTORS = {"dense": decode.Quest(2, page_size=4), "spark": None}


def model_and_tokens(layers):
    config = dataclasses.replace(CONFIG, **LAYERS[layers])
    tokens = np.random.default_rng(0).integers(0, 32, (2, 16))
    return models.Decoder(config, rngs=nnx.Rngs(0)), jnp.asarray(tokens)


def on_two_devices(fn, whole, batch):
    """`fn(whole, batch)` with the batch cut."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        whole = jax.device_put(whole, NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        return jax.jit(fn)(whole, batch)


@pytest.mark.parametrize("layers", LAYERS)
def test_it_trains(layers):
    model, tokens = model_and_tokens(layers)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, tokens):
        logits = nnx.merge(graph, params, rest)(tokens)
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    step = jax.value_and_grad(loss)
    want = jax.jit(step)(params, tokens)
    got = on_two_devices(step, params, tokens)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", SELECTORS)
def test_it_generates(layers):
    model, prompts = model_and_tokens(layers)
    model = decode.prepare(model, select_keys=SELECTORS[layers])

    def generated(model, prompts):
        return decode.generate(model, prompts, num_tokens=3).tokens

    want = jax.jit(generated)(model, prompts)
    got = on_two_devices(generated, model, prompts)
    np.testing.assert_array_equal(got, want)

"""Attention layers of one size on one input, and what the tests take of them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

SEQ = 30


def make(kind, **options):
    return kind(16, 4, num_kv_heads=2, head_dim=8, rngs=nnx.Rngs(0), **options)


def inputs():
    x = np.random.default_rng(1).normal(size=(2, SEQ, 16))
    return jnp.asarray(x, jnp.float32), jnp.broadcast_to(jnp.arange(SEQ), (2, SEQ))


@nnx.jit
def value_and_grads(layer):
    def loss(layer):
        y, density = layer(*inputs(), with_density=True)
        return jnp.sum(jnp.sin(y)), (y, density)

    return nnx.value_and_grad(loss, has_aux=True)(layer)

"""Straight-through: a projected value in the forward, all of the gradient behind it.

Every room may import this module; it imports none of them.
"""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def straight_through(weight: jax.Array, projected: jax.Array) -> jax.Array:
    """Returns `projected`; `weight` gets its gradient unchanged, `projected` none.

    Args:
      weight: the dense weight, or an activation; any shape and floating dtype.
      projected: what the forward uses in its place, same shape and dtype.

    Returns:
      `projected`, bit for bit (non-finite values of `weight` do not leak into it).

    Example:
      >>> keep = jnp.array([1.0, 0.0])
      >>> jax.grad(lambda w: straight_through(w, w * keep).sum())(jnp.ones(2))
      Array([1., 1.], dtype=float32)

    References:
      Bengio et al., 2013, https://arxiv.org/abs/1308.3432, section 4.
    """
    del weight
    return projected


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], jnp.asarray(tangents[0])

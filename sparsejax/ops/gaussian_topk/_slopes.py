"""What is done with each entry, in operations that every kernel language has."""

import functools

import jax
import jax.numpy as jnp

from sparsejax.ops._activations import Activation
from sparsejax.ops.gaussian_topk._reference import glu


def survivors(excess: jax.Array, huber_delta: float) -> jax.Array:
    """`max(u, 0)`, or its Huber form; NaN stays NaN.

    Args:
      excess: u = x - theta.
      huber_delta: 0, or the width of the quadratic part.

    Returns:
      As `excess`.

    Example:
      >>> survivors(jnp.array([-1.0, 1.0, 3.0]), 2.0)
      Array([0.  , 0.25, 2.  ], dtype=float32)
    """
    excess = jnp.maximum(excess, 0.0)
    if huber_delta == 0:
        return excess
    clipped = jnp.minimum(excess, huber_delta)
    return clipped * (excess - 0.5 * clipped) * (1 / huber_delta)


def passed_back(grad: jax.Array, excess: jax.Array, huber_delta: float) -> jax.Array:
    """`grad` times the slope of `survivors` at `excess`, which is 0 at u = 0.

    Args:
      grad: gradient of the output.
      excess: u = x - theta.
      huber_delta: 0, or the width of the quadratic part.

    Returns:
      As `grad`.

    Example:
      >>> passed_back(jnp.ones(3), jnp.array([0.0, 1.0, 3.0]), 2.0)
      Array([0. , 0.5, 1. ], dtype=float32)
    """
    if huber_delta != 0:
        grad = grad * jnp.minimum(excess * (1 / huber_delta), 1.0)
    return jnp.where(excess > 0.0, grad, 0.0)


def glu_back(
    grad: jax.Array, s: jax.Array, up: jax.Array | None, activation: Activation | None
) -> tuple[jax.Array, jax.Array | None]:
    """The gradients of `s` and `up` for that of `glu(s, up, activation)`.

    Args:
      grad: gradient of the output.
      s: what survives.
      up: what it is multiplied by, or None.
      activation: of `s`, or None.

    Returns:
      As `s` and `up`.

    Example:
      >>> s, up = jnp.array([0.0, 2.0]), jnp.array([3.0, 3.0])
      >>> glu_back(jnp.ones(2), s, up, jnp.square)
      (Array([ 0., 12.], dtype=float32), Array([0., 4.], dtype=float32))
    """
    return jax.vjp(functools.partial(glu, activation=activation), s, up)[1](grad)

"""Rotary position embedding in the half-split form of Llama and Gemma."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax._promotion import to_rank


def apply_rope(
    x: Float[Array, "batch seq heads head_dim"],
    positions: Int[Array, "batch seq"],
    *,
    base: float,
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates each pair `(i, i + head_dim / 2)` by an angle that grows with position.

    The dot product of a rotated query and a rotated key depends on their distance
    alone. Angles and rotation are float32 whatever the dtype of `x`.

    Args:
      x: queries or keys, any float dtype; `head_dim` is even.
      positions: of each token, counted from 0. A distance is all that matters.
      base: pair `i` turns by `base ** (-2 i / head_dim)` radians a token.

    Returns:
      The rotated `x`, in its dtype.

    Example:
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> apply_rope(x, jnp.array([[0, 1]]), base=10_000.0)[0, :, 0]
      Array([[ 1.        ,  1.        ],
             [-0.30116868,  1.3817732 ]], dtype=float32)

    References:
      Su et al., 2021, https://arxiv.org/abs/2104.09864, section 3.2. The paper pairs
      neighbours `(2 i, 2 i + 1)`; checkpoints in that form permute `head_dim`.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    at = positions[..., None, None].astype(jnp.float32)
    angle = at * to_rank(frequency, at.ndim)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)

"""Floats as integers that are ordered as they are, which kernels search and rank.

Where integers are chosen, a constant comes second: Mosaic GPU takes what
`jnp.where(which, constant, integers)` gives for unsigned, and compares it so.
"""

import jax
import jax.numpy as jnp

BELOW = -(2**31)  # every key


def ordered(x: jax.Array) -> jax.Array:
    """Integers that compare as the numbers do; equal zeros, one for NaN below all.

    Args:
      x: float32.

    Returns:
      int32, the keys.

    Example:
      >>> key = ordered(jnp.array([jnp.nan, -jnp.inf, -0.0, 0.0, 1.0]))
      >>> print(key[1:] > key[:-1])
      [ True  True False  True]
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(x == x, mirrored(bits), BELOW + 1)


def mirrored(keys_or_bits: jax.Array) -> jax.Array:
    """Bits of floats as integers of their order, and back: negative ones count down.

    Args:
      keys_or_bits: int32.

    Returns:
      As they are, those of negative numbers mirrored.
    """
    return jnp.where(keys_or_bits < 0, BELOW - keys_or_bits, keys_or_bits)

"""Floats as integers that are ordered as they are, for exact search, in kernels too.

Every room may import this module; it imports none of them. Where integers are chosen, a
constant comes second: Mosaic GPU takes what `jnp.where(which, constant, integers)`
gives for unsigned, and compares it so.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def ordered(x: jax.Array) -> jax.Array:
    """Integers that compare as the numbers do; equal zeros, one for NaN below all.

    Args:
      x: any float dtype.

    Returns:
      The keys, signed integers as wide as `x`, above the lowest such integer.

    Example:
      >>> key = ordered(jnp.array([jnp.nan, -jnp.inf, -0.0, 0.0, 1.0]))
      >>> print(key[1:] > key[:-1])
      [ True  True False  True]
    """
    dtype = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, dtype)
    return jnp.where(x == x, mirrored(bits), below(dtype) + 1)


def mirrored(keys_or_bits: jax.Array) -> jax.Array:
    """Bits of floats as integers of their order, and back: negative ones count down.

    Args:
      keys_or_bits: signed integers.

    Returns:
      As they are, those of negative numbers mirrored; both zeros are 0.
    """
    low = below(keys_or_bits.dtype)
    return jnp.where(keys_or_bits < 0, low - keys_or_bits, keys_or_bits)


def below(dtype: DTypeLike) -> int:
    """The lowest integer of a dtype, which is below every key."""
    return int(jnp.iinfo(dtype).min)

"""Masks stored as bits: one bit a weight along the last axis."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt8


def pack(mask: Bool[Array, "*lead d"]) -> UInt8[Array, "*lead bytes"]:
    """Packs eight neighbours of the last axis into a byte; leading axes stay.

    Args:
      mask: at least one axis; the last one is padded with False to a multiple of 8.

    Returns:
      uint8 `[*lead, ceil(d / 8)]`.

    Example:
      >>> pack(jnp.array([[True, False, True]]))
      Array([[5]], dtype=uint8)
    """
    return jnp.packbits(mask, axis=-1, bitorder="little")


def unpack(packed: UInt8[Array, "*lead bytes"], size: int) -> Bool[Array, "*lead d"]:
    """The inverse of `pack`.

    Args:
      packed: uint8 from `pack`.
      size: length of the last axis of the mask.

    Returns:
      The mask, `[*lead, size]`.

    Example:
      >>> unpack(pack(jnp.array([True, False, True])), 3)
      Array([ True, False,  True], dtype=bool)
    """
    bits = jnp.unpackbits(packed, axis=-1, count=size, bitorder="little")
    return bits.astype(jnp.bool_)

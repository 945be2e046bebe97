"""Masks stored as bits: one bit a weight along the last axis."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, UInt8

from sparsejax._devices import shape_on_a_device
from sparsejax._promotion import along_last


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
    mask = jnp.asarray(mask)
    sharding = None if isinstance(mask, Tracer) else mask.sharding
    if isinstance(sharding, jax.sharding.NamedSharding) and is_packable(mask):
        return jax.jit(_pack, out_shardings=sharding)(mask)
    return _pack(mask)


def _pack(mask: jax.Array) -> jax.Array:
    # made once: fused into what follows, it would be made anew for each bit of a byte
    mask = jax.lax.optimization_barrier(mask)
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % 8)])
    # eight strided slices, not `jnp.packbits`: its reduction over a short last axis is
    # hundreds of times slower on a GPU
    bits = (mask[..., bit::8].astype(jnp.uint8) << bit for bit in range(8))
    return functools.reduce(jnp.bitwise_or, bits)


def is_packable(mask: Any) -> bool:
    """Whether there is an axis to pack, of which each device packs its own part.

    Where the last axis is sharded, each part must hold whole bytes. Traced arrays tell
    the shardings of explicit meshes alone.

    Args:
      mask: an array of any shape and dtype, such as the weights that it is for; only
        shape and sharding are read.

    Returns:
      False for a scalar, and where `pack` would cut a byte between two devices.

    Example:
      >>> is_packable(jnp.ones((4, 20), jnp.bool_))
      True
    """
    shape, part = jnp.shape(mask), shape_on_a_device(mask)
    return shape != () and (part[-1] == shape[-1] or part[-1] % 8 == 0)


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
    # not `jnp.unpackbits`: it raises where another axis is empty
    places = along_last(8, packed.ndim + 1, jnp.uint8)
    bits = (packed[..., None] >> places) & 1
    bits = bits.reshape(*packed.shape[:-1], 8 * packed.shape[-1])
    return bits[..., :size].astype(jnp.bool_)

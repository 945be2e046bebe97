"""Scores as unsigned integers of the same order, so that exact search is bit search."""

import jax
import jax.numpy as jnp

from sparsejax.masks._check import check_floating

EXCLUDED = 0
"""The key of an entry that must not be chosen; below the key of NaN, which is 1."""


def ordered_keys(scores: jax.Array, among: jax.Array | None = None) -> jax.Array:
    """Maps floats to unsigned integers that compare in the same order.

    Args:
      scores: any float dtype, any shape. -0.0 equals 0.0; NaN ranks below -inf.
      among: bool, broadcastable; False entries get `EXCLUDED`, below every score.

    Returns:
      Unsigned integers of the scores' shape and width.
    """
    scores = jnp.asarray(scores)
    check_floating(scores)
    width = scores.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{width}")
    sign = unsigned.type(1 << (width - 1))
    bits = jax.lax.bitcast_convert_type(scores, unsigned)
    # one bit pattern for both zeros: they are equal as scores (a test by `== 0` would
    # also flush subnormals on a CPU)
    bits = jnp.where(bits == sign, unsigned.type(0), bits)
    # negative floats count downwards: flip them whole; shift the others above them
    keys = jnp.where(bits >= sign, ~bits, bits | sign)
    keys = jnp.where(jnp.isnan(scores), unsigned.type(1), keys)
    if among is not None:
        keys = jnp.where(among, keys, unsigned.type(EXCLUDED))
    return keys

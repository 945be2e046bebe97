"""Scores as unsigned integers of the same order, so that exact search is bit search."""

import jax
import jax.numpy as jnp

from sparsejax._order import below, ordered
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
    signed = ordered(scores)
    unsigned = jax.lax.bitcast_convert_type(
        signed ^ below(signed.dtype),  # the lowest becomes 0
        jnp.dtype(f"uint{8 * signed.dtype.itemsize}"),
    )
    return unsigned if among is None else jnp.where(among, unsigned, EXCLUDED)

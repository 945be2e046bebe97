"""Keeping the entries of highest score: some always, some never."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax import ops


def ranked(scores: jax.Array, allowed: jax.Array, always: jax.Array) -> jax.Array:
    """Scores of which the highest are kept: inf for always, -inf for never."""
    return jnp.where(always, jnp.inf, jnp.where(allowed, scores, -jnp.inf))


def keep_allowed(ranks: jax.Array, num_kept: int | jax.Array) -> jax.Array:
    """The `num_kept` highest, fewer where not so many are above -inf; never a NaN.

    See `ops.keep_highest`.
    """
    return ops.keep_highest(ranks, num_kept) & (ranks > -jnp.inf)


def keep_highest(
    scores: Float[Array, "*lead keys"],
    num_kept: int | jax.Array,
    *,
    always: Bool[Array, "*#lead keys"],
) -> Bool[Array, "*lead keys"]:
    """Keeps the `num_kept` highest, `always` first; of equal ones those further left.

    For `num_kept` see `ops.keep_highest`. A NaN ranks below every number.
    """
    return ops.keep_highest(jnp.where(always, jnp.inf, scores), num_kept)

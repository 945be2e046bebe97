"""Keeping the entries of highest score: some always, some last, some never."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax import ops


def ranked(scores: jax.Array, allowed: jax.Array, always: jax.Array) -> jax.Array:
    """Scores of which the highest are kept: inf for always, -inf for never."""
    return jnp.where(always, jnp.inf, jnp.where(allowed, scores, -jnp.inf))


def keep_allowed(ranks: jax.Array, num_kept: int | jax.Array) -> jax.Array:
    """The `num_kept` highest, fewer where not so many are above -inf; never a NaN.

    See `ops.keep_highest`.
    """
    return ops.keep_highest(ranks, num_kept) & (ranks > -jnp.inf)


def nan_last(scores: jax.Array, there: jax.Array) -> jax.Array:
    """Scores of which a NaN ranks below every number, and what is not there below it.

    Numbers are made finite, so that neither changes places with an infinite one.
    """
    low, high = jnp.finfo(scores.dtype).min, jnp.finfo(scores.dtype).max
    finite = jnp.nan_to_num(scores, nan=low, posinf=high, neginf=low)
    return jnp.where(there, finite, -jnp.inf)


def ends(
    num_keys: int, lengths: Int[Array, " batch"] | None, *, sink: int, local: int
) -> tuple[Bool[Array, "#batch 1 keys"], Bool[Array, "#batch 1 keys"]]:
    """Which keys are there, and which of them are among the first or the last.

    All are there by default. Of `sink` first and `local` last ones.
    """
    at = jnp.arange(num_keys)[None, None]
    end = num_keys if lengths is None else lengths[:, None, None]
    there = at < end
    return there, there & ((at < sink) | (at >= end - local))


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

"""The highest of each row in plain jnp: a sort, or on a GPU all pairs of short rows."""

import functools

import jax
import jax.numpy as jnp

from sparsejax._pairs import count_if_few
from sparsejax._promotion import to_rank


def keep_highest(x: jax.Array, num_kept: int | jax.Array) -> jax.Array:
    """See the public function; `num_kept` an int, or int32 that broadcasts to the rows.

    Args:
      x: rows along the last axis.
      num_kept: of each row.
    """
    return count_if_few(
        x,
        num_comparisons(x),
        count=functools.partial(_by_counting, num_kept=num_kept),
        otherwise=functools.partial(_by_sorting, num_kept=num_kept),
    )


def num_comparisons(x: jax.Array) -> int:
    """How many counting makes: greater, equal, further left and NaN of each pair."""
    return 4 * x.size * x.shape[-1]


def _by_sorting(x: jax.Array, num_kept: int | jax.Array) -> jax.Array:
    nan = jnp.isnan(x)
    keys = jnp.where(nan, -jnp.inf, x)
    size = x.shape[-1]
    if isinstance(num_kept, int):
        bound = jax.lax.top_k(keys, min(num_kept, size))[0][..., -1:]
    else:
        num_kept = jnp.broadcast_to(num_kept, x.shape[:-1])[..., None]
        at = jnp.clip(size - num_kept, 0, size - 1)
        ordered = jnp.sort(keys, axis=-1, stable=False)
        bound = jnp.take_along_axis(ordered, at, axis=-1)
    above, tied = keys > bound, keys == bound

    def count(mask):
        return jnp.cumsum(mask, axis=-1, dtype=jnp.int32)

    # NaN and -inf tie at -inf; there the numbers come first
    numbers, nans = count(tied & ~nan), count(tied & nan)
    place = jnp.where(nan, nans + numbers[..., -1:], numbers)
    wanted = num_kept - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (tied & (place <= wanted))


def _by_counting(x: jax.Array, num_kept: int | jax.Array) -> jax.Array:
    """One reduction over pairs, where a sort takes many times as long to start."""
    mine, other = x[..., :, None], x[..., None, :]
    index = jnp.arange(x.shape[-1])
    further_left = to_rank(index[None] < index[:, None], mine.ndim)
    before = (other > mine) | (jnp.isnan(mine) & ~jnp.isnan(other))
    equal = (other == mine) | (jnp.isnan(mine) & jnp.isnan(other))
    rank = jnp.sum(before | (equal & further_left), axis=-1, dtype=jnp.int32)
    return rank < to_rank(jnp.asarray(num_kept)[..., None], rank.ndim)

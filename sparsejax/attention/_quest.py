"""Quest: pages of a cache whose keys may score high for the query at hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax import ops
from sparsejax.attention._arguments import (
    cache_lengths,
    check_count,
    check_next,
    check_tokens,
)
from sparsejax.attention._slots import change_slots
from sparsejax.formats import KeyLists


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageBounds:
    """The least and the greatest entry of the keys of each page, channel by channel.

    Beside a cache of keys: 2 / page_size of its size. Built by `page_bounds`, kept up
    by `append_key`. A page without keys has `low` inf and `high` -inf.

    Attributes:
      low: `[batch, pages, kv_heads, head_dim]`, of the dtype of the keys.
      high: likewise.
      lengths: int32 `[batch]`, keys of each sequence.
      page_size: keys of a page.
    """

    low: jax.Array
    high: jax.Array
    lengths: jax.Array
    page_size: int = dataclasses.field(metadata={"static": True})


def page_bounds(
    key: Float[Array, "batch slots kv_heads head_dim"],
    *,
    lengths: ArrayLike | None = None,
    page_size: int = 16,
) -> PageBounds:
    """Bounds the keys of a cache, page by page.

    Args:
      key: rotated keys, or a cache of them with slots for more.
      lengths: int32 `[batch]` or one integer, in `[0, slots]`: keys that are there;
        what lies in the slots behind them is not read. All by default.
      page_size: keys of a page; the last page may have fewer.

    Raises:
      ValueError: if `key` has other axes, `lengths` are not integers in their range
        that fit it, or `page_size` is below 1 or above the slots.

    Example:
      >>> key = jnp.array([3.0, 1.0, 2.0, 9.0]).reshape(1, 4, 1, 1)
      >>> bounds = sj.attention.page_bounds(key, lengths=3, page_size=2)
      >>> print(bounds.low.ravel(), bounds.high.ravel())
      [1. 2.] [3. 2.]
    """
    check_tokens("key", key)
    batch, num_slots, *rest = key.shape
    if not 1 <= page_size <= num_slots:
        raise ValueError(
            f"`page_size` must be in [1, {num_slots}], the slots of the cache; got "
            f"{page_size}. Choose smaller pages, or attend to all of so short a cache."
        )
    key = jax.lax.stop_gradient(key)
    lengths = cache_lengths(key, lengths)
    there = (jnp.arange(num_slots)[None] < lengths[:, None])[..., None, None]

    def reduced(reduce, fill):
        filled = jnp.where(there, key, fill)
        padding = [(0, 0), (0, -num_slots % page_size), (0, 0), (0, 0)]
        filled = jnp.pad(filled, padding, constant_values=fill)
        return reduce(filled.reshape(batch, -1, page_size, *rest), axis=2)

    low, high = reduced(jnp.min, jnp.inf), reduced(jnp.max, -jnp.inf)
    return PageBounds(low, high, lengths, page_size)


def append_key(
    bounds: PageBounds, key: Float[Array, "batch 1 kv_heads head_dim"]
) -> PageBounds:
    """Takes in the key of the next position.

    Args:
      bounds: with a slot for it: a key beyond the last page is dropped.
      key: rotated; written to the cache by its owner.

    Raises:
      ValueError: if `key` does not fit `bounds`.

    Example:
      >>> key = jnp.ones((1, 4, 1, 1))
      >>> bounds = sj.attention.page_bounds(key, lengths=2, page_size=2)
      >>> bounds = sj.attention.append_key(bounds, jnp.full((1, 1, 1, 1), 5.0))
      >>> print(bounds.low.ravel(), bounds.lengths)
      [1. 5.] [3]
    """
    batch, _, kv_heads, head_dim = bounds.low.shape
    check_next("key", key, batch, kv_heads, head_dim)
    key = jax.lax.stop_gradient(key)
    page = bounds.lengths // bounds.page_size
    return dataclasses.replace(
        bounds,
        low=change_slots(bounds.low, page, lambda low: jnp.minimum(low, key)),
        high=change_slots(bounds.high, page, lambda high: jnp.maximum(high, key)),
        lengths=bounds.lengths + 1,
    )


def page_scores(
    query: Float[Array, "batch 1 heads head_dim"],
    bounds: PageBounds,
    *,
    per_head: bool = False,
) -> Float[Array, "batch heads_or_kv_heads pages"]:
    """Bounds the product of the query with any key of a page from above.

    `sum_c max(q_c low_c, q_c high_c)`, which one key alone reaches; computed as two
    products, of the positive part of `q` with `high` and of the negative with `low`.
    Not divided by the root of `head_dim`.

    Args:
      query: of the position at hand, rotated.
      bounds: of the keys so far.
      per_head: bounds for each query head; else for each key head the sum over the
        query heads that use it.

    Returns:
      float32; -inf for a page without keys. No gradient.

    Raises:
      ValueError: if `query` does not fit `bounds`.

    Example:
      >>> key = jnp.ones((1, 4, 1, 2))
      >>> bounds = sj.attention.page_bounds(key, lengths=2, page_size=2)
      >>> print(sj.attention.page_scores(jnp.array([[[[1.0, -2.0]]]]), bounds))
      [[[ -1. -inf]]]
    """
    _check_query(query, bounds)
    query, low, high = jax.lax.stop_gradient((query[:, 0], bounds.low, bounds.high))
    return ops.page_scores(
        query,
        low,
        high,
        bounds.lengths,
        page_size=bounds.page_size,
        per_head=per_head,
    )


def quest(
    query: Float[Array, "batch 1 heads head_dim"],
    bounds: PageBounds,
    *,
    num_kept: int = 64,
    per_head: bool = False,
) -> KeyLists:
    """Keeps the pages of a cache whose keys may score highest for a decoding query.

    Nothing is evicted: the next query chooses anew.

    Args:
      query: of the last position in `bounds`, rotated; query head `i` uses key head
        `i // (heads / kv_heads)`.
      bounds: of the keys so far, the query's own included.
      num_kept: earlier pages to keep; all of them where there are fewer. The page of
        the query comes on top, so that one less than the pages of the cache is the
        most. 64 pages of 16 keys are the 1024 of the paper.
      per_head: a list for each query head; else the query heads of a key head share
        one, by the sum of their bounds.

    Returns:
      Lists of pages, `[batch, heads | kv_heads, num_kept + 1]`. No gradient.

    Raises:
      ValueError: if shapes disagree, or `num_kept` is out of range.

    Example:
      >>> key = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> bounds = sj.attention.page_bounds(key, page_size=12)
      >>> lists = sj.attention.quest(key[:, -1:], bounds, num_kept=2)
      >>> print(lists.indices[0], lists.density(64)[0])
      [[1 2 5]
       [0 1 5]] [0.4375 0.4375]

    References:
      Tang et al., 2024, https://arxiv.org/abs/2406.10774, as in Nawrot et al., 2025,
      https://arxiv.org/abs/2504.17768 (The Sparse Frontier), which sums over the query
      heads of a key head and needs more pages than are kept; here there may be fewer.
    """
    _check_query(query, bounds)
    pages = bounds.low.shape[1]
    check_count("num_kept", num_kept, 0, pages - 1, "earlier pages")
    return ops.highest_pages(
        query[:, 0],
        bounds.low,
        bounds.high,
        bounds.lengths,
        page_size=bounds.page_size,
        num_kept=num_kept + 1,
        per_head=per_head,
    )


def _check_query(query: Any, bounds: PageBounds) -> None:
    low = bounds.low
    if (
        query.ndim != 4
        or query.shape[::3] != low.shape[::3]
        or query.shape[1] != 1
        or query.shape[2] % low.shape[2]
    ):
        raise ValueError(
            "`query` must be [batch, 1, heads, head_dim], equal in batch and head_dim "
            "to `bounds`, whose key heads must divide its heads; got "
            f"{query.shape} and bounds {low.shape}."
        )

"""The definition: the scores of all pages, then the highest of them as a list."""

import jax
import jax.numpy as jnp

from sparsejax.formats import KeyLists
from sparsejax.ops.keep_highest import keep_highest


def page_scores(
    query: jax.Array,
    low: jax.Array,
    high: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
    per_head: bool,
) -> jax.Array:
    """Bounds the product of the query with any key of a page from above.

    `sum_c max(q_c low_c, q_c high_c)`: the positive part of `q` times `high` and the
    negative part times `low`.

    Args:
      query: `[batch, heads, dim]`.
      low: `[batch, pages, kv_heads, dim]`, the least entries of the keys of each page.
      high: likewise the greatest.
      lengths: int32 `[batch]`, keys of each sequence.
      page_size: keys of a page.
      per_head: a score for each query head; else for each key head the sum over the
        query heads that use it.

    Returns:
      float32 `[batch, heads|kv_heads, pages]`; -inf for a page without keys.

    Example:
      >>> query, low = jnp.array([[[1.0, -1.0]]]), jnp.zeros((1, 3, 1, 2))
      >>> scores = page_scores(
      ...     query, low, low + 2, jnp.array([3]), page_size=2, per_head=False
      ... )
      >>> print(scores)  # the third page has no key
      [[[  2.   2. -inf]]]
    """
    query = query.astype(jnp.float32)
    batch, heads, dim = query.shape
    pages, kv_heads = low.shape[1:3]
    query = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    parts = [(jnp.maximum(query, 0), high), (jnp.minimum(query, 0), low)]
    scores = jnp.zeros((), jnp.float32)
    empty = jnp.arange(pages)[None] * page_size >= lengths[:, None]
    for part, bound in parts:
        if not per_head:  # both are linear, so the sum over the heads comes first
            part = part.sum(axis=2, keepdims=True)
        bound = jnp.where(empty[..., None, None], 0, bound).astype(jnp.float32)
        scores += jnp.einsum(
            "bhgd,bphd->bhgp",
            part,
            bound,
            precision="highest",  # rounded operands would bound nothing
        )
    scores = scores.reshape(batch, heads if per_head else kv_heads, pages)
    return jnp.where(empty[:, None], -jnp.inf, scores)


def highest_pages(
    query: jax.Array,
    low: jax.Array,
    high: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
    num_kept: int,
    per_head: bool,
) -> KeyLists:
    """See the public function."""
    scores = page_scores(
        query, low, high, lengths, page_size=page_size, per_head=per_head
    )
    at = jnp.arange(low.shape[1])[None, None]
    current = (lengths[:, None, None] - 1) // page_size
    scores = jnp.where(at < current, scores, -jnp.inf)
    kept = keep_highest(jnp.where(at == current, jnp.inf, scores), num_kept)
    return KeyLists.from_mask(
        kept & (at <= current), page_size=page_size, capacity=num_kept
    )

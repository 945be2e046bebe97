"""Which blocks of keys a block of queries attends to, found by pooled queries and keys.

A score for each block costs `1 / (height * width)` of all scores. The selectors are
pure and jittable; what they return is an operand of `ops.block_attention`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax import activations
from sparsejax._reshape import reshape_stepwise
from sparsejax.attention._arguments import check_blocks, prompt_lengths
from sparsejax.attention._ranking import keep_allowed, ranked
from sparsejax.attention._spark import spark_selection
from sparsejax.formats import BlockMask

Pool: TypeAlias = Callable[..., jax.Array]
"""Reduces the tokens of a block to one, called as `pool(x, axis=1)`, and with `where=`
too where there are `lengths`; `jnp.mean`, `jnp.max`."""

# They give one of the tokens, so nothing is lost without a cast before; and a GPU then
# reads the keys once for the three pools of SeerAttention. With what `where=` begins.
_CHOOSING = {jnp.max: -jnp.inf, jnp.min: jnp.inf}


def block_scores(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    *,
    block_shape: tuple[int, int],
    pool: Pool = jnp.mean,
    per_head: bool = False,
    lengths: ArrayLike | None = None,
) -> Float[Array, "batch heads_or_kv_heads block_rows block_columns"]:
    """Scores blocks by the products of pooled queries and pooled keys.

    The last block of an axis pools the tokens that it has. Products are over the root
    of `head_dim`, as in attention, and float32.

    Args:
      query: rotated queries; query head `i` uses key head `i // (heads / kv_heads)`.
      key: rotated keys; `kv_heads` divides `heads`.
      block_shape: `(height, width)`, queries and keys of a block.
      pool: of the tokens of a block, called with `axis=`.
      per_head: score for each query head; else for each key head, the mean over the
        query heads that use it: less work, here and in the attention.
      lengths: int32 `[batch]` or one integer, in `[1, seq]`: tokens that each sequence
        has, queries and keys alike. Those after them are filler and have no part in a
        score. All by default.

    Returns:
      float32; for `heads` with `per_head`, else for `kv_heads`. No gradient. Finite
      also where a block is all filler.

    Raises:
      ValueError: if shapes disagree, a side of a block is below 1, or `lengths` are not
        integers in their range that fit.

    Example:
      >>> query = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> print(sj.attention.block_scores(query, query, block_shape=(2, 2))[0, 0])
      [[0.25 1.25]
       [1.25 6.25]]

    References:
      Gao et al., 2024, https://arxiv.org/abs/2410.13276 (SeerAttention), section 3,
      which pools likewise, by several functions, and learns projections of the pooled.
    """
    check_blocks(query, key, block_shape)
    lengths = prompt_lengths(query, key, lengths)
    query, key = jax.lax.stop_gradient((query, key))
    query = pooled(query, block_shape[0], pool, lengths)
    key = pooled(key, block_shape[1], pool, lengths)
    batch, rows, heads, dim = query.shape
    columns, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    query = query.reshape(batch, rows, kv_heads, group, dim)
    if not per_head:  # a mean of products with one key is a product of the mean
        query, group = query.mean(axis=3, keepdims=True), 1
    # heads and rows as one axis, which the product leaves as they are wanted
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * rows, dim)
    scores = jnp.einsum("bhnd,bkhd->bhnk", query, key) * dim**-0.5
    return reshape_stepwise(scores, (batch, kv_heads * group, rows, columns))


def topk_blocks(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    *,
    num_kept: int,
    block_shape: tuple[int, int],
    causal: bool = False,
    pool: Pool = jnp.mean,
    per_head: bool = False,
    lengths: ArrayLike | None = None,
) -> BlockMask:
    """Keeps the `num_kept` key blocks of highest score for each block of queries.

    A block of queries shares its blocks of keys, so all of its queries, later ones too,
    have a say in what each of them attends to.

    Args:
      query: see `block_scores`.
      key: likewise.
      num_kept: how many blocks to keep, exactly; all that are in sight where there are
        fewer. Of equal scores the one further left wins; NaN is never kept.
      block_shape: `(height, width)`, queries and keys of a block.
      causal: never keep a block that lies after all its queries, and always those that
        hold keys at the queries' own positions: these count among `num_kept`.
      pool: see `block_scores`.
      per_head: a mask for each query head, not for each key head.
      lengths: see `block_scores`; a block of filler alone is never kept, and real
        tokens have the blocks that they have without any filler.

    Returns:
      A mask `[batch, heads | kv_heads, queries, keys]`, rounded up to whole blocks.
      `density()` is of all blocks, in sight or not: with `causal` at most about 1/2.
      No gradient.

    Raises:
      ValueError: as `block_scores`, or if `num_kept` is below 1, or below what `causal`
        always keeps.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> mask = sj.attention.topk_blocks(
      ...     x, x, num_kept=2, block_shape=(16, 16), causal=True
      ... )
      >>> print(mask.num[0, 0], mask.density()[0])
      [1 2 2 2] [0.4375 0.4375]
    """
    check_blocks(query, key, block_shape)
    columns = -(-key.shape[1] // block_shape[1])
    _check_count("num_kept", num_kept, columns, block_shape, causal)
    lengths = prompt_lengths(query, key, lengths)
    options = {"pool": pool, "per_head": per_head, "lengths": lengths}
    scores = block_scores(query, key, block_shape=block_shape, **options)
    sizes = query.shape[1], key.shape[1]
    visible, diagonal = in_sight(*sizes, block_shape, causal, lengths)
    ranks = ranked(scores, visible, diagonal)
    return highest_blocks(ranks, block_shape, min(num_kept, columns))


def statistical_topk_blocks(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    *,
    k: ArrayLike,
    block_shape: tuple[int, int],
    capacity: int | None = None,
    causal: bool = False,
    pool: Pool = jnp.mean,
    per_head: bool = False,
    lengths: ArrayLike | None = None,
) -> BlockMask:
    """Keeps about `k` key blocks for each block of queries, by a threshold.

    Kept are the blocks above the Gaussian threshold of the scores in sight, and always
    the highest, see `spark_selection`: no sort, and rows differ in how many they need.
    A block of queries shares its blocks of keys, so all of its queries, later ones too,
    have a say in what each of them attends to.

    Args:
      query: see `block_scores`.
      key: likewise.
      k: expected number of blocks, at least 1; may be traced. A row with at most `k`
        in sight keeps them all.
      block_shape: `(height, width)`, queries and keys of a block.
      capacity: most blocks of a row; None for no limit. A row with more keeps those of
        highest score, and `overflowed` of the mask tells.
      causal: never keep a block that lies after all its queries, and always those that
        hold keys at the queries' own positions; these may come on top of `k`.
      pool: see `block_scores`.
      per_head: a mask for each query head, not for each key head.
      lengths: see `topk_blocks`.

    Returns:
      As `topk_blocks`.

    Raises:
      TypeError: if `k` is no real number.
      ValueError: as `block_scores`, if `k` is below 1, or `capacity` is, or below what
        `causal` always keeps.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> mask = sj.attention.statistical_topk_blocks(
      ...     x, x, k=2, block_shape=(16, 16), causal=True
      ... )
      >>> print(mask.num)
      [[[1 2 2 1]
        [1 2 2 1]]]

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3, for single keys;
      that blocks are selected so is ours.
    """
    activations.check_k(k)
    check_blocks(query, key, block_shape)
    columns = -(-key.shape[1] // block_shape[1])
    if capacity is not None:
        _check_count("capacity", capacity, columns, block_shape, causal)
    lengths = prompt_lengths(query, key, lengths)
    options = {"pool": pool, "per_head": per_head, "lengths": lengths}
    scores = block_scores(query, key, block_shape=block_shape, **options)
    sizes = query.shape[1], key.shape[1]
    visible, diagonal = in_sight(*sizes, block_shape, causal, lengths)
    kept = spark_selection(scores, visible, k=k) | diagonal
    if capacity is None or capacity >= columns:
        return BlockMask.from_blocks(kept, block_shape)
    ranks = ranked(scores, kept, diagonal)
    mask = highest_blocks(ranks, block_shape, capacity)
    overflowed = jnp.any(kept.sum(axis=-1) > capacity, axis=-1)
    return dataclasses.replace(mask, overflowed=overflowed)


def to_heads(x: jax.Array, heads: int) -> jax.Array:
    """Repeats what key heads have, on axis 2, for the query heads that share them."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def pooled(
    x: jax.Array, size: int, pool: Pool, lengths: jax.Array | None = None
) -> jax.Array:
    """One float32 token for every `size`, and for those that are left at the end.

    Of tokens before `lengths` alone; of zeros where a block has none of these.
    """
    batch, length, *rest = x.shape
    if pool not in _CHOOSING:
        x = x.astype(jnp.float32)
    if lengths is not None:
        x = jnp.pad(x, ((0, 0), (0, -length % size), *[(0, 0)] * len(rest)))
        real = jnp.arange(x.shape[1])[None] < lengths[:, None]
        # what a block of filler alone pools must be finite, also for gradients
        x = jnp.where(real[(..., *[None] * len(rest))], x, 0)
        num = x.shape[1] // size
        real = real.reshape(batch, num, size)
        real |= ~real.any(axis=2, keepdims=True)
        options = {"initial": _CHOOSING[pool]} if pool in _CHOOSING else {}

        def pool_real(tiles, real):
            real = real.reshape(*real.shape, *[1] * len(rest))
            return pool(tiles, axis=1, where=real, **options)

        tiled = x.reshape(batch, num, size, *rest)
        return jax.vmap(pool_real)(tiled, real).astype(jnp.float32)
    num = length // size
    parts = []
    if num:
        tiled = x[:, : num * size].reshape(batch, num, size, *rest)
        parts.append(jax.vmap(functools.partial(pool, axis=1))(tiled))
    if num * size < length:
        parts.append(pool(x[:, num * size :], axis=1)[:, None])
    return jnp.concatenate(parts, axis=1).astype(jnp.float32)


def in_sight(
    num_queries: int,
    num_keys: int,
    block_shape: tuple[int, int],
    causal: bool,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Which blocks may be kept, and which must.

    Both are `[1, 1, block_rows, block_columns]`, with `lengths` `[batch, 1, ..]`: then
    blocks of filler alone may not, and a row of filler may keep any other.
    """
    height, width = block_shape
    query_end, key_end = num_queries, num_keys
    if lengths is not None:
        query_end = key_end = lengths[:, None, None, None]
    first = height * jnp.arange(-(-num_queries // height))[None, None, :, None]
    columns = jnp.arange(-(-num_keys // width))[None, None, None]
    if not causal:
        visible = (first >= 0) & (width * columns < key_end)
        return visible, jnp.zeros_like(visible)
    last = jnp.minimum(first + height, query_end) - 1
    visible = columns <= last // width
    return visible, visible & (columns >= first // width)


def _check_count(name, count, columns: int, block_shape, causal: bool) -> None:
    """Raises if a row may not have the blocks that it always keeps."""
    least = min(most_diagonal(block_shape), columns) if causal else 1
    if count < least:
        raise ValueError(
            f"`{name}` must be at least {least}, as many blocks as a row always "
            f"keeps; got {name}={count}, causal={causal} and blocks of {block_shape}."
        )


def most_diagonal(block_shape: tuple[int, int]) -> int:
    """The most blocks with a query's own position that a row can have."""
    height, width = block_shape
    worst_start = width - math.gcd(height, width)  # of a row, in a block of keys
    return (worst_start + height - 1) // width + 1


def highest_blocks(
    ranks: jax.Array, block_shape: tuple[int, int], num_kept: int
) -> BlockMask:
    """As `BlockMask.from_scores`, by a kernel where there is one."""
    kept = keep_allowed(ranks, num_kept)
    return BlockMask.from_blocks(kept, block_shape, capacity=num_kept)

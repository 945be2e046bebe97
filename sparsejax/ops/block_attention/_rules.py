"""Which keys a query sees besides what the block mask says, and in which blocks.

A block mask knows whole blocks. What cuts through blocks, such as causality, is a rule
on positions. A rule also decides over blocks: most are seen whole or not at all, and a
kernel then needs to look at positions in few of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sparsejax.formats import BlockMask

# The score of a pair that is not seen: in place of -inf, of which differences are NaN.
LOWEST = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """Rules on positions; a key is seen if all of them let it.

    Attributes:
      prefix: int32 `[batch]`: keys before it are seen in spite of `lowest` and
        `highest`; None for no such keys.
      query_segments: int32 `[batch, queries]`: only keys of the same segment are seen;
        None for one segment.
      key_segments: int32 `[batch, keys]`, or None.
      lowest: of key position less query position, None for no bound.
      highest: likewise; 0 for causal attention.
      num_keys: keys from this position on are padding.
    """

    prefix: jax.Array | None
    query_segments: jax.Array | None
    key_segments: jax.Array | None
    lowest: int | None = dataclasses.field(metadata={"static": True})
    highest: int | None = dataclasses.field(metadata={"static": True})
    num_keys: int = dataclasses.field(metadata={"static": True})

    def visible(
        self,
        queries: jax.Array,
        keys: jax.Array,
        *,
        prefix: jax.Array | None,
        query_segments: jax.Array | None,
        key_segments: jax.Array | None,
    ) -> jax.Array:
        """Says whether each query sees each key; all arguments broadcast together.

        Args:
          queries: positions.
          keys: positions.
          prefix: of their batch, as the field; None where that is.
          query_segments: of the queries.
          key_segments: of the keys.
        """
        distance = keys - queries
        seen = keys < self.num_keys
        in_reach = jnp.ones_like(seen)
        if self.lowest is not None:
            in_reach &= distance >= self.lowest
        if self.highest is not None:
            in_reach &= distance <= self.highest
        if prefix is not None:
            in_reach |= keys < prefix
        if query_segments is not None:
            seen &= query_segments == key_segments
        return seen & in_reach


def elementwise(rules: Rules, num_queries: int, num_keys: int) -> jax.Array:
    """The rules for all pairs, `[batch|1, 1, queries, keys]`."""
    prefix, query_segments, key_segments = (
        rules.prefix,
        rules.query_segments,
        rules.key_segments,
    )
    return rules.visible(
        jnp.arange(num_queries)[None, None, :, None],
        jnp.arange(num_keys)[None, None, None],
        prefix=None if prefix is None else prefix[:, None, None, None],
        query_segments=(
            None if query_segments is None else query_segments[:, None, :, None]
        ),
        key_segments=None if key_segments is None else key_segments[:, None, None],
    )


def lengthened(rules: Rules, block_mask: BlockMask) -> Rules:
    """The same rules with segments for whole blocks, which a kernel reads."""
    rows, columns = block_mask.shape[-2:]
    return dataclasses.replace(
        rules,
        query_segments=_to_length(rules.query_segments, rows),
        key_segments=_to_length(rules.key_segments, columns),
    )


def _to_length(segments: jax.Array | None, length: int) -> jax.Array | None:
    if segments is None:
        return None
    widths = ((0, 0), (0, length - segments.shape[1]))
    return jnp.pad(segments, widths, mode="edge")


def split(block_mask: BlockMask, rules: Rules) -> tuple[BlockMask, BlockMask | None]:
    """Splits a mask in the blocks that are seen whole, and those that are seen in part.

    Blocks that no query sees are in neither, as far as that shows from one rule at a
    time, and from the range of the segments of a block: others may be among the second.

    Args:
      block_mask: `[batch|1, heads, queries, keys]`.
      rules: of the same attention, lengthened.

    Returns:
      Two masks with lists as long as those given; None instead of the second where no
      rule can cut through a block.
    """
    if _cuts_nothing(rules, block_mask.shape[-1]):
        return block_mask, None
    some, whole = _of_blocks(block_mask, rules)
    kept = block_mask.to_blocks()
    capacity = (block_mask.indices.shape[-1], block_mask.indices_t.shape[-1])

    def masked(seen):
        kept_and_seen = jnp.logical_and(kept, seen)
        return BlockMask.from_blocks(
            kept_and_seen, block_mask.block_shape, capacity=capacity
        )

    return masked(whole), masked(some & ~whole)


def blocks_read(block_mask: BlockMask, rules: Rules) -> jax.Array:
    """Which blocks a kernel reads, those of both masks that `split` gives.

    Args:
      block_mask: as of `split`.
      rules: of the same attention.

    Returns:
      One bool a block, `[batch|1, heads, rows, columns]`.
    """
    some, _ = _of_blocks(block_mask, lengthened(rules, block_mask))
    return jnp.logical_and(block_mask.to_blocks(), some)


def _cuts_nothing(rules: Rules, num_keys: int) -> bool:
    bounds = (rules.lowest, rules.highest, rules.query_segments)
    return all(bound is None for bound in bounds) and rules.num_keys >= num_keys


def _of_blocks(block_mask: BlockMask, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """Which blocks hold a visible pair, and which hold no other."""
    *_, rows, columns = block_mask.blocks_shape
    height, width = block_mask.block_shape
    first_query = height * jnp.arange(rows)[None, None, :, None]
    first_key = width * jnp.arange(columns)[None, None, None]
    last_query, last_key = first_query + height - 1, first_key + width - 1
    # the differences within a block are all integers between these two
    least, most = first_key - last_query, last_key - first_query
    some = whole = jnp.ones(least.shape, jnp.bool_)
    if rules.lowest is not None:
        some, whole = some & (most >= rules.lowest), whole & (least >= rules.lowest)
    if rules.highest is not None:
        some, whole = some & (least <= rules.highest), whole & (most <= rules.highest)
    if rules.prefix is not None:
        prefix = rules.prefix[:, None, None, None]
        some, whole = some | (first_key < prefix), whole | (last_key < prefix)
    some &= first_key < rules.num_keys
    whole &= last_key < rules.num_keys
    if rules.query_segments is not None and rules.key_segments is not None:
        least_q, most_q = _ranges(rules.query_segments, rows, height)
        least_k, most_k = _ranges(rules.key_segments, columns, width)
        least_q, most_q = (a[:, None, :, None] for a in (least_q, most_q))
        least_k, most_k = (a[:, None, None] for a in (least_k, most_k))
        some &= (least_q <= most_k) & (least_k <= most_q)
        whole &= (least_q == most_k) & (least_k == most_q)
    return some, whole


def _ranges(segments: jax.Array, blocks: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The least and the highest segment of each block, `[batch, blocks]`."""
    tiled = segments.reshape(-1, blocks, size)
    return tiled.min(axis=-1), tiled.max(axis=-1)

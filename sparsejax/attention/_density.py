"""What a selection really keeps, and how many blocks keep a share."""

import bisect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.formats import BlockMask


def pair_density(
    block_mask: BlockMask, num_queries: int
) -> Float[Array, "batch heads"]:
    """Computes the share of all causal pairs that lie in kept blocks, head by head.

    Read off the mask, so after rounding to blocks, and never from the settings that it
    was made with: compare selectors at equal realised density. `KeyLists.density` is
    its like for decoding.

    Args:
      block_mask: `[batch | 1, heads, queries, keys]`, for as many keys as queries.
      num_queries: without the padding to whole blocks.

    Returns:
      float32, kept pairs over `num_queries * (num_queries + 1) / 2`.

    Raises:
      ValueError: as `causal_density`.

    Example:
      >>> kept = jnp.array([[[[True, False], [False, True]]]])
      >>> mask = sj.BlockMask.from_blocks(kept, (2, 2))
      >>> print(sj.attention.pair_density(mask, 4))
      [[0.6]]
    """
    _check_covers(block_mask, num_queries)
    batch, heads = block_mask.overflowed.shape
    each = jax.tree.map(lambda a: a.reshape(-1, 1, *a.shape[2:]), block_mask)
    in_sight = 1 + jnp.arange(num_queries, dtype=jnp.float32)
    share = jnp.average(causal_density(each, num_queries), axis=-1, weights=in_sight)
    return share.reshape(batch, heads)


def causal_density(
    block_mask: BlockMask, num_queries: int
) -> Float[Array, "batch queries"]:
    """Computes the share of the keys in sight that causal attention attends to.

    Args:
      block_mask: `[batch | 1, heads, queries, keys]`, for as many keys as queries.
      num_queries: without the padding to whole blocks.

    Returns:
      float32, a mean over the heads of the mask; query i has `i + 1` keys in sight.

    Raises:
      ValueError: if `block_mask` has other axes, or fewer queries than `num_queries`.

    Example:
      >>> kept = jnp.array([[[[True, False], [False, True]]]])
      >>> mask = sj.BlockMask.from_blocks(kept, (2, 2))
      >>> print(12 * sj.attention.causal_density(mask, 4))
      [[12. 12.  4.  6.]]
    """
    _check_covers(block_mask, num_queries)
    share = jnp.mean(block_mask.to_blocks(), axis=1, dtype=jnp.float32)
    return share_in_sight(share, block_mask.block_shape, num_queries)


def share_in_sight(
    share: Float[Array, "batch block_rows block_columns"],
    block_shape: tuple[int, int],
    num_queries: int,
) -> Float[Array, "batch queries"]:
    """The mean of `share` over the keys in sight of each query, causal."""
    (height, width), (rows, columns) = block_shape, share.shape[1:]
    in_sight = 1 + jnp.arange(rows * height)
    first = width * jnp.arange(columns)
    in_block = jnp.clip(in_sight[:, None] - first[None], 0, width)
    attended = jnp.einsum(
        "brc,rhc->brh",
        share,
        in_block.reshape(rows, height, columns).astype(jnp.float32),
        precision="highest",  # counts
    )
    density = attended.reshape(len(share), -1) / in_sight.astype(jnp.float32)[None]
    return density[:, :num_queries]


def blocks_for_density(density: float, num_blocks: int) -> int:
    """Gives the most blocks in a row that keep at most a share of a causal map.

    Of `n` rows of square blocks the first rows have fewer in sight than `t`, so that
    `t (t + 1) / 2 + (n - t) t` blocks are kept of `n (n + 1) / 2`.

    Args:
      density: share of the blocks in sight, in (0, 1].
      num_blocks: `n`, blocks of the sequence.

    Returns:
      `t`, at least 1.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> [sj.attention.blocks_for_density(density, 64) for density in (0.1, 0.5, 1)]
      [3, 18, 64]
    """
    if not 0 < density <= 1 or num_blocks < 1:
        raise ValueError(
            "`density` must be in (0, 1] and `num_blocks` at least 1; got "
            f"density={density} and num_blocks={num_blocks}."
        )

    def kept(t):
        return t * (t + 1) // 2 + (num_blocks - t) * t

    most = density * kept(num_blocks)
    return max(1, bisect.bisect_right(range(1, num_blocks + 1), most, key=kept))


def _check_covers(block_mask: BlockMask, num_queries: int) -> None:
    """Raises unless a mask has all four axes and so many queries."""
    shape = block_mask.shape
    if len(shape) != 4 or not 1 <= num_queries <= shape[2]:
        raise ValueError(
            "`block_mask` must be [batch, heads, queries, keys], with at least "
            f"`num_queries`, which is 1 or more; got shape {shape} and "
            f"num_queries={num_queries}."
        )

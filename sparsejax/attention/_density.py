"""What a selection really keeps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.attention._blocks import causal_density, check_covers
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
    check_covers(block_mask, num_queries)
    batch, heads = block_mask.overflowed.shape
    each = jax.tree.map(lambda a: a.reshape(-1, 1, *a.shape[2:]), block_mask)
    in_sight = 1 + jnp.arange(num_queries, dtype=jnp.float32)
    share = jnp.average(causal_density(each, num_queries), axis=-1, weights=in_sight)
    return share.reshape(batch, heads)

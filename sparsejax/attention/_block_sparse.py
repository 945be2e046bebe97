"""Block-sparse: the blocks of highest mean score, with the first and the nearest."""

from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax.attention import _arguments, _blocks
from sparsejax.attention._ranking import ranked
from sparsejax.formats import BlockMask


def block_sparse(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    num_kept: int = 64,
    block_shape: tuple[int, int] = (16, 16),
    per_head: bool = True,
    causal: Literal[True] = True,
    lengths: ArrayLike | None = None,
) -> BlockMask:
    """Keeps the `num_kept` key blocks of highest mean score for each block of queries.

    As `topk_blocks` with `causal`, but the first block and the one before the queries'
    own are always kept too.

    Args:
      query: see `block_scores`.
      key: likewise, for as many positions.
      num_kept: blocks of a row, exactly; all in sight where there are fewer. At most
        the blocks of the sequence; `blocks_for_density` gives it for a density. The
        blocks that are always kept count: three, where blocks are square.
      block_shape: `(height, width)`, queries and keys of a block.
      per_head: a mask for each query head; else for each key head.
      causal: there is no other form; taken as `sj.nn.BlockAttention` passes it.
      lengths: see `topk_blocks`.

    Returns:
      A mask `[batch, heads | kv_heads, seq, seq]`, rounded up to whole blocks; use it
      with `causal=True`. No gradient.

    Raises:
      ValueError: if shapes disagree, a block is longer than the sequence, or `num_kept`
        is more than its blocks or below what is always kept; `causal` is False; or
        `lengths` are not integers in their range that fit.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> mask = sj.attention.block_sparse(x, x, num_kept=3, block_shape=(8, 8))
      >>> print(mask.num[0, 0], mask.indices[0, 0, -1])
      [1 2 3 3 3 3 3 3] [0 6 7]

    References:
      Jiang et al., 2024, https://arxiv.org/abs/2407.02490 (MInference), as in Nawrot et
      al., 2025, https://arxiv.org/abs/2504.17768 (The Sparse Frontier).
    """
    _arguments.check_causal(causal)
    _arguments.check_square(query, key, block_shape)
    length = key.shape[1]
    columns = -(-length // block_shape[1])
    least = min(_blocks.most_diagonal(block_shape) + 2, columns)
    _arguments.check_count("num_kept", num_kept, least, columns, "blocks")
    lengths = _arguments.prompt_lengths(query, key, lengths)
    scores = _blocks.block_scores(
        query, key, block_shape=block_shape, per_head=per_head, lengths=lengths
    )
    visible, own = _blocks.in_sight(length, length, block_shape, True, lengths)
    after = jnp.pad(own[..., 1:], [*[(0, 0)] * (own.ndim - 1), (0, 1)])
    before = after & ~own  # ends where its own begin
    first = jnp.arange(columns)[None, None, None] == 0
    ranks = ranked(scores, visible, own | before | first)
    return _blocks.highest_blocks(ranks, block_shape, num_kept)

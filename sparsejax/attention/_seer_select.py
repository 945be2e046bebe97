"""SeerAttention: which blocks are kept of the gate's scores."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax._lengths import of_sequences
from sparsejax._promotion import along_last, to_rank
from sparsejax.attention._ranking import keep_allowed
from sparsejax.formats import BlockMask


def seer_topk(
    scores: Float[Array, "batch heads blocks blocks"],
    *,
    num_kept: ArrayLike,
    block: int,
    dense_last_rows: int = 2,
    lengths: ArrayLike | None = None,
) -> BlockMask:
    """Keeps the blocks of highest score for each block of queries.

    Args:
      scores: of `seer_scores`; -inf and NaN are never kept.
      num_kept: blocks of a row, or one number for each head; may be traced. The block
        of the queries themselves is always kept and counts: the released code may drop
        it. Of equal scores the one further left wins. `blocks_for_density` gives it for
        a density; the released code's `(1 - sqrt(1 - density)) n` is as much or one
        block less.
      block: tokens of a block.
      dense_last_rows: so many block rows at the end keep all blocks, as in the paper's
        prefill, where they hold the question; 0 for training.
      lengths: int32 `[batch]` or one integer, in `[1, blocks * block]`: tokens of each
        sequence that is filled up: its end is there, in the last block with a token of
        it. By default all are as long as the batch.

    Returns:
      A mask `[batch, heads, seq, seq]`, rounded up to whole blocks; use it with
      `causal=True`. `pair_density` gives what it keeps. No gradient.

    Raises:
      ValueError: if `scores` have other axes, `num_kept` is below 1, more than there
        are blocks, or neither one number nor one for each head; `dense_last_rows` is
        negative; or `lengths` are not integers in their range that fit the batch.

    Example:
      >>> scores = jnp.where(jnp.tri(4, dtype=bool), jnp.arange(4.0), -jnp.inf)
      >>> mask = seer_topk(
      ...     scores[None, None], num_kept=1, block=64, dense_last_rows=1
      ... )
      >>> print(mask.num[0, 0])
      [1 1 1 4]
    """
    own = jnp.arange(scores.shape[-2])
    kept = topk_kept(scores, own, num_kept)
    capacity = None if dense_last_rows else most_kept(num_kept)
    return _with_last_rows(kept, own, dense_last_rows, block, lengths, capacity)


def seer_threshold(
    scores: Float[Array, "batch heads blocks blocks"],
    *,
    threshold: ArrayLike,
    block: int,
    dense_last_rows: int = 2,
    lengths: ArrayLike | None = None,
) -> BlockMask:
    """Keeps the blocks whose softmax of scores is above a threshold.

    Args:
      scores: of `seer_scores`.
      threshold: of a row's softmax; may be traced. The paper uses 5e-4 to 5e-3.
      block: tokens of a block.
      dense_last_rows: see `seer_topk`.
      lengths: likewise.

    Returns:
      As `seer_topk`. The block of the queries themselves is always kept: without it a
      row could be empty.

    Raises:
      ValueError: if `dense_last_rows` is negative, or `lengths` are not integers in
        their range that fit the batch.

    Example:
      >>> scores = jnp.log(jnp.array([[1.0, 0.0], [0.75, 0.25]]))
      >>> mask = seer_threshold(
      ...     scores[None, None], threshold=0.7, block=64, dense_last_rows=0
      ... )
      >>> print(mask.to_blocks()[0, 0].astype(int))
      [[1 0]
       [1 1]]
    """
    own = jnp.arange(scores.shape[-2])
    kept = threshold_kept(scores, own, threshold)
    return _with_last_rows(kept, own, dense_last_rows, block, lengths)


def topk_kept(scores: jax.Array, own: jax.Array, num_kept: ArrayLike) -> jax.Array:
    """The `num_kept` highest of each row, the block `own` of the row among them."""
    if scores.ndim != 4:
        raise ValueError(
            "`scores` must be `[batch, heads, blocks, blocks]`; got shape "
            f"{scores.shape}."
        )
    _, heads, _, columns = scores.shape
    if np.shape(num_kept) not in ((), (heads,)):
        raise ValueError(
            f"`num_kept` must be one number or one for each of {heads} heads; got "
            f"shape {np.shape(num_kept)}."
        )
    if not isinstance(num_kept, Tracer):
        counts = np.asarray(num_kept)
        if counts.min() < 1 or counts.max() > columns:
            raise ValueError(
                f"`num_kept` must be in [1, {columns}], the blocks of the sequence; "
                f"got {num_kept}. Lower the budget or the size of a block."
            )
    scores = jax.lax.stop_gradient(scores)
    is_own = _is_own(columns, own)
    if not isinstance(num_kept, int):
        num_kept = jnp.reshape(jnp.asarray(num_kept), (-1, 1))  # of each head's rows
    ranks = jnp.where(is_own, jnp.inf, scores)
    return keep_allowed(ranks, num_kept)


def threshold_kept(scores: jax.Array, own: jax.Array, threshold: ArrayLike):
    """The blocks above the threshold, and the block `own` of each row."""
    scores = jax.lax.stop_gradient(scores)
    in_sight = scores > -jnp.inf
    weights = jax.nn.softmax(jnp.where(in_sight, scores, -1e30), axis=-1)
    above = (weights > threshold) & in_sight
    is_own = _is_own(scores.shape[-1], own)
    return above | to_rank(is_own, above.ndim)


def _is_own(columns: int, own: jax.Array) -> jax.Array:
    return along_last(columns, own.ndim + 1) == own[..., None]


def most_kept(num_kept: ArrayLike) -> int | None:
    """The most blocks that a row can have by `topk_kept`; None where it is traced."""
    return None if isinstance(num_kept, Tracer) else int(np.max(num_kept))


def _with_last_rows(
    kept, own, dense_last_rows: int, block: int, lengths, capacity: int | None = None
) -> BlockMask:
    if dense_last_rows < 0:
        raise ValueError(f"`dense_last_rows` must be 0 or more; got {dense_last_rows}.")
    rows, columns = kept.shape[-2:]
    row = jnp.arange(rows)[None, None]
    last = row >= rows - dense_last_rows
    if lengths is not None:
        lengths = of_sequences("lengths", lengths, len(kept), 1, rows * block)
        ends = -(-lengths // block)[:, None, None]  # batch, heads, row
        last = (row >= ends - dense_last_rows) & (row < ends)
    before = jnp.arange(columns)[None] <= own[:, None]
    kept |= last[..., None] & before[None, None]
    return BlockMask.from_blocks(kept, (block, block), capacity=capacity)

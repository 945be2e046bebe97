"""What a SeerAttention gate is trained on: where the model's own attention peaks."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax import ops
from sparsejax.attention._arguments import check_sequences


def seer_target(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    block: int,
) -> Float[Array, "batch heads blocks blocks"]:
    """Pools the causal attention map to the highest weight of each block.

    Equal to softmax, then maximum over blocks `block x block`, then division by the
    sum of the row. It is computed from `sj.ops.attention_peaks`: the map of `seq x seq`
    is never there, one number for each query and block is.

    Args:
      query: rotated queries.
      key: rotated keys; `kv_heads` divides `heads`.
      block: tokens of a block, in `[1, seq]`.

    Returns:
      float32; rows sum to 1, blocks after the queries are 0. No gradient.

    Raises:
      ValueError: if shapes disagree or `block` is out of range.

    Example:
      >>> x = jnp.zeros((1, 4, 1, 2))  # each token attends evenly
      >>> print(seer_target(x, x, block=2)[0, 0])
      [[1.  0. ]
       [0.5 0.5]]

    References:
      Gao et al., 2024, https://arxiv.org/abs/2410.13276, section 3.2. A maximum, not
      the block's mass.
    """
    peaks = _peaks(query, key, block)
    batch, heads, columns, length = peaks.shape
    peaks = jnp.pad(peaks, ((0, 0), (0, 0), (0, 0), (0, columns * block - length)))
    peaks = peaks.reshape(batch, heads, columns, columns, block).max(axis=-1)
    peaks = peaks.swapaxes(2, 3)
    return peaks / peaks.sum(axis=-1, keepdims=True)


def seer_decode_target(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    block: int,
) -> Float[Array, "batch kv_heads seq blocks"]:
    """As `seer_target`, for each token and key head, over the blocks before its own.

    The weight of a block is the highest of its keys', and of the query heads that share
    the key head.

    Args:
      query: rotated queries.
      key: rotated keys; `kv_heads` divides `heads`.
      block: tokens of a block, in `[1, seq]`.

    Returns:
      float32; rows sum to 1, those of the first block are 0. No gradient.

    Raises:
      ValueError: as `seer_target`.

    References:
      Gao et al., 2025, https://arxiv.org/abs/2506.08889 (SeerAttention-R).
    """
    peaks = _peaks(query, key, block)
    batch, heads, columns, length = peaks.shape
    kv_heads = key.shape[2]
    peaks = peaks.reshape(batch, kv_heads, heads // kv_heads, columns, length)
    peaks = peaks.max(axis=2)
    peaks = peaks.swapaxes(2, 3)
    own = jnp.arange(length)[:, None] // block
    peaks = jnp.where(jnp.arange(columns)[None] < own, peaks, 0)
    return peaks / (peaks.sum(axis=-1, keepdims=True) + 1e-9)


def seer_loss(
    scores: Float[Array, "batch heads rows blocks"],
    target: Float[Array, "batch heads rows blocks"],
    *,
    skip: float = 0.25,
    reduction: Literal["row", "elementwise"] = "row",
    num_rows: Int[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Computes KL(target || softmax(scores)), in float32.

    Args:
      scores: of the gate; -inf where a block is out of sight.
      target: of the same shape; no gradient reaches it.
      skip: share of the first rows that do not count, in [0, 1): they have few blocks
        to choose from. 0.25 for blocks of queries and 0.5 for tokens in the papers.
      reduction: "row" sums over blocks and is the mean over rows; "elementwise" is the
        mean over blocks as well, as in the released code, which multiplies it by 10.
      num_rows: int32, rows of each sequence; those after it do not count, and `skip` is
        a share of it. By default all rows.

    Returns:
      The loss in nats. A row without a block in sight counts as 0, and so does a batch
      in which no row counts.

    Raises:
      ValueError: if shapes differ or an option is out of range.

    Example:
      >>> target = jnp.array([[[[1.0, 0.0], [0.5, 0.5]]]])
      >>> scores = jnp.where(jnp.tri(2, dtype=bool), 0.0, -jnp.inf)[None, None]
      >>> print(seer_loss(scores, target))
      0.0

    References:
      Gao et al., 2024, https://arxiv.org/abs/2410.13276, section 3.2, and the code
      released with it. The reduction to rows is ours.
    """
    if scores.shape != target.shape:
        raise ValueError(
            "`scores` and `target` must have one shape; got "
            f"{scores.shape} and {target.shape}."
        )
    if not 0 <= skip < 1:
        raise ValueError(f"`skip` must be in [0, 1); got {skip}.")
    if reduction not in ("row", "elementwise"):
        raise ValueError(
            f"`reduction` must be 'row' or 'elementwise'; got {reduction!r}."
        )
    row = np.arange(scores.shape[-2] + 1)
    skipped = (skip * row).astype(np.int32)  # of so many rows
    if num_rows is None:
        scores, target = (a[..., skipped[-1] :, :] for a in (scores, target))
        of_row = _divergence(scores, target, reduction)
        return jnp.sum(of_row) / max(of_row.size, 1)
    first, end = jnp.asarray(skipped)[num_rows][:, None], num_rows[:, None]
    counts = (row[:-1] >= first) & (row[:-1] < end)
    counts = jnp.broadcast_to(counts[:, None], scores.shape[:-1])
    of_row = _divergence(scores, target, reduction)
    return jnp.sum(jnp.where(counts, of_row, 0)) / jnp.maximum(jnp.sum(counts), 1)


def _divergence(scores, target, reduction) -> jax.Array:
    """Of each row, `[batch, heads, rows]`."""
    scores = scores.astype(jnp.float32)
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    # finite, so that 0 times the log of an unseen block is 0
    scores = jnp.where(scores > -jnp.inf, scores, -1e30)
    log_share = jax.nn.log_softmax(scores, axis=-1)
    terms = jax.scipy.special.xlogy(target, target) - target * log_share
    return terms.mean(-1) if reduction == "elementwise" else terms.sum(-1)


def _peaks(query: jax.Array, key: jax.Array, block: int) -> jax.Array:
    check_sequences(query, key, block)
    return ops.attention_peaks(query, key, block=block)

"""Vertical-slash: some keys for all queries, and some distances from query to key."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from sparsejax._promotion import to_rank
from sparsejax.attention import _arguments, _window
from sparsejax.attention._ranking import keep_highest, nan_last
from sparsejax.formats import BlockMask


def vertical_slash(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    num_vertical: int = 512,
    num_slash: int = 512,
    window: int = 256,
    sink: int = 4,
    local: int = 64,
    block_shape: tuple[int, int] = (64, 64),
    per_head: bool = True,
    causal: Literal[True] = True,
    lengths: ArrayLike | None = None,
) -> BlockMask:
    """Keeps the columns and the diagonals that the last queries attend to most.

    The causal weights of the last `window` queries are summed over each key (vertical)
    and over each distance from query to key (slash). A pair counts if its key or its
    distance is among the highest; kept are the blocks that hold such a pair.

    The last queries decide for all: a prompt whose question stands elsewhere is judged
    by the wrong ones.

    Args:
      query: rotated queries; query head `i` uses key head `i // (heads / kv_heads)`.
      key: rotated keys; `kv_heads` divides `heads`.
      num_vertical: keys to keep, exactly, the sink's among them; at most `seq`.
      num_slash: distances to keep, exactly, the local ones among them; at most `seq`.
        Of equal sums the lower key, or distance, wins; a NaN is kept last.
      window: how many of the last queries are asked.
      sink: first keys that are always kept.
      local: shortest distances that are always kept, at least 1: a query's own key.
      block_shape: `(height, width)`, queries and keys of a block.
      per_head: a mask for each query head; else for each key head, by the mean of the
        weights over its query heads: fewer blocks to read, and ours.
      causal: there is no other form; taken as `sj.nn.BlockAttention` passes it.
      lengths: int32 `[batch]` or one integer, in `[1, seq]`: tokens of each prompt; the
        last of these are asked, all of a prompt that has fewer than `window`, and what
        fills it up has no part. All by default.

    Returns:
      A mask `[batch, heads | kv_heads, seq, seq]`, rounded up to whole blocks; use it
      with `causal=True`. Rounding keeps far more than the lines themselves: see
      `pair_density`. No gradient.

    Raises:
      ValueError: if shapes disagree, a block or `window` is longer than the sequence,
        or a budget is larger than it or below what is always kept; `causal` is
        False; or `lengths` are not integers in their range that fit.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> mask = sj.attention.vertical_slash(
      ...     x, x, num_vertical=4, num_slash=4, window=8, local=4, block_shape=(8, 8)
      ... )
      >>> density = sj.attention.pair_density(mask, 64)[0, 0]
      >>> print(mask.num[0, 0], f"{density:.3f}")
      [1 2 3 3 3 3 3 3] 0.538

    References:
      Jiang et al., 2024, https://arxiv.org/abs/2407.02490 (MInference), as in Nawrot et
      al., 2025, https://arxiv.org/abs/2504.17768 (The Sparse Frontier), whose kernel
      reads leftover columns one by one: here they are rounded up to blocks.
    """
    _arguments.check_causal(causal)
    _arguments.check_square(query, key, block_shape)
    _arguments.check_prompt(query, key, window)
    keys = key.shape[1]
    _arguments.check_ends(local, sink, keys, least_local=1)
    _arguments.check_count("num_vertical", num_vertical, max(sink, 1), keys, "keys")
    _arguments.check_count("num_slash", num_slash, local, keys, "distances")
    lengths = _arguments.prompt_lengths(query, key, lengths)
    vertical, slash = line_sums(query, key, window, per_head, lengths)
    columns = highest_lines(vertical, num_vertical, sink, lengths)
    offsets = highest_lines(slash, num_slash, local, lengths)
    return blocks_of_lines(columns, offsets, block_shape, lengths)


def line_sums(
    query: jax.Array,
    key: jax.Array,
    window: int,
    per_head: bool,
    lengths: Int[Array, " batch"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weights of the last queries by key and by distance, `[batch, heads, keys]`."""
    weights = _window.window_weights(query, key, window, lengths)
    if not per_head:
        weights = weights.mean(axis=2, keepdims=True)
    batch, kv_heads, group, *rest = weights.shape
    weights = weights.reshape(batch, kv_heads * group, *rest)
    vertical = weights.sum(axis=-2)
    if lengths is not None:  # filler goes to the front, so that prompts end together
        shift = jax.vmap(lambda x, by: jnp.roll(x, by, axis=-1))
        weights = shift(weights, key.shape[1] - lengths)
    return vertical, _window.diagonal_sums(weights)


def highest_lines(
    sums: Float[Array, "batch heads keys"],
    num_kept: int | jax.Array,
    num_first: int,
    lengths: Int[Array, " batch"] | None = None,
) -> Bool[Array, "batch heads keys"]:
    """Keeps columns, or distances: the first and then the highest, no filler."""
    at = jnp.arange(sums.shape[-1])[None, None]
    if lengths is None:
        return keep_highest(sums, num_kept, always=at < num_first)
    there = at < lengths[:, None, None]
    always = there & (at < num_first)
    return keep_highest(nan_last(sums, there), num_kept, always=always) & there


def blocks_of_lines(
    columns: Bool[Array, "*lead keys"],
    offsets: Bool[Array, "*lead keys"],
    block_shape: tuple[int, int],
    lengths: Int[Array, " batch"] | None = None,
) -> BlockMask:
    """Keeps the blocks that hold a kept pair: its key's column, or its offset, is kept.

    Causal, for as many queries as keys; an offset is the distance from query to key.
    With `lengths`, of queries before these alone, and `lead` is `batch heads`.
    """
    (height, width), length = block_shape, columns.shape[-1]
    end = length if lengths is None else lengths[:, None, None, None]
    first_query = height * jnp.arange(-(-length // height))[:, None]
    ndim = 2 if lengths is None else 4
    last_query = jnp.minimum(to_rank(first_query + height, ndim), end) - 1
    first_key = width * jnp.arange(-(-length // width))[None]
    last_key = jnp.minimum(first_key + width, length) - 1

    # a column counts from the query on that sees it
    lead = [(0, 0)] * (columns.ndim - 1)
    at = jnp.where(columns, jnp.arange(length), length)
    padding = [*lead, (0, -length % width)]
    at = jnp.pad(at, padding, constant_values=length)
    leftmost = at.reshape(*at.shape[:-1], -(-length // width), width).min(axis=-1)
    crossed = leftmost[..., None, :] <= to_rank(last_query, columns.ndim + 1)

    # the distances of the pairs of a block have no gap
    before = jnp.pad(jnp.cumsum(offsets, axis=-1, dtype=jnp.int32), [*lead, (1, 0)])
    nearest = jnp.maximum(first_query - last_key, 0)
    beyond = jnp.maximum(last_query - to_rank(first_key, ndim) + 1, 0)
    if lengths is None:
        upto = before[..., beyond]
    else:
        upto = jnp.take_along_axis(before[..., None, :], beyond, axis=-1)
    crossed |= upto > before[..., nearest]
    return BlockMask.from_blocks(crossed, block_shape)

"""How much each block matters to pyramid sparse attention, found without all scores."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from sparsejax._reshape import reshape_stepwise
from sparsejax.attention._arguments import check_whole_blocks, prompt_lengths
from sparsejax.attention._blocks import in_sight, to_heads

# Of the rows of causal attention: earlier ones see fewer columns, and no others are
# computed.
_CAUSAL_PARTS = 4


def antidiagonal_importance(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    stride: int = 16,
    block_shape: tuple[int, int] = (128, 128),
    causal: bool = False,
    lengths: ArrayLike | None = None,
) -> Float[Array, "batch heads block_rows block_columns"]:
    """Estimates the attention of blocks by the sums of their antidiagonals.

    Of each `stride x stride` square of scores the antidiagonal is summed: query
    `stride - 1 - i` with key `i`. A softmax of these, over all squares of a row, is
    summed in each block.

    Args:
      query: rotated queries.
      key: rotated keys; `kv_heads` divides `heads`.
      stride: side of a square; divides both sides of a block.
      block_shape: `(height, width)`, queries and keys of a block.
      causal: only squares at or before the queries' own count.
      lengths: int32 `[batch]` or one integer, in `[1, seq]`: tokens that each sequence
        has, queries and keys alike; those after them are filler and have no part. All
        by default.

    Returns:
      float32; -inf where causality hides a block whole, or all of it is filler. No
      gradient. Tokens missing at the end add 0 to the sums of their squares.

    Raises:
      ValueError: if shapes disagree, `stride` does not divide, a block is longer than
        the sequence, or `lengths` are not integers in their range that fit.

    References:
      Xu et al., 2025, https://arxiv.org/abs/2503.16428 (XAttention), as it is used by
      the code of PSA, https://arxiv.org/abs/2512.04025, for language models.
    """
    check_whole_blocks(query, key, block_shape)
    if stride < 1 or any(side % stride for side in block_shape):
        raise ValueError(
            f"`stride` must divide both sides of a block; got {stride} and "
            f"{block_shape}. Of a layer give it by `importance=functools.partial("
            "sj.attention.antidiagonal_importance, stride=...)`."
        )
    lengths = prompt_lengths(query, key, lengths)
    query, key = jax.lax.stop_gradient((query, key))
    (num_queries, heads, dim), num_keys = query.shape[1:], key.shape[1]
    query_end, key_end = num_queries, num_keys
    if lengths is not None:
        query, key = _without_filler(query, key, lengths)
        query_end = key_end = lengths[:, None, None, None]
    rows, columns = _blocks(num_queries, num_keys, block_shape)
    query = _squares(query, rows * block_shape[0], stride)
    # the squares of a head as rows of a matrix; keys are reversed, being fewer
    key = _squares(key, columns * block_shape[1], stride)[:, :, ::-1]
    batch, num_squares, _, kv_heads, _ = key.shape
    key = reshape_stepwise(
        jnp.moveaxis(key, 3, 1), (batch, kv_heads, num_squares, stride * dim)
    )
    height, width = (side // stride for side in block_shape)
    group = heads // kv_heads

    def of_rows(first: int, last: int) -> jax.Array:
        """Of these block rows, and of the columns up to their last."""
        stop = columns
        if causal:
            stop = min(columns, -(-last * block_shape[0] // block_shape[1]))
        some = query[:, first * height : last * height]
        some = some.reshape(*some.shape[:3], kv_heads, group, dim)
        some = some.transpose(0, 3, 4, 1, 2, 5)
        num = group * (last - first)
        some = reshape_stepwise(some, (batch, kv_heads, num * height, stride * dim))
        sums = jnp.einsum(
            "bkni,bkmi->bknm",
            some,
            key[:, :, : stop * width],
            preferred_element_type=jnp.float32,
        )
        sums /= stride * dim**0.5
        row = jnp.tile(jnp.arange(first * height, last * height), group)
        row = row[None, None, :, None]
        column = jnp.arange(stop * width)[None, None, None]
        counted = stride * column < key_end
        if causal:
            counted &= column <= row
        weights = jax.nn.softmax(jnp.where(counted, sums, -jnp.inf), axis=-1)
        weights = jnp.where(stride * row < query_end, weights, 0)
        cells = (batch, kv_heads, num, height, stop, width)
        cells = reshape_stepwise(weights, cells).sum(axis=(3, 5))
        cells = reshape_stepwise(cells, (batch, heads, last - first, stop))
        return jnp.pad(cells, ((0, 0), (0, 0), (0, 0), (0, columns - stop)))

    size = -(-rows // (_CAUSAL_PARTS if causal else 1))
    parts = [of_rows(i, min(i + size, rows)) for i in range(0, rows, size)]
    visible, _ = in_sight(num_queries, num_keys, block_shape, causal, lengths)
    return jnp.where(visible, jnp.concatenate(parts, axis=2), -jnp.inf)


def sampled_importance(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    *,
    random_key: Key[Array, ""],
    block_shape: tuple[int, int],
    fraction: float = 0.25,
    causal: bool = False,
    lengths: ArrayLike | None = None,
) -> Float[Array, "batch heads block_rows block_columns"]:
    """Estimates the attention of blocks from a few of their queries and keys.

    Each head draws offsets once, the same in all blocks. The importance of a block is
    the highest weight among its samples, where a weight is a softmax over the sampled
    keys; rows are then divided by their sum. The released code leaves out the
    softmax's denominator, so that a query with one clear key counts less than it must.

    Args:
      query: rotated queries.
      key: rotated keys; `kv_heads` divides `heads`.
      random_key: for the draw; see `jax.random.key`.
      block_shape: `(height, width)`, queries and keys of a block.
      fraction: of a block to draw, in (0, 1]; at least one token. In a last block that
        is not whole the offsets wrap around.
      causal: key j is seen from query i if `j <= i`.
      lengths: see `antidiagonal_importance`.

    Returns:
      float32; -inf where causality hides a block whole, or all of it is filler. No
      gradient.

    Raises:
      ValueError: if shapes disagree, `fraction` is out of range, a block is longer than
        the sequence, or `lengths` are not integers in their range that fit.

    References:
      PSA, 2025, https://arxiv.org/abs/2512.04025, the code for video.
    """
    check_whole_blocks(query, key, block_shape)
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be in (0, 1]; got {fraction}.")
    lengths = prompt_lengths(query, key, lengths)
    query, key = jax.lax.stop_gradient((query, key))
    (num_queries, heads, dim), num_keys = query.shape[1:], key.shape[1]
    if lengths is not None:
        query, key = _without_filler(query, key, lengths)
    rows, columns = _blocks(num_queries, num_keys, block_shape)
    at_query = _draw(random_key, heads, num_queries, block_shape[0], fraction, lengths)
    # one draw for both where their blocks are alike
    at_key = _draw(random_key, heads, num_keys, block_shape[1], fraction, lengths)
    query = jnp.take_along_axis(jnp.moveaxis(query, 2, 1), at_query[..., None], axis=2)
    key = jnp.moveaxis(to_heads(key, heads), 2, 1)
    key = jnp.take_along_axis(key, at_key[..., None], axis=2)
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32
    )
    scores *= dim**-0.5
    at_query, at_key = at_query[..., None], at_key[..., None, :]
    seen = at_key <= at_query if causal else jnp.bool_(True)
    if lengths is not None:
        seen &= at_key < lengths[:, None, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0)  # 0 if none is
    height, width = weights.shape[2] // rows, weights.shape[3] // columns
    weights = reshape_stepwise(
        weights, (len(query), heads, rows, height, columns, width)
    )
    highest = weights.max(axis=(3, 5))
    total = highest.sum(axis=-1, keepdims=True)
    shares = highest / jnp.where(total > 0, total, 1)
    visible, _ = in_sight(num_queries, num_keys, block_shape, causal, lengths)
    return jnp.where(visible, shares, -jnp.inf)


def _blocks(num_queries: int, num_keys: int, block_shape: tuple[int, int]):
    return -(-num_queries // block_shape[0]), -(-num_keys // block_shape[1])


def _squares(x: jax.Array, length: int, stride: int) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
    return x.reshape(len(x), length // stride, stride, *x.shape[2:])


def _without_filler(
    query: jax.Array, key: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """With 0 for what comes after `lengths`."""

    def cut(x: jax.Array) -> jax.Array:
        real = jnp.arange(x.shape[1])[None] < lengths[:, None]
        return jnp.where(real[..., None, None], x, 0)

    return cut(query), cut(key)


def _draw(
    random_key,
    heads: int,
    length: int,
    block: int,
    fraction: float,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Sampled positions of each head, `[batch | 1, heads, blocks * samples]`."""
    samples = max(1, int(fraction * block))
    keys = jax.random.split(random_key, heads)
    offsets = jax.vmap(lambda key: jax.random.permutation(key, block))(keys)
    starts = np.arange(0, length, block)
    ends = np.array([length]) if lengths is None else lengths
    starts = starts[None, None, :, None]
    sizes = jnp.clip(ends[:, None, None, None] - starts, 1, block)
    at = starts + offsets[None, :, None, :samples] % sizes
    return jnp.reshape(at, (len(ends), heads, -1))

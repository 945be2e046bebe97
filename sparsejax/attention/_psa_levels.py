"""Which level each block of pyramid sparse attention has: importance, then quotas."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sparsejax.attention._arguments import check_heads
from sparsejax.attention._blocks import in_sight, to_heads

Bounds: TypeAlias = Sequence[tuple[int, float]]
"""Pairs of a level and a share in [0, 1], both ascending."""

# Of the rows of causal attention: earlier ones see fewer columns, and no others are
# computed.
_CAUSAL_PARTS = 4


def antidiagonal_importance(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    *,
    stride: int = 16,
    block_shape: tuple[int, int] = (128, 128),
    causal: bool = False,
) -> Float[Array, "batch heads block_rows block_columns"]:
    """Estimates the attention of blocks by the sums of their antidiagonals.

    Of each `stride x stride` square of scores the antidiagonal is summed: query
    `stride - 1 - i` with key `i`. A softmax of these, over all squares of a row, is
    summed in each block.

    Args:
      q: rotated queries.
      k: rotated keys; `kv_heads` divides `heads`.
      stride: side of a square; divides both sides of a block.
      block_shape: `(height, width)`, queries and keys of a block.
      causal: only squares at or before the queries' own count.

    Returns:
      float32; -inf where causality hides a block whole. No gradient. Tokens missing at
      the end add 0 to the sums of their squares.

    Raises:
      ValueError: if shapes disagree, `stride` does not divide, or a block is longer
        than the sequence.

    References:
      Xu et al., 2025, https://arxiv.org/abs/2503.16428 (XAttention), as it is used by
      the code of PSA, https://arxiv.org/abs/2512.04025, for language models.
    """
    check(q, k, block_shape)
    if stride < 1 or any(side % stride for side in block_shape):
        raise ValueError(
            f"`stride` must divide both sides of a block; got {stride} and "
            f"{block_shape}."
        )
    q, k = jax.lax.stop_gradient((q, k))
    (num_queries, heads, dim), num_keys = q.shape[1:], k.shape[1]
    rows, columns = _blocks(num_queries, num_keys, block_shape)
    q = _squares(q, rows * block_shape[0], stride)
    # the squares of a head as rows of a matrix; keys are reversed, being fewer
    k = _squares(k, columns * block_shape[1], stride)[:, :, ::-1]
    batch, num_squares, _, kv_heads, _ = k.shape
    k = jnp.moveaxis(k, 3, 1).reshape(batch, kv_heads, num_squares, -1)
    height, width = (side // stride for side in block_shape)

    def of_rows(first: int, last: int) -> jax.Array:
        """Of these block rows, and of the columns up to their last."""
        stop = columns
        if causal:
            stop = min(columns, -(-last * block_shape[0] // block_shape[1]))
        some = q[:, first * height : last * height]
        some = some.reshape(*some.shape[:3], kv_heads, -1, dim)
        some = some.transpose(0, 3, 4, 1, 2, 5).reshape(batch, kv_heads, -1, k.shape[3])
        sums = jnp.einsum(
            "bkni,bkmi->bknm",
            some,
            k[:, :, : stop * width],
            preferred_element_type=jnp.float32,
        )
        sums /= stride * dim**0.5
        row = jnp.tile(jnp.arange(first * height, last * height), heads // kv_heads)
        row, column = row[:, None], jnp.arange(stop * width)
        counted = stride * column < num_keys
        if causal:
            counted &= column <= row
        weights = jax.nn.softmax(jnp.where(counted, sums, -jnp.inf), axis=-1)
        weights = jnp.where(stride * row < num_queries, weights, 0)
        cells = weights.reshape(batch, kv_heads, -1, height, stop, width)
        cells = cells.sum(axis=(3, 5)).reshape(batch, heads, last - first, stop)
        return jnp.pad(cells, ((0, 0), (0, 0), (0, 0), (0, columns - stop)))

    size = -(-rows // (_CAUSAL_PARTS if causal else 1))
    parts = [of_rows(i, min(i + size, rows)) for i in range(0, rows, size)]
    visible, _ = in_sight(num_queries, num_keys, block_shape, causal)
    return jnp.where(visible, jnp.concatenate(parts, axis=2), -jnp.inf)


def sampled_importance(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    *,
    key: Key[Array, ""],
    block_shape: tuple[int, int],
    fraction: float = 0.25,
    causal: bool = False,
) -> Float[Array, "batch heads block_rows block_columns"]:
    """Estimates the attention of blocks from a few of their queries and keys.

    Each head draws offsets once, the same in all blocks. The importance of a block is
    the highest weight among its samples, where a weight is a softmax over the sampled
    keys; rows are then divided by their sum. The released code leaves out the
    softmax's denominator, so that a query with one clear key counts less than it must.

    Args:
      q: rotated queries.
      k: rotated keys; `kv_heads` divides `heads`.
      key: random key.
      block_shape: `(height, width)`, queries and keys of a block.
      fraction: of a block to draw, in (0, 1]; at least one token. In a last block that
        is not whole the offsets wrap around.
      causal: key j is seen from query i if `j <= i`.

    Returns:
      float32; -inf where causality hides a block whole. No gradient.

    Raises:
      ValueError: if shapes disagree, `fraction` is out of range, or a block is longer
        than the sequence.

    References:
      PSA, 2025, https://arxiv.org/abs/2512.04025, the code for video.
    """
    check(q, k, block_shape)
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be in (0, 1]; got {fraction}.")
    q, k = jax.lax.stop_gradient((q, k))
    (num_queries, heads, dim), num_keys = q.shape[1:], k.shape[1]
    rows, columns = _blocks(num_queries, num_keys, block_shape)
    at_query = _draw(key, heads, num_queries, block_shape[0], fraction)
    # one draw for both where their blocks are alike
    at_key = _draw(key, heads, num_keys, block_shape[1], fraction)
    of_head = jnp.arange(heads)[:, None]
    q = jnp.moveaxis(q, 2, 1)[:, of_head, at_query]
    k = jnp.moveaxis(to_heads(k, heads), 2, 1)[:, of_head, at_key]
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores *= dim**-0.5
    if causal:
        seen = at_key[:, None] <= at_query[:, :, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0)  # 0 if none is
    else:
        weights = jax.nn.softmax(scores, axis=-1)
    weights = weights.reshape(
        len(q), heads, rows, -1, columns, at_key.shape[1] // columns
    )
    highest = weights.max(axis=(3, 5))
    total = highest.sum(axis=-1, keepdims=True)
    shares = highest / jnp.where(total > 0, total, 1)
    visible, _ = in_sight(num_queries, num_keys, block_shape, causal)
    return jnp.where(visible, shares, -jnp.inf)


def quota_levels(
    importance: Float[Array, "*batch block_rows block_columns"],
    *,
    bounds: Bounds = ((1, 0.1), (2, 0.15), (4, 0.15), (8, 0.35)),
    full: Bool[Array, "*#batch block_rows block_columns"] | None = None,
) -> Int[Array, "*batch block_rows block_columns"]:
    """Gives levels by rank: the best tenth of a row is level 1, and so on.

    Args:
      importance: higher is finer; blocks of -inf are dropped and not counted. Of equal
        ones the one further left is finer.
      bounds: up to which share of a row's blocks a level reaches, rounded up; a level
        whose bound is that of the one before has no block.
      full: blocks that are at level 1 whatever their rank, unless they are at -inf.

    Returns:
      int32 levels, 0 where a block is dropped.

    Raises:
      ValueError: if `bounds` are no ascending levels and shares.

    Example:
      >>> print(quota_levels(jnp.arange(20.0)[None])[0])
      [0 0 0 0 0 0 0 0 0 0 0 0 0 8 8 8 8 2 1 1]

    References:
      PSA, 2025, https://arxiv.org/abs/2512.04025; the defaults of the released code. It
      rounds counts up further, to fill the tiles of its kernel.
    """
    _check_bounds("bounds", bounds)
    importance = jax.lax.stop_gradient(importance)
    _, rank = _ranked(importance)
    visible = importance > -jnp.inf
    num_visible = jnp.sum(visible, axis=-1, keepdims=True)
    levels = jnp.zeros(importance.shape, jnp.int32)
    for level, share in reversed(bounds):
        levels = jnp.where(rank < _count(share, num_visible), level, levels)
    return _with_full(levels, visible, full)


def mass_levels(
    importance: Float[Array, "*batch block_rows block_columns"],
    *,
    bounds: Bounds = ((1, 0.7), (2, 0.8), (4, 0.9), (8, 0.9)),
    min_full: float = 0.06,
    full: Bool[Array, "*#batch block_rows block_columns"] | None = None,
) -> Int[Array, "*batch block_rows block_columns"]:
    """Gives levels by cumulative importance: a block's own and that of all before it.

    Args:
      importance: not negative; blocks of -inf are dropped. See `quota_levels`.
      bounds: up to which share of a row's total a level reaches. The default is the
        paper's for a vision-language model.
      min_full: share of a row's blocks, rounded up, that are at level 1 in any case.
      full: see `quota_levels`.

    Returns:
      int32 levels, 0 where a block is dropped.

    Raises:
      ValueError: if `bounds` are no ascending levels and shares, or `min_full` is not
        in [0, 1].

    Example:
      >>> importance = jnp.array([[0.5, 0.28, 0.1, 0.07, 0.05]])
      >>> print(mass_levels(importance, bounds=((1, 0.6), (2, 0.8), (4, 0.9))))
      [[1 2 4 0 0]]

    References:
      PSA, 2025, https://arxiv.org/abs/2512.04025: `thresholdbound` of the released
      code.
    """
    _check_bounds("bounds", bounds)
    if not 0 <= min_full <= 1:
        raise ValueError(f"`min_full` must be in [0, 1]; got {min_full}.")
    importance = jax.lax.stop_gradient(importance)
    order, rank = _ranked(importance)
    visible = importance > -jnp.inf
    mass = jnp.where(visible, importance, 0).astype(jnp.float32)
    descending = jnp.take_along_axis(mass, order, axis=-1)
    total = descending.sum(axis=-1, keepdims=True)
    reached = jnp.cumsum(descending, axis=-1) / jnp.where(total > 0, total, 1)
    reached = jnp.take_along_axis(reached, rank, axis=-1)
    levels = jnp.zeros(importance.shape, jnp.int32)
    for level, share in reversed(bounds):
        levels = jnp.where(reached <= share + 1e-6, level, levels)
    num_visible = jnp.sum(visible, axis=-1, keepdims=True)
    levels = jnp.where(rank < _count(min_full, num_visible), 1, levels)
    return _with_full(levels, visible, full)


def pyramid_full_blocks(
    num_queries: int, num_keys: int, block_shape: tuple[int, int]
) -> Bool[Array, "block_rows block_columns"]:
    """Marks the first block of keys and those at the queries' own positions.

    These are at level 1 in the paper's language models: `full` of `quota_levels`.

    Args:
      num_queries: positions 0, 1, 2, ...
      num_keys: likewise.
      block_shape: `(height, width)`, queries and keys of a block.

    Returns:
      True where marked.

    Example:
      >>> print(pyramid_full_blocks(6, 6, (2, 2)).astype(int))
      [[1 0 0]
       [1 1 0]
       [1 0 1]]
    """
    _, diagonal = in_sight(num_queries, num_keys, block_shape, causal=True)
    return diagonal | (jnp.arange(diagonal.shape[1]) == 0)


def level_density(
    level_map: Int[Array, "*batch block_rows block_columns"],
) -> Float[Array, "*batch"]:
    """Computes the share of the products of dense attention that are computed.

    A block of level `h` counts as `1 / h`. Of all blocks, in sight or not: causal maps
    have at most about 1/2.

    Args:
      level_map: levels, 0 where a block is dropped.

    Returns:
      float32 in [0, 1].

    Example:
      >>> print(level_density(jnp.array([[1, 2, 4, 0]])))
      0.4375
    """
    shares = jnp.where(level_map > 0, 1 / jnp.maximum(level_map, 1), 0)
    return jnp.mean(shares, axis=(-2, -1), dtype=jnp.float32)


def check(q: Any, k: Any, block_shape: tuple[int, int]) -> None:
    """Raises unless queries and keys fit, and have a whole block."""
    check_heads(q, k, ("q", "k"))
    if (
        min(block_shape) < 1
        or block_shape[0] > q.shape[1]
        or block_shape[1] > k.shape[1]
    ):
        raise ValueError(
            f"`block_shape` must be at least 1 and at most {(q.shape[1], k.shape[1])}, "
            f"the lengths of the sequences; got {block_shape}. Choose smaller blocks."
        )


def _check_bounds(name: str, bounds: Bounds) -> None:
    levels, shares = [level for level, _ in bounds], [share for _, share in bounds]
    if (
        levels != sorted(set(levels))
        or shares != sorted(shares)
        or not all(level >= 1 for level in levels)
        or not all(0 <= share <= 1 for share in shares)
    ):
        raise ValueError(
            f"`{name}` must be pairs of a level, at least 1, and a share in [0, 1], "
            f"both ascending; got {bounds}."
        )


def _blocks(num_queries: int, num_keys: int, block_shape: tuple[int, int]):
    return -(-num_queries // block_shape[0]), -(-num_keys // block_shape[1])


def _squares(x: jax.Array, length: int, stride: int) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
    return x.reshape(len(x), length // stride, stride, *x.shape[2:])


def _draw(key, heads: int, length: int, block: int, fraction: float) -> jax.Array:
    """Sampled positions of each head, `[heads, blocks * samples]`, block by block."""
    samples = max(1, int(fraction * block))
    keys = jax.random.split(key, heads)
    offsets = jax.vmap(lambda key: jax.random.permutation(key, block))(keys)
    starts = np.arange(0, length, block)
    sizes = np.minimum(block, length - starts)
    offsets = offsets[:, None, :samples] % sizes[:, None]
    return jnp.reshape(starts[:, None] + offsets, (heads, -1))


def _ranked(importance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The blocks of each row from the best on, and the place of each among them."""
    order = jnp.argsort(-importance, axis=-1, stable=True)
    return order, jnp.argsort(order, axis=-1)


def _count(share: float, num_visible: jax.Array) -> jax.Array:
    return jnp.ceil(share * num_visible - 1e-4)  # 0.1 * 30 is above 3 in float32


def _with_full(levels, visible, full) -> jax.Array:
    if full is not None:
        levels = jnp.where(full, 1, levels)
    return jnp.where(visible, levels, 0)

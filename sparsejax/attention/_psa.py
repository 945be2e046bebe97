"""Pyramid sparse attention: blocks that matter less are read through pooled keys.

Each pair of a block of queries and a block of keys has a *level* `h`: it is read with
keys and values averaged over `h` neighbours, and not at all at level 0. `_psa_levels`
chooses levels, by what `_psa_importance` finds.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax import ops
from sparsejax.attention._arguments import check_tokens, check_whole_blocks
from sparsejax.attention._blocks import in_sight
from sparsejax.attention._density import share_in_sight
from sparsejax.formats import BlockMask

LEVELS = (1, 2, 4, 8)


def kv_pyramid(
    x: Float[Array, "batch seq kv_heads head_dim"],
    *,
    block: int,
    levels: Sequence[int] = LEVELS,
) -> tuple[jax.Array, ...]:
    """Averages keys or values over groups of `h` neighbours, for each level `h`.

    Args:
      x: keys, rotated if they are at all, or values.
      block: tokens of a block, which is never averaged across.
      levels: sizes of a group; each divides `block`.

    Returns:
      For each level `[batch, blocks * block / h, kv_heads, head_dim]`, in the dtype of
      `x`; means are float32. A group at the end is the mean of the tokens that it has
      (the paper repeats the last token, which moves the mean), one without any is 0.

    Raises:
      ValueError: if `x` has other axes, `block` is out of range or a level does not
        divide it.

    Example:
      >>> x = jnp.arange(6.0).reshape(1, 6, 1, 1)
      >>> for pooled in kv_pyramid(x, block=4, levels=(2, 4)):
      ...     print(pooled[0, :, 0, 0])
      [0.5 2.5 4.5 0. ]
      [1.5 4.5]
    """
    check_tokens("x", x)
    batch, length, *rest = x.shape
    check_levels(levels, block, length)
    whole = -(-length // block) * block
    padded = jnp.pad(x, ((0, 0), (0, whole - length), (0, 0), (0, 0)))

    def pool(h: int) -> jax.Array:
        if h == 1:
            return padded
        groups = padded.reshape(batch, whole // h, h, *rest)
        held = jnp.clip(length - h * jnp.arange(whole // h), 1, h).astype(jnp.float32)
        sums = groups.sum(axis=2, dtype=jnp.float32)
        return (sums / held[None, :, None, None]).astype(x.dtype)

    return tuple(map(pool, levels))


@overload
def pyramid_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    level_map: Int[Array, "#batch #heads block_rows block_columns"],
    *,
    block_shape: tuple[int, int],
    levels: Sequence[int] = LEVELS,
    causal: bool = False,
    scale: float | None = None,
    with_lse: Literal[False] = False,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "batch queries heads head_dim"]: ...


@overload
def pyramid_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    level_map: Int[Array, "#batch #heads block_rows block_columns"],
    *,
    block_shape: tuple[int, int],
    levels: Sequence[int] = LEVELS,
    causal: bool = False,
    scale: float | None = None,
    with_lse: Literal[True],
    implementation: ops.Implementation | None = None,
) -> tuple[
    Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]
]: ...


def pyramid_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    level_map: Int[Array, "#batch #heads block_rows block_columns"],
    *,
    block_shape: tuple[int, int],
    levels: Sequence[int] = LEVELS,
    causal: bool = False,
    scale: float | None = None,
    with_lse: bool = False,
    implementation: ops.Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention in which a block of level `h` has one key for each `h`.

    A pooled key stands for `h` keys, so `log(h)` is added to its score. The softmax is
    one, over all levels: the result is that of attention over keys and values replaced
    by the means of their groups, in blocks that are not dropped. Gradients are those
    of that, and reach each token by its share in its mean.

    A block that causality or the end of the keys cuts through is read at level 1, if it
    is kept: no query reads a mean that has a later token in it.

    Args:
      query: queries; bfloat16, float16 or float32.
      key: keys, of the dtype of `query`; `kv_heads` divides `heads`.
      value: values, like the keys.
      level_map: of each block, `[batch|1, heads|kv_heads|1, ..]`: one of `levels`, or
        0, as any other number, to drop it. May be traced; no gradient.
      block_shape: `(height, width)`, queries and keys of a block.
      levels: in use; 1 among them, and each divides the width. A map of ones alone
        gives dense attention.
      causal: key j is seen from query i if `j <= i`.
      scale: see `sj.ops.block_attention`.
      with_lse: return `(out, lse)`.
      implementation: see `sj.ops.block_attention`, which is called for each level.

    Returns:
      As `sj.ops.block_attention`. A query that sees no key gets 0.

    Raises:
      TypeError: if `level_map` is not of integers.
      ValueError: if shapes disagree, `levels` are out of range, or a sequence is
        shorter than a block.

    Example:
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
      >>> k = v = jnp.repeat(k[:, ::8], 8, axis=1)  # nothing is lost by a mean
      >>> coarse = jnp.full((1, 1, 2, 2), 8)
      >>> out = pyramid_attention(q, k, v, coarse, block_shape=(32, 32))
      >>> bool(jnp.allclose(out, sj.ops.block_attention(q, k, v), atol=1e-6))
      True

    References:
      PSA, 2025, https://arxiv.org/abs/2512.04025, and the code released with it. There
      a query may see a pooled key in the forward that its backward does not, in blocks
      on the diagonal; here these are at level 1.
    """
    height, width = block_shape
    check_whole_blocks(query, key, block_shape)
    level_map = _as_read(
        level_map, query.shape[1], key.shape[1], block_shape, levels, causal
    )
    coarse = tuple(sorted(set(levels) - {1}))
    keys_of, values_of = (
        (x, *kv_pyramid(x, block=width, levels=coarse)) for x in (key, value)
    )
    parts = []
    for h, keys, values in zip((1, *coarse), keys_of, values_of, strict=True):
        mask = BlockMask.from_blocks(level_map == h, (height, width // h))
        out, lse = ops.block_attention(
            query,
            keys,
            values,
            mask,
            causal=causal and h == 1,
            scale=scale,
            with_lse=True,
            implementation=implementation,
        )
        # equal within a level, the bias moves nothing there but the log-sum-exp
        parts.append((out, lse + math.log(h)))
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = ops.merge_attention(out, lse, *part)
    return (out, lse) if with_lse else out


def pyramid_density(
    level_map: Int[Array, "batch heads block_rows block_columns"],
    num_queries: int,
    *,
    block_shape: tuple[int, int],
    levels: Sequence[int] = LEVELS,
) -> Float[Array, "batch queries"]:
    """Computes the share of the keys in sight that causal pyramid attention reads.

    A key of a block that is read at level `h` counts `1 / h`; so that is a share of the
    work, and pooled keys stand for more of what is in sight.
    Blocks that are cut through are read at level 1. With levels 0 and 1 alone it is
    `causal_density` of the blocks that are kept.

    Args:
      level_map: see `pyramid_attention`, for as many keys as queries.
      num_queries: without the padding to whole blocks.
      block_shape: `(height, width)`, queries and keys of a block.
      levels: see `pyramid_attention`.

    Returns:
      float32, a mean over the heads of the map; query i has `i + 1` keys in sight.

    Raises:
      TypeError: if `level_map` is not of integers.
      ValueError: if `level_map` does not fit the queries, or `levels` are out of range.

    Example:
      >>> level_map = jnp.array([[[[1, 1, 1], [1, 1, 1], [2, 0, 1]]]])
      >>> density = pyramid_density(level_map, 6, block_shape=(2, 2), levels=(1, 2))
      >>> print(30 * density)
      [[30. 30. 30. 30. 12. 15.]]
    """
    level_map = _as_read(level_map, num_queries, num_queries, block_shape, levels, True)
    shares = jnp.where(level_map > 0, 1 / jnp.maximum(level_map, 1), 0)
    return share_in_sight(shares.mean(axis=1), block_shape, num_queries)


def check_levels(levels: Sequence[int], width: int, length: int | None = None) -> None:
    """Raises if a level is below 1 or does not divide the keys of a block.

    With `length`, the keys that there are, also if no block has so many.
    """
    for h in levels:
        if h < 1 or width % h:
            raise ValueError(
                f"each of `levels` must be at least 1 and divide the {width} keys of a "
                f"block; got {h}. Leave it out or choose other blocks."
            )
    if length is not None and not 1 <= width <= length:
        raise ValueError(
            f"`block` must be in [1, {length}], the length of the sequence; got "
            f"{width}. Choose smaller blocks, or attend to all of it."
        )


def _seen_whole(
    num_queries: int, num_keys: int, block_shape: tuple[int, int], causal: bool
) -> jax.Array:
    """Which blocks are not cut through, `[1, 1, block_rows | 1, block_columns]`."""
    height, width = block_shape
    last_key = width * (1 + jnp.arange(-(-num_keys // width))) - 1
    last_key = last_key[None, None, None]
    whole = last_key < num_keys
    if not causal:
        return whole
    first_query = height * jnp.arange(-(-num_queries // height))[None, None, :, None]
    return whole & (last_key <= first_query)


def _as_read(
    level_map: Any,
    num_queries: int,
    num_keys: int,
    block_shape: tuple[int, int],
    levels: Sequence[int],
    causal: bool,
) -> jax.Array:
    """The levels at which blocks are read: 0 out of sight, 1 where cut through."""
    level_map = jnp.asarray(level_map)
    if not jnp.issubdtype(level_map.dtype, jnp.integer):
        raise TypeError(
            f"`level_map` must be of integers; got {jax.typeof(level_map)}."
        )
    height, width = block_shape
    blocks = (-(-num_queries // height), -(-num_keys // width))
    if level_map.ndim != 4 or level_map.shape[2:] != blocks:
        raise ValueError(
            "`level_map` must have one number for each block, [batch|1, "
            f"heads|kv_heads|1, {blocks[0]}, {blocks[1]}]; got {level_map.shape}."
        )
    check_levels(levels, width)
    if 1 not in levels:
        raise ValueError(
            f"`levels` must have 1, for blocks that are cut through; got {levels}."
        )
    seen, _ = in_sight(num_queries, num_keys, block_shape, causal)
    seen_whole = _seen_whole(num_queries, num_keys, block_shape, causal)
    kept = seen & jnp.isin(level_map, jnp.array(levels))
    return jnp.where(kept, jnp.where(seen_whole, level_map, 1), 0)

"""How coarsely a block of keys may be read: as far as its neighbours are alike."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.attention._arguments import check_tokens
from sparsejax.attention._psa import check_levels


def similarity_cap(
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    block: int,
    thresholds: Sequence[tuple[int, float]] = ((2, 0.75), (4, 0.7), (8, 0.7)),
) -> Int[Array, "batch kv_heads blocks"]:
    """Finds the highest level at which the keys of each block are similar enough.

    A mean stands for its group well if the group's first and last key point the same
    way: level `h` is allowed where the mean of their cosines, over the groups of `h`
    keys in the block, exceeds its threshold. No other level need be allowed for it.

    Levels of blocks, as from `quota_levels`, are capped by
    `jnp.minimum(level_map, cap[:, :, None])`: 0 stays 0. For levels of each query head
    repeat the cap, `jnp.repeat(cap, group, axis=1)`.

    Args:
      key: rotated keys, if they are at all.
      block: keys of a block, in `[1, seq]`.
      thresholds: levels above 1, each of which divides `block`, and what the mean
        cosine must exceed. The default is the paper's for a vision-language model; it
        has 0.7, 0.65 and 0.6 for video.

    Returns:
      int32, a level of `thresholds`, or 1. Groups that the end of the sequence cuts do
      not count, and a key of zeros has a cosine of 0 with any other. No gradient.

    Raises:
      ValueError: if `key` has other axes, `block` is out of range, or a level does not
        divide it.

    Example:
      >>> key = jnp.array([[1.0, 0], [1, 0], [0, 1], [0, 1]]).reshape(1, 4, 1, 2)
      >>> thresholds = ((2, 0.5), (4, 0.5))  # neighbours are alike, the ends are not
      >>> print(similarity_cap(key, block=4, thresholds=thresholds)[0])
      [[2]]

    References:
      PSA, 2025, https://arxiv.org/abs/2512.04025: an option of the released code.
    """
    check_tokens("key", key)
    levels = [level for level, _ in thresholds]
    batch, length, heads, dim = key.shape
    check_levels(levels, block, length)
    if min(levels, default=2) < 2:
        raise ValueError(f"`thresholds` must be of levels above 1; got {thresholds}.")
    key = jax.lax.stop_gradient(key).astype(jnp.float32)
    norm = jnp.linalg.norm(key, axis=-1, keepdims=True)
    key = key / jnp.where(norm > 0, norm, 1)
    blocks = -(-length // block)
    key = jnp.pad(key, ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    cap = jnp.ones((batch, heads, blocks), jnp.int32)
    for level, least in sorted(thresholds):
        groups = key.reshape(batch, blocks, block // level, level, heads, dim)
        cosines = jnp.sum(groups[:, :, :, 0] * groups[:, :, :, -1], axis=-1)
        last = level * (1 + jnp.arange(blocks * block // level)) - 1
        whole = (last < length).reshape(1, blocks, block // level, 1)
        num = jnp.sum(whole, axis=2, dtype=jnp.float32)
        mean = jnp.sum(jnp.where(whole, cosines, 0), axis=2) / jnp.maximum(num, 1)
        alike = ((mean > least) & (num > 0)).swapaxes(1, 2)
        cap = jnp.where(alike, level, cap)
    return cap

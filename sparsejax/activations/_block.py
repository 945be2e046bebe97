"""The statistical top-k of tiles: whole tiles of neurons survive or not."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparsejax import ops
from sparsejax._ints import check_int
from sparsejax._promotion import common_dtype
from sparsejax.activations import _arguments


def block_statistical_topk(
    x: Float[Array, "*shape"],
    k: ArrayLike,
    block: int,
    *,
    axis: int = -1,
    pool: Literal["max", "mean"] = "max",
    where: Bool[Array, "..."] | None = None,
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """Keeps whole tiles of `block` neurons, about `k` neurons in them.

    Scattered survivors leave almost every tile of a matrix unit with work to do; this
    operator picks tiles instead. A tile's score is the largest or the mean entry in
    it; theta is the statistical threshold of the scores, for `k / block` expected
    tiles; a tile is kept if its score exceeds theta. In kept tiles the values are
    `max(x - theta, 0)`, elsewhere 0. With `block=1` it is `statistical_topk`.

    Args:
      x: any floating dtype; statistics are float32 (float64 for float64).
      k: expected number of neurons in kept tiles, at least `block`; a Python number, or
        a traced scalar, whose value is not checked. From the number of entries on, the
        row is returned unchanged.
      block: neurons in a tile; it divides the length of `axis`.
      axis: the axis that a row lies along.
      pool: "max" or "mean". Few values of a kept tile exceed a threshold of maxima:
        with tiles of 32 Gaussian entries, 8 % of them kept, 0.3 % of all values are
        not 0, with means 4 %.
      where: True = counts, broadcastable to `x`. Scores pool the True entries of a
        tile, a tile without any does not count, False entries give 0 and are not in the
        mask. A row of at most `k` True entries keeps them all, unchanged.

    Returns:
      The values, and the elementwise mask: True in kept tiles, also where the value
      is 0. A row with a NaN is kept whole and NaN.

    Raises:
      TypeError: if `x` is not floating, `where` is not bool, or `k`, `block` or `axis`
        is not a number of the right kind.
      ValueError: if `block` does not divide the axis, `k` is less than `block`, or
        another argument is out of range.

    Example:
      >>> values, mask = block_statistical_topk(jnp.arange(8.0), 2, 2)
      >>> mask
      Array([False, False, False, False, False, False,  True,  True], dtype=bool)

    References:
      Ours: the statistical top-k of You et al., 2025,
      https://arxiv.org/abs/2506.06644, section 3, on pooled scores. Maxima of Gaussian
      entries are skewed, so that the number of kept tiles is somewhat off k / block.
    """
    x = _arguments.check_values(x, axis)
    check_int("block", block)
    if block < 1 or x.shape[axis] % block:
        raise ValueError(
            f"`block` must divide the length of the axis; got block={block} for axis "
            f"{axis} of shape {x.shape}. Pad it or choose another block."
        )
    if pool not in ("max", "mean"):
        raise ValueError(f"`pool` must be 'max' or 'mean'; got {pool!r}.")
    k = _arguments.check_k(k, at_least=block)
    where = _arguments.check_where(where, x)

    rows = jnp.moveaxis(x, axis, -1)
    valid = None
    if where is not None:
        valid = jnp.broadcast_to(jnp.moveaxis(where, axis, -1), rows.shape)
        rows = jnp.where(valid, rows, 0)
    num = ops.num_entries(rows, where=valid)
    everything = jnp.ones(rows.shape, jnp.bool_) if valid is None else valid
    scores, used = _pooled(rows, valid, block, pool)
    # k / block tiles of num / block: the share, and so the quantile, is that of k
    z = _arguments.quantile(k, num, 0, dtype=x.dtype)
    theta = ops.gaussian_threshold(scores, z, where=used)
    # not `scores > theta`: a NaN is to be seen in the values, not to become 0
    kept = ~(scores <= theta)
    mask = jnp.broadcast_to(kept[..., None], (*kept.shape, block)).reshape(rows.shape)
    mask = mask & everything
    unchanged = theta == -jnp.inf
    dtype = common_dtype(x.dtype, jnp.float32)
    # an infinite difference would make the gradient of an unchanged row NaN
    excess = rows.astype(dtype) - jnp.where(unchanged, 0, theta).astype(dtype)
    values = jnp.where(mask, jax.nn.relu(excess).astype(x.dtype), 0)
    values = jnp.where(unchanged, rows, values)
    mask = jnp.where(unchanged, everything, mask)
    return jnp.moveaxis(values, -1, axis), jnp.moveaxis(mask, -1, axis)


def _pooled(rows, valid, block, pool) -> tuple[jax.Array, jax.Array | None]:
    """The score of each tile in `rows.dtype`, and which tiles have an entry."""
    tiles = rows.reshape(*rows.shape[:-1], rows.shape[-1] // block, block)
    dtype = common_dtype(rows.dtype, jnp.float32)
    if valid is None:
        if pool == "max":
            return jnp.max(tiles, axis=-1), None
        return jnp.mean(tiles, axis=-1, dtype=dtype).astype(rows.dtype), None
    valid = valid.reshape(tiles.shape)
    used = jnp.any(valid, axis=-1)
    if pool == "mean":  # the entries that do not count are 0
        count = jnp.maximum(jnp.sum(valid, axis=-1), 1)
        total = jnp.sum(tiles, axis=-1, dtype=dtype)
        return (total / count).astype(rows.dtype), used
    scores = jnp.max(jnp.where(valid, tiles, -jnp.inf), axis=-1)
    return jnp.where(used, scores, 0), used

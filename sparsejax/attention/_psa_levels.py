"""Which level each block of pyramid sparse attention has, by its importance."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.attention._blocks import in_sight

Bounds: TypeAlias = Sequence[tuple[int, float]]
"""Pairs of a level and a share in [0, 1], both ascending."""


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
    first = jnp.arange(diagonal.shape[-1])[None] == 0
    return diagonal[0, 0] | first


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


def _ranked(importance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The blocks of each row from the best on, and the place of each among them."""
    order = jnp.argsort(-importance, axis=-1, stable=True)
    return order, jnp.argsort(order, axis=-1)


def _count(share: float, num_visible: jax.Array) -> jax.Array:
    wanted = share * num_visible.astype(jnp.float32)
    # 0.1 * 30 is above 3 in float32
    return jnp.ceil(wanted - 1e-4).astype(num_visible.dtype)


def _with_full(levels, visible, full) -> jax.Array:
    if full is not None:
        levels = jnp.where(full, 1, levels)
    return jnp.where(visible, levels, 0)

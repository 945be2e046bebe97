"""From scores to masks under any pattern: selection, and drop-and-grow.

Both work on flat lists with one entry a leaf, as `patterns.governed` gives them, so
that they never meet the node types of a user's tree.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparsejax._promotion import common_dtype
from sparsejax.masks._nm import nm_select
from sparsejax.masks._order import ordered_keys
from sparsejax.masks._topk import topk_of_keys
from sparsejax.masks._units import expand, kept_units, pool
from sparsejax.patterns import NM, Leaf


def num_kept(sparsity: ArrayLike, size: int) -> int | jax.Array:
    """How many of `size` units stay at a sparsity: `size - round(sparsity * size)`.

    The one place where a fraction becomes a count. At least one unit stays. A Python
    float counts in double precision. A traced one is float32, whose rounding may make
    it one unit more or less from about 2**20 units on, and some above 2**24.

    Args:
      sparsity: share of zeros, clipped to [0, 1].
      size: number of units of one layer.

    Returns:
      A Python int for a Python number, else int32.

    Example:
      >>> num_kept(0.9, 7)
      1
    """
    if isinstance(sparsity, int | float):
        dropped = round(min(max(sparsity, 0), 1) * size)
        return max(size - dropped, min(size, 1))
    dropped = jnp.round(jnp.clip(sparsity, 0, 1).astype(jnp.float32) * size)
    return jnp.maximum(size - dropped.astype(jnp.int32), min(size, 1))


def layer_units(leaf: Leaf) -> int:
    """Units of one layer: of one index of the stacked axes."""
    return math.prod(leaf.unit_shape[leaf.stacked :])


def select(scores: jax.Array, leaf: Leaf, sparsity: ArrayLike | None) -> jax.Array:
    """Keeps the units of highest score of one leaf, layer by layer.

    Args:
      scores: float, of the leaf's shape; NaN ranks lowest.
      leaf: its pattern and stacked axes.
      sparsity: share of zeros; not read where the pattern fixes it.

    Returns:
      An elementwise mask of the same shape; ties go to the lower index.

    Example:
      >>> leaf = sj.patterns.Leaf("kernel", (1, 4), sj.Block((1, 2)), stacked=0)
      >>> select(jnp.array([[1.0, 1.0, 9.0, 0.0]]), leaf, 0.5)
      Array([[False, False,  True,  True]], dtype=bool)
    """
    scores = jax.lax.stop_gradient(scores)
    if isinstance(leaf.pattern, NM):
        n, m = leaf.pattern.n, leaf.pattern.m
        return nm_select(scores, n, n, m, leaf.pattern.axis)
    assert sparsity is not None
    count = num_kept(sparsity, layer_units(leaf))
    return expand(_top_units(pool(scores, leaf), leaf, count), leaf, scores)


def is_made_of(mask: jax.Array, leaf: Leaf) -> jax.Array:
    """Whether a mask follows its leaf's pattern: units whole, groups of `n`.

    Args:
      mask: bool, of the leaf's shape.
      leaf: its pattern and stacked axes.

    Returns:
      bool scalar.

    Example:
      >>> leaf = sj.patterns.Leaf("kernel", (1, 4), sj.Block((1, 2)), stacked=0)
      >>> bool(is_made_of(jnp.array([[True, True, False, True]]), leaf))
      False
    """
    mask = jnp.asarray(mask)
    if leaf.pattern.sparsity is not None:
        made = select(mask.astype(jnp.float32), leaf, None)
    else:
        made = expand(kept_units(mask, leaf), leaf, mask)
    return jnp.all(made == mask)


def select_across(
    scores: Sequence[jax.Array | None],
    leaves: Sequence[Leaf | None],
    sparsity: ArrayLike,
) -> list[jax.Array | None]:
    """Keeps the highest scores of all governed leaves, ranked together.

    Args:
      scores: float arrays; read where the leaf is governed.
      leaves: as from `patterns.governed`, all under `Unstructured`.
      sparsity: share of zeros of all governed weights.

    Returns:
      A mask for each governed leaf, else None.

    Example:
      >>> leaf = sj.patterns.Leaf("kernel", (2,), sj.Unstructured(), stacked=0)
      >>> scores = [jnp.array([1.0, 4.0]), None, jnp.array([3.0, 2.0])]
      >>> found = select_across(scores, [leaf, None, leaf], 0.5)
      >>> print(found[0], found[1], found[2])
      [False  True] None [ True False]
    """
    indices = [i for i, leaf in enumerate(leaves) if leaf is not None]
    chosen = [jax.lax.stop_gradient(jnp.asarray(scores[i])) for i in indices]
    dtype = common_dtype(*(score.dtype for score in chosen))
    count = num_kept(sparsity, sum(score.size for score in chosen))
    keys = [ordered_keys(score.astype(dtype)) for score in chosen]
    found = dict(zip(indices, topk_of_keys(keys, count, stacked=0), strict=True))
    return [found.get(i) for i in range(len(leaves))]


def drop_and_grow(
    mask: jax.Array,
    leaf: Leaf,
    *,
    drop_scores: jax.Array,
    grow_scores: jax.Array,
    sparsity: ArrayLike | None,
    drop_fraction: ArrayLike,
) -> jax.Array:
    """Replaces the weakest kept units of one leaf by the best of all others.

    Of `k` kept units the `floor(drop_fraction * k)` lowest by `drop_scores` are
    dropped; then as many as the sparsity asks for are grown by `grow_scores` from all
    units that are not kept, those just dropped included. Under N:M a group grows to
    N, whatever it had.

    Args:
      mask: bool, of the leaf's shape.
      leaf: its pattern and stacked axes.
      drop_scores: float, like `mask`; higher stays. NaN is dropped first.
      grow_scores: float, like `mask`; higher grows. NaN grows last.
      sparsity: share of zeros afterwards; not read where the pattern fixes it.
      drop_fraction: share of the kept units to drop, in [0, 1]. The product with the
        count is taken in float32: above 2**21 units it may be off by one.

    Returns:
      The new mask; its count follows from `sparsity` alone.

    Example:
      >>> leaf = sj.patterns.Leaf("kernel", (4,), sj.Unstructured(), stacked=0)
      >>> print(drop_and_grow(
      ...     jnp.array([True, True, False, False]), leaf,
      ...     drop_scores=jnp.array([2.0, 1.0, 0.0, 0.0]),
      ...     grow_scores=jnp.array([0.0, 1.0, 2.0, 5.0]),
      ...     sparsity=0.5, drop_fraction=0.5,
      ... ))
      [ True False False  True]

    References:
      Evci et al., 2020, https://arxiv.org/abs/1911.11134, section 3; the released code
      adds noise to break ties, here the lower index wins.
    """
    active = kept_units(mask, leaf)
    axes = tuple(range(leaf.stacked, active.ndim))
    if isinstance(leaf.pattern, NM):
        # a state of another N:M may keep more of a group
        most = jnp.minimum(_in_groups(active, leaf.pattern), leaf.pattern.n)
        active = _select_in_groups(drop_scores, most, leaf.pattern, among=active)
    num_active = jnp.sum(active, axis=axes, dtype=jnp.int32)
    if leaf.pattern.sparsity is not None:
        target = num_active
    else:
        assert sparsity is not None
        target = jnp.asarray(num_kept(sparsity, layer_units(leaf)), jnp.int32)
    stay = jnp.minimum(num_active, target)
    # the nudge undoes float32 rounding, so that 0.3 of 10 is 3
    share = stay.astype(jnp.float32) * jnp.asarray(drop_fraction, jnp.float32)
    dropped = jnp.floor(share * (1 + 2.0**-21))
    stay -= jnp.minimum(dropped.astype(jnp.int32), stay)
    keep = _top_units(pool(drop_scores, leaf), leaf, stay, among=active)
    grow_scores = pool(grow_scores, leaf)
    if isinstance(leaf.pattern, NM):
        free = leaf.pattern.n - _in_groups(keep, leaf.pattern)
        grown = _select_in_groups(grow_scores, free, leaf.pattern, among=~keep)
    else:
        grown = _top_units(grow_scores, leaf, target - stay, among=~keep)
    return expand(keep | grown, leaf, drop_scores)


def _in_groups(kept: jax.Array, pattern: NM) -> jax.Array:
    """How many of each N:M group."""
    axis, m = pattern.axis % kept.ndim, pattern.m
    shape = (*kept.shape[:axis], kept.shape[axis] // m, m, *kept.shape[axis + 1 :])
    return jnp.sum(kept.reshape(shape), axis=axis + 1, dtype=jnp.int32)


def _select_in_groups(
    scores: jax.Array, counts: jax.Array, pattern: NM, among: jax.Array
) -> jax.Array:
    axis = pattern.axis % scores.ndim
    return nm_select(scores, counts, pattern.n, pattern.m, axis, among=among)


def _top_units(
    units: jax.Array,
    leaf: Leaf,
    count: ArrayLike,
    among: jax.Array | None = None,
) -> jax.Array:
    keys = ordered_keys(units, among)
    return topk_of_keys([keys], count, stacked=leaf.stacked)[0]

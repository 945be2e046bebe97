"""Trees of masks. The one place that knows what `None` in a mask tree means."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax._names import check_order, names_of
from sparsejax.typing import MaskTree, Params, is_none


def map_masked(fn: Callable[..., Any], masks: MaskTree, *trees: Any) -> Any:
    """Maps `fn(mask, *leaves)` over the governed leaves; the others pass through.

    Trees align by the order of their leaves, not by their node types, so masks from an
    `nnx.Optimizer` fit a plain dict.

    Args:
      fn: called with a mask and the leaf of each tree.
      masks: a mask tree; where it is None, the leaf of the first tree is returned.
      *trees: at least one tree with as many leaves as `masks`, None counted.

    Returns:
      A tree of the first tree's structure.

    Raises:
      ValueError: if the trees have different numbers of leaves.

    Example:
      >>> masks = {"a": jnp.array([True, False]), "b": None}
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": 3.0}
      >>> map_masked(lambda m, p: jnp.where(m, p, -p), masks, params)
      {'a': Array([ 1., -2.], dtype=float32), 'b': 3.0}
    """
    flat_masks = jax.tree.leaves(masks, is_leaf=is_none)
    first, treedef = jax.tree.flatten(trees[0], is_leaf=is_none)
    columns = [first, *(jax.tree.leaves(tree, is_leaf=is_none) for tree in trees[1:])]
    if sizes := {len(column) for column in columns if len(column) != len(flat_masks)}:
        raise ValueError(
            "masks must mirror the params; got masks with "
            f"{len(flat_masks)} leaves for a tree with {sizes.pop()}. Make both from "
            "the same params."
        )
    return treedef.unflatten(
        [
            row[0] if mask is None or row[0] is None else fn(mask, *row)
            for mask, *row in zip(flat_masks, *columns, strict=True)
        ]
    )


def apply_masks(params: Params, masks: MaskTree) -> Params:
    """Sets pruned weights to exactly zero.

    Args:
      params: a tree of arrays.
      masks: its mask tree; leaves with None stay as they are.

    Returns:
      Params of the same structure, shapes and dtypes. A pruned NaN becomes 0 too.

    Raises:
      ValueError: if the trees have different numbers of leaves, the same names in
        another order, or a mask has not the shape of its leaf (which may have further
        axes in front).
      TypeError: if a mask is not bool.

    Example:
      >>> apply_masks({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([True, False])})
      {'a': Array([1., 0.], dtype=float32)}
    """
    check_masks(masks, params)

    def apply(mask, param):
        # a scalar zero: `zeros_like` loses the sharding of an array that a trace closes
        # over
        return jnp.where(mask, param, jnp.zeros([], jnp.result_type(param)))

    return map_masked(apply, masks, params)


def check_masks(masks: MaskTree, params: Params) -> None:
    """Raises unless masks fit the leaves that they are of; the others may be anything.

    Args:
      masks: a mask tree.
      params: a tree with as many leaves; arrays where there is a mask.

    Raises:
      ValueError: as `apply_masks`.
      TypeError: likewise.

    Example:
      >>> check_masks({"a": jnp.array([True, False]), "f": None},
      ...             {"a": jnp.ones(2), "f": "relu"})
    """
    map_masked(lambda mask, leaf: leaf, masks, params)  # counts the leaves
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]
    flat_masks = jax.tree.leaves(masks, is_leaf=is_none)
    # places in a flat list, in which methods keep their masks, name no leaves
    if not jax.tree_util.all_leaves(masks if isinstance(masks, list) else [masks]):
        named = jax.tree_util.tree_flatten_with_path(masks, is_leaf=is_none)[0]
        check_order(names_of(named), names_of(flat), "the masks and the params")
    for (path, param), mask in zip(flat, flat_masks, strict=True):
        if mask is None or param is None:
            continue
        dtype, shape, own = jnp.result_type(mask), jnp.shape(mask), jnp.shape(param)
        if dtype != jnp.bool_:
            raise TypeError(
                f"masks must be bool, True = kept; got {dtype} at "
                f"{jax.tree_util.keystr(path)}. The params are the first argument, the "
                "masks the second."
            )
        if own[max(len(own) - len(shape), 0) :] != shape:
            raise ValueError(
                f"a mask must have the shape of its leaf; got {shape} for shape {own} "
                f"at {jax.tree_util.keystr(path)}. Make the masks from these params."
            )

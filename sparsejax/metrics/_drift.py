"""How far two sets of masks lie apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from sparsejax.metrics._aligned import map_aligned
from sparsejax.typing import MaskTree


def sad(masks_a: MaskTree, masks_b: MaskTree) -> Int32[Array, ""]:
    """Sparse architecture divergence: how many weights changed their status.

    Between consecutive steps it is the flip rate, against the first mask the drift. A
    swap counts 2: one weight is dropped, one is grown.

    Args:
      masks_a: bool arrays, True = kept; None leaves are skipped.
      masks_b: as many masks of the same shapes. Trees align by the order of their
        leaves, not by their node types.

    Returns:
      The number of differing entries over all leaves, below 2**31.

    Raises:
      ValueError: if the trees do not align, naming the leaf.
      TypeError: if a mask is not bool.

    Example:
      >>> before = {"a": jnp.array([True, False, False]), "b": None}
      >>> after = {"a": jnp.array([False, False, True]), "b": None}
      >>> int(sad(before, after))
      2

    References:
      Zhou et al., 2021, https://arxiv.org/abs/2102.04010, section 3.
    """
    changed = _map_changed(lambda count, size: count, masks_a, masks_b)
    return sum(jax.tree.leaves(changed), jnp.zeros([], jnp.int32))


def mask_drift(masks_a: MaskTree, masks_b: MaskTree) -> MaskTree:
    """The share of each leaf's weights that changed their status: `sad` per leaf.

    Args:
      masks_a: bool arrays, True = kept; None stays None.
      masks_b: as many masks of the same shapes, aligned by the order of their leaves.

    Returns:
      A tree like `masks_a` of float32 scalars in [0, 1]; 0 for an empty leaf.

    Raises:
      ValueError: if the trees do not align, naming the leaf.
      TypeError: if a mask is not bool.

    Example:
      >>> before = {"a": jnp.array([True, False, False, False]), "b": None}
      >>> after = {"a": jnp.array([False, False, True, False]), "b": None}
      >>> mask_drift(before, after)
      {'a': Array(0.5, dtype=float32), 'b': None}
    """
    return _map_changed(
        lambda count, size: count.astype(jnp.float32) / jnp.float32(max(size, 1)),
        masks_a,
        masks_b,
    )


def _map_changed(
    fn: Callable[[jax.Array, int], jax.Array], masks_a: MaskTree, masks_b: MaskTree
) -> Any:
    """Maps `fn(changed entries, all entries)` over the leaves."""
    for masks in (masks_a, masks_b):
        for path, mask in jax.tree_util.tree_leaves_with_path(masks):
            if jnp.result_type(mask) != jnp.bool_:  # packed ones have other shapes too
                raise TypeError(
                    f"masks must be bool, True = kept; got {jnp.result_type(mask)} at "
                    f"{jax.tree_util.keystr(path)}. Read those of an optimizer state "
                    "by `masks_of`."
                )
    return map_aligned(
        lambda path, a, b: fn(jnp.sum(a != b, dtype=jnp.int32), a.size),
        masks_a,
        masks_b,
        ("masks_a", "masks_b"),
    )

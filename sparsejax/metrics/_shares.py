"""Shares of a whole mask tree, traced or not: what a loop logs at every step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from sparsejax import masks as masks_lib
from sparsejax.typing import MaskTree, Params, is_none, plain_path


class LeafMetrics(NamedTuple):
    """Shares of one leaf, fractions in [0, 1]."""

    sparsity: float  # of zeros in the mask
    pruned_magnitude: float  # of the weights' L1 norm, outside the mask


def mask_sparsity(masks: MaskTree) -> Float32[Array, ""]:
    """The share of zeros over all masks; 0 where there is no mask.

    `sparsity_report` counts without rounding, on the host; this one works under jit.

    Args:
      masks: bool arrays, True = kept; None leaves are skipped.

    Returns:
      A fraction of all governed weights, not a mean over leaves.

    Example:
      >>> float(mask_sparsity({"a": jnp.array([True, False]), "b": None}))
      0.5
    """
    return 1 - kept_share(masks)


def leaf_metrics(masks: MaskTree, weights: Params) -> dict[str, LeafMetrics]:
    """How sparse each governed leaf is, and how much it would lose by its mask.

    A soft method has to bring `pruned_magnitude` to 0 before the hard prune.

    Args:
      masks: True = kept, None = not governed; or a tree without leaves.
      weights: those of the forward, with the same leaves in the same order.

    Returns:
      The shares by the dotted name of the leaf; empty where nothing is governed.

    Raises:
      ValueError: if the trees do not align, as in `apply_masks`.
      TypeError: if a mask is not bool.

    Example:
      >>> masks = {"kernel": jnp.array([True, True, True, False])}
      >>> leaf_metrics(masks, {"kernel": jnp.array([2.0, 1.0, 4.0, 1.0])})
      {'kernel': LeafMetrics(sparsity=0.25, pruned_magnitude=0.125)}
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(masks, is_leaf=is_none)
    if not flat:
        return {}
    masks_lib.check_masks(masks, weights)
    leaves = jax.tree.leaves(weights, is_leaf=is_none)
    found = {}
    for (path, mask), weight in zip(flat, leaves, strict=True):
        if mask is not None:
            size = jnp.abs(weight).astype(jnp.float32)  # float16 ends at 65504
            norm, outside = jnp.sum(size), jnp.sum(size, where=~mask)
            found[".".join(plain_path(path))] = LeafMetrics(
                float(mask_sparsity(mask)),
                float(jnp.where(norm > 0, outside / norm, 0)),
            )
    return found


def kept_share(masks: MaskTree) -> jax.Array:
    """The share of True over all masks, float32; 1 where there is no entry."""
    leaves = jax.tree.leaves(masks)
    size = sum(leaf.size for leaf in leaves)
    if not size:
        return jnp.ones([], jnp.float32)
    # integers within a leaf, floats across leaves: these may pass 2**31
    counts = [jnp.sum(leaf, dtype=jnp.int32).astype(jnp.float32) for leaf in leaves]
    return sum(counts, jnp.zeros([], jnp.float32)) / jnp.float32(size)

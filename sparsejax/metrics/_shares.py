"""Shares of a whole mask tree, traced or not: what a loop logs at every step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from sparsejax.typing import MaskTree, Params, is_none, plain_path


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


def leaf_metrics(masks: MaskTree, weights: Params) -> dict[str, dict[str, float]]:
    """What `training.draw_report` shows of each governed leaf.

    Args:
      masks: True = kept, None = not governed; or a tree without leaves.
      weights: those of the forward, with the same leaves in the same order.

    Returns:
      By the dotted name of the leaf, `leaf_sparsity`: the share of zeros in the mask,
      and `leaf_pruned_magnitude`: the share of the weights' L1 norm that lies outside
      the mask, which a soft method has to bring to 0 before the hard prune.

    Example:
      >>> masks = {"kernel": jnp.array([True, True, True, False])}
      >>> leaf_metrics(masks, {"kernel": jnp.array([2.0, 1.0, 4.0, 1.0])})
      {'leaf_sparsity': {'kernel': 0.25}, 'leaf_pruned_magnitude': {'kernel': 0.125}}
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(masks, is_leaf=is_none)
    leaves = jax.tree.leaves(weights, is_leaf=is_none) if flat else []
    sparsity, magnitude = {}, {}
    for (path, mask), weight in zip(flat, leaves, strict=True):
        if mask is not None:
            name = ".".join(plain_path(path))
            sparsity[name] = float(mask_sparsity(mask))
            size = jnp.abs(weight).astype(jnp.float32)  # float16 ends at 65504
            norm, outside = jnp.sum(size), jnp.sum(size, where=~mask)
            magnitude[name] = float(jnp.where(norm > 0, outside / norm, 0))
    return {"leaf_sparsity": sparsity, "leaf_pruned_magnitude": magnitude}


def kept_share(masks: MaskTree) -> jax.Array:
    """The share of True over all masks, float32; 1 where there is no entry."""
    leaves = jax.tree.leaves(masks)
    size = sum(leaf.size for leaf in leaves)
    if not size:
        return jnp.ones([], jnp.float32)
    # integers within a leaf, floats across leaves: these may pass 2**31
    counts = [jnp.sum(leaf, dtype=jnp.int32).astype(jnp.float32) for leaf in leaves]
    return sum(counts, jnp.zeros([], jnp.float32)) / jnp.float32(size)

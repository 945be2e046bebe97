"""What a loop logs about masks, whichever method they come from."""

import jax
import jax.numpy as jnp

from sparsejax.typing import MaskTree, Params, is_none, plain_path


def mask_sparsity(masks: MaskTree) -> jax.Array:
    """Share of zeros over all masks, traced or not; 0 where there is no mask.

    Example:
      >>> float(mask_sparsity({"a": jnp.array([True, False]), "b": None}))
      0.5
    """
    leaves = jax.tree.leaves(masks)
    pruned = [jnp.sum(~mask, dtype=jnp.int32) for mask in leaves]
    total = sum((n.astype(jnp.float32) for n in pruned), jnp.zeros([], jnp.float32))
    return total / max(sum(mask.size for mask in leaves), 1)


def leaf_metrics(masks: MaskTree, weights: Params) -> dict[str, dict[str, float]]:
    """What `draw_report` shows of each governed leaf.

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
            sparsity[name] = float(1 - jnp.mean(mask, dtype=jnp.float32))
            size = jnp.abs(weight).astype(jnp.float32)  # float16 ends at 65504
            norm, outside = jnp.sum(size), jnp.sum(size, where=~mask)
            magnitude[name] = float(jnp.where(norm > 0, outside / norm, 0))
    return {"leaf_sparsity": sparsity, "leaf_pruned_magnitude": magnitude}

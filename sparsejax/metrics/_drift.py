"""How far two sets of masks lie apart."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from sparsejax.metrics._aligned import aligned
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
    changed = [jnp.sum(a != b, dtype=jnp.int32) for a, b in _pairs(masks_a, masks_b)]
    return sum(changed, jnp.zeros([], jnp.int32))


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
    drifts = iter(
        [
            jnp.sum(a != b, dtype=jnp.int32).astype(jnp.float32)
            / jnp.float32(max(a.size, 1))
            for a, b in _pairs(masks_a, masks_b)
        ]
    )
    return jax.tree.map(lambda _: next(drifts), masks_a)


def _pairs(masks_a: MaskTree, masks_b: MaskTree) -> list[tuple[jax.Array, jax.Array]]:
    for masks in (masks_a, masks_b):
        for path, mask in jax.tree_util.tree_leaves_with_path(masks):
            if jnp.result_type(mask) != jnp.bool_:  # packed ones have other shapes too
                raise TypeError(
                    f"masks must be bool, True = kept; got {jnp.result_type(mask)} at "
                    f"{jax.tree_util.keystr(path)}. Read those of an optimizer state "
                    "by `masks_of`."
                )
    found = aligned(masks_a, masks_b, ("masks_a", "masks_b"))
    return [(a, b) for _, a, b in found]

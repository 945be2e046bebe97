"""How far two sets of masks lie apart."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from sparsejax.typing import MaskTree, is_none


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
    changed = [jnp.sum(a != b, dtype=jnp.int32) for a, b in _aligned(masks_a, masks_b)]
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
            for a, b in _aligned(masks_a, masks_b)
        ]
    )
    return jax.tree.map(lambda _: next(drifts), masks_a)


def _aligned(masks_a: MaskTree, masks_b: MaskTree) -> list[tuple[jax.Array, jax.Array]]:
    """Pairs of masks; where both trees have None there is no pair."""
    flat_a = jax.tree_util.tree_flatten_with_path(masks_a, is_leaf=is_none)[0]
    flat_b = jax.tree.leaves(masks_b, is_leaf=is_none)
    if len(flat_a) != len(flat_b):
        raise ValueError(
            "the mask trees must mirror each other; got "
            f"{len(flat_a)} and {len(flat_b)} leaves. Make both from the same params."
        )
    pairs = []
    for (path, a), b in zip(flat_a, flat_b, strict=True):
        if a is None and b is None:
            continue
        name = jax.tree_util.keystr(path)
        if a is None or b is None:
            raise ValueError(
                "both trees must have a mask, or both None, at a leaf; got None in "
                f"`{'masks_a' if a is None else 'masks_b'}` only at {name}."
            )
        for mask in (a, b):
            if jnp.result_type(mask) != jnp.bool_:
                raise TypeError(
                    f"masks must be bool, True = kept; got {jnp.result_type(mask)} at "
                    f"{name}. Read those of an optimizer state by `masks_of`."
                )
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"the masks of a leaf must have one shape; got {jnp.shape(a)} and "
                f"{jnp.shape(b)} at {name}."
            )
        pairs.append((jnp.asarray(a), jnp.asarray(b)))
    return pairs

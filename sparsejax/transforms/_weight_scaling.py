"""Weight scaling: a small learned scale repairs the magnitude that pruning takes.

Each output column of a kernel `[..., d_in, d_out]` has `num_groups` scales, one for
each contiguous block of its inputs. Train the scales beside the weights, without decay
and out of the method's `where`; apply them in the forward; fold them in at the end.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparsejax import masks as mask_room
from sparsejax._ints import check_int
from sparsejax.patterns import StackedTree, governed
from sparsejax.typing import MaskTree, Params, Where, is_none


def init(
    params: Params,
    *,
    where: Where = None,
    num_groups: int = 2,
    stacked: StackedTree = 0,
) -> Params:
    """Scales of one, for every governed kernel.

    Args:
      params: the weights; governed leaves are `[*stacked, d_in, d_out]`.
      where: which leaves are scaled, as for the methods.
      num_groups: blocks of the input axis, which it must divide. To leave the N:M
        pattern of a kernel as it is, `d_in / num_groups` must be a multiple of m.
      stacked: leading axes that are layers stacked by scan.

    Returns:
      A tree like `params`: `[*stacked, num_groups, d_out]` of the leaf's dtype, None
      where not scaled.

    Raises:
      ValueError: if a leaf has not two axes beyond the stacked ones, or `num_groups`
        does not divide its inputs.
      TypeError: if `num_groups` is no whole number.

    Example:
      >>> scales = init({"bias": jnp.ones(2), "kernel": jnp.ones((8, 2))})
      >>> jax.tree.map(jnp.shape, scales)
      {'bias': None, 'kernel': (2, 2)}

    References:
      Huang et al., 2025 (CAST), https://arxiv.org/abs/2509.25996, equations 11-12; the
      blocks are contiguous, which the paper leaves open.
    """
    check_int("num_groups", num_groups, least=1)
    leaves = governed(params, where=where, stacked=stacked)
    flat, treedef = jax.tree.flatten(params, is_leaf=is_none)
    scales = []
    for leaf, weight in zip(leaves, flat, strict=True):
        if leaf is None:
            scales.append(None)
            continue
        if len(leaf.shape) - leaf.stacked != 2:
            raise ValueError(
                "weight scaling needs kernels [d_in, d_out] beyond the stacked axes; "
                f"got shape {leaf.shape} with stacked={leaf.stacked} at {leaf.name}. "
                "Exclude the leaf by `where`."
            )
        *lead, d_in, d_out = leaf.shape
        if d_in % num_groups:
            raise ValueError(
                f"`num_groups` must divide the input axis; got {num_groups} for "
                f"shape {leaf.shape} at {leaf.name}."
            )
        scales.append(jnp.ones((*lead, num_groups, d_out), weight.dtype))
    return treedef.unflatten(scales)


def apply(params: Params, scales: Params) -> Params:
    """The weights that the forward uses: each times the scale of its block.

    Args:
      params: the weights.
      scales: from `init`.

    Returns:
      Params of the same structure, shapes and dtypes; differentiable in both.

    Raises:
      ValueError: if the trees have different numbers of leaves, or scales are not those
        of their kernel.

    Example:
      >>> params = {"kernel": jnp.ones((4, 1))}
      >>> print(apply(params, {"kernel": jnp.array([[2.0], [3.0]])})["kernel"].T)
      [[2. 2. 3. 3.]]
    """
    return mask_room.map_masked(_scaled, scales, params)


def fold(params: Params, scales: Params, masks: MaskTree) -> Params:
    """The finished weights: pruned by the masks, with the scales multiplied in.

    Args:
      params: the weights.
      scales: from `init`, trained.
      masks: of the final weights, such as `sj.prune(params, pattern=...)`.

    Returns:
      Sparse params that need no scales any more.

    Raises:
      ValueError: as `apply` and `sj.apply_masks` do.
      TypeError: if a mask is not bool.

    Example:
      >>> params = {"kernel": jnp.ones((4, 1))}
      >>> scales = {"kernel": jnp.array([[2.0], [3.0]])}
      >>> masks = {"kernel": jnp.array([[True], [False], [False], [True]])}
      >>> print(fold(params, scales, masks)["kernel"].T)
      [[2. 0. 0. 3.]]
    """
    return apply(mask_room.apply_masks(params, masks), scales)


def _scaled(scale: ArrayLike, weight: jax.Array) -> jax.Array:
    *lead, d_in, d_out = weight.shape
    groups = jnp.shape(scale)[-2] if jnp.ndim(scale) > 1 else 0
    if jnp.shape(scale) != (*lead, groups, d_out) or not groups or d_in % groups:
        raise ValueError(
            "scales must be [*stacked, num_groups, d_out] of their kernel; got "
            f"{jnp.shape(scale)} for a kernel {weight.shape}. Make them by `init`."
        )
    blocks = weight.reshape(*lead, groups, d_in // groups, d_out)
    scaled = (blocks * jnp.asarray(scale)[..., None, :]).reshape(weight.shape)
    return scaled.astype(weight.dtype)

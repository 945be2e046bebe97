"""What the rest of the loop reads from a method's state."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparsejax import masks, scores
from sparsejax._governed import governed_twice
from sparsejax._promotion import common_dtype
from sparsejax.patterns import Leaf
from sparsejax.transforms._state import (
    Entry,
    Framed,
    Masked,
    Plain,
    Projected,
    Settings,
    SparseState,
    align,
    array,
    find_states,
    is_due,
    is_hole,
    leaf_mask,
)
from sparsejax.typing import MaskTree, Params


def forward_params(opt_state: optax.OptState, params: Params) -> Params:
    """The params that the forward uses: the one line a method needs in the loop.

    Hard methods mask the weights and pass the gradient through to all of them; SR-STE
    and progressive gradient flow project them; AdamS leaves them dense. Pure and
    differentiable; call it inside the loss.

    Args:
      opt_state: of a sparsejax method, or any optax state or `nnx.Optimizer` state that
        holds one or several.
      params: what the state was initialised with, or a tree with the same leaves in
        the same order (`nnx.state(model, nnx.Param)`). To compute in a narrower dtype
        cast what this returns: in a copy that was rounded before weights tie, and soft
        methods choose other masks than `update` and `sparse_params`.

    Returns:
      Params of the same structure, shapes and dtypes.

    Raises:
      ValueError: if no state is found, the params do not fit it, or a leaf is governed
        twice.

    Example:
      >>> tx = sj.static_sparse(optax.sgd(0.1), 0.5, key=jax.random.key(0))
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> opt_state = tx.init(params)
      >>> float(forward_params(opt_state, params)["kernel"].sum())
      2.0
      >>> loss = lambda p: sj.forward_params(opt_state, p)["kernel"].sum()
      >>> float(jax.grad(loss)(params)["kernel"].sum())  # dense
      4.0
    """
    return _map_owned(opt_state, params, _forward_leaf)


def sparse_params(opt_state: optax.OptState, params: Params) -> Params:
    """The final weights: exactly sparse, exactly zero where pruned.

    Hard methods apply their masks; soft methods choose the masks anew from the
    magnitudes of `params`, under their (last) pattern.

    Args:
      opt_state: as for `forward_params`.
      params: as for `forward_params`.

    Returns:
      Params of the same structure, shapes and dtypes. Warns where the factor of
      `mask_decay` is known not to be 0: the forward then has other weights.

    Raises:
      ValueError: as for `forward_params`.

    Example:
      >>> tx = sj.sr_ste(optax.sgd(0.1), pattern=sj.NM(1, 2))
      >>> params = {"kernel": jnp.array([[1.0], [-3.0]])}
      >>> print(sparse_params(tx.init(params), params)["kernel"])
      [[ 0.]
       [-3.]]
    """
    found = _map_owned(opt_state, params, _sparse_leaf)
    for state in find_states(opt_state):
        _warn_unless_decayed(state)
    return found


def masks_of(opt_state: optax.OptState) -> MaskTree:
    """The masks that the last update used (before the first: those of `init`).

    Args:
      opt_state: as for `forward_params`.

    Returns:
      A tree like the params; bool, True = kept, None = not governed. Several states
      are merged into one tree.

    Raises:
      ValueError: if no state is found or a leaf is governed twice.

    Example:
      >>> tx = sj.magnitude_prune(optax.sgd(0.1), pattern=sj.NM(1, 2))
      >>> params = {"bias": jnp.ones(1), "kernel": jnp.array([[1.0], [-3.0]])}
      >>> print(masks_of(tx.init(params)))
      {'bias': None, 'kernel': Array([[False],
             [ True]], dtype=bool)}
    """
    merged: Any = optax.MaskedNode()
    for state in find_states(opt_state):
        merged = _merge(merged, _bool_masks(state), ())
    return jax.tree.map(
        lambda m: None if isinstance(m, optax.MaskedNode) else m,
        merged,
        is_leaf=is_hole,
    )


def is_mask_update(opt_state: optax.OptState) -> jax.Array:
    """Whether the next update may change the topology.

    A growth step needs the dense gradient of the weights; a kernel that computes only
    the kept ones asks here when to compute all. Inside `optax.MultiSteps` it holds for
    all micro-steps of such an update.

    Args:
      opt_state: as for `forward_params`.

    Returns:
      bool scalar, traced under jit; True if any of several states is due.

    Raises:
      ValueError: if no state is found.

    Example:
      >>> tx = sj.rigl(optax.sgd(0.1), 0.5, update_every=10, stop_step=100,
      ...              key=jax.random.key(0))
      >>> bool(is_mask_update(tx.init({"kernel": jnp.ones((2, 2))})))
      True
    """
    due = [is_due(state) for state in find_states(opt_state)]
    return jnp.any(jnp.stack(due), axis=0)


def project(
    weight: jax.Array,
    mask: jax.Array,
    factor: jax.Array | None,
    straight_through: bool,
) -> jax.Array:
    """Scales the weights outside the mask by `factor`; None zeroes them."""
    if factor is None:
        pruned = jnp.zeros_like(weight)
    else:
        dtype = common_dtype(weight.dtype, factor.dtype)
        pruned = (weight.astype(dtype) * factor.astype(dtype)).astype(weight.dtype)
    projected = jnp.where(mask, weight, pruned)
    return masks.straight_through(weight, projected) if straight_through else projected


def _map_owned(opt_state: optax.OptState, params: Params, fn) -> Params:
    flat, owners, treedef = align(find_states(opt_state), params)
    for weight, owner in zip(flat, owners, strict=True):
        if owner is not None:
            _check_shape(weight, owner)
    return treedef.unflatten(
        [
            weight if owner is None or weight is None else fn(weight, owner)
            for weight, owner in zip(flat, owners, strict=True)
        ]
    )


def _check_shape(weight: Any, entry: Entry) -> None:
    """Masks may have mapped axes in front; a projection must see one run at a time."""
    leaf, settings = _leaf(entry), entry.state.settings
    shape = () if weight is None else jnp.shape(weight)
    own = shape
    if isinstance(settings.forward, Masked):
        own = shape[max(len(shape) - len(leaf.shape), 0) :]
    if own != leaf.shape:
        raise ValueError(
            f"the params must be those that `{settings.method}` was initialised with; "
            f"got {'None' if weight is None else f'shape {shape}'} where it has "
            f"{leaf.shape} at {leaf.name}. Under `jax.vmap`, call this inside the "
            "mapped function."
        )


def _forward_leaf(weight: jax.Array, entry: Entry) -> jax.Array:
    state = entry.state
    forward = state.settings.forward
    match forward:
        case Plain():
            return weight
        case Masked():
            mask = leaf_mask(entry.stored, _leaf(entry))
            return project(weight, mask, None, straight_through=True)
        case Projected() | Framed():
            mask = soft_mask(weight, state.settings, entry.index, state.arrays)
            factor = state.arrays.get("factor")
            factor = None if factor is None else array(factor)
            return project(weight, mask, factor, forward.straight_through)


def _sparse_leaf(weight: jax.Array, entry: Entry) -> jax.Array:
    leaf = _leaf(entry)
    if isinstance(entry.state.settings.forward, Masked):
        mask = leaf_mask(entry.stored, leaf)
    else:
        mask = _by_magnitude(weight, leaf, entry.state.settings.sparsities[entry.index])
    return jnp.where(mask, weight, jnp.zeros_like(weight))


def _warn_unless_decayed(state: SparseState) -> None:
    if "factor" not in state.arrays:
        return
    factor = array(state.arrays["factor"])
    if not isinstance(factor, Tracer) and np.any(factor):
        warnings.warn(
            "the sparse model has 0 where the forward multiplies pruned weights by "
            f"{factor}, and differs from what was trained. Let the schedule of "
            f"`{state.settings.method}` come to exactly 0 some steps before the run "
            "ends, as by `hard_after`.",
            stacklevel=3,
        )


def _by_magnitude(weight: jax.Array, leaf: Leaf, sparsity: float | None) -> jax.Array:
    """The mask of one leaf by magnitude."""
    return masks.select(scores.magnitude(weight), leaf, sparsity)


def soft_mask(
    weight: jax.Array, settings: Settings, index: int, arrays: dict[str, Any]
) -> jax.Array:
    """The mask by magnitude of a leaf that a soft method governs.

    In frame 0 all is dense, and in frame `i` what `frames[i - 1]` does not govern: a
    frame governs fewer leaves than the last one where a sparsity is None, which leaves
    dense what its pattern does not fix.

    Args:
      weight: dense.
      settings: of the method.
      index: of the leaf, into `settings.leaves`.
      arrays: of its state; holds the frame where the forward is `Framed`.
    """
    sparsity = settings.sparsities[index]

    def of_leaf(leaf, weight):
        if leaf is None:
            return jnp.ones_like(weight, jnp.bool_)
        return _by_magnitude(weight, leaf, sparsity)

    if not isinstance(settings.forward, Framed):
        return of_leaf(settings.leaves[index], weight)
    leaves = (None, *(frame[index] for frame in settings.forward.frames))
    branches = [functools.partial(of_leaf, leaf) for leaf in leaves]
    frame = array(arrays["frame"])
    return jax.lax.switch(frame, branches, jax.lax.stop_gradient(weight))


def _leaf(entry: Entry) -> Leaf:
    leaf = entry.state.settings.leaves[entry.index]
    assert leaf is not None
    return leaf


def _bool_masks(state: SparseState) -> MaskTree:
    stored, treedef = jax.tree.flatten(state.masks, is_leaf=is_hole)
    leaves = iter(state.settings.leaves)
    found = []
    for mask in stored:
        if not isinstance(mask, optax.MaskedNode):
            leaf = next(leaves)
            mask = None if leaf is None else leaf_mask(mask, leaf)
        found.append(mask)
    return treedef.unflatten(found)


def _merge(a: Any, b: Any, path: tuple) -> Any:
    """Overlays two mask trees; a hole of one shows the other."""
    if is_hole(a) or is_hole(b):
        return b if is_hole(a) else a
    children_a, treedef = jax.tree_util.tree_flatten_with_path(
        a, is_leaf=lambda node: node is not a
    )
    children_b = jax.tree.leaves(b, is_leaf=lambda node: node is not b)
    if jax.tree_util.treedef_is_leaf(treedef):
        raise governed_twice(jax.tree_util.keystr(path))
    return treedef.unflatten(
        [
            _merge(child, other, path + key)
            for (key, child), other in zip(children_a, children_b, strict=True)
        ]
    )

"""The frame that hard methods share: masked weights, exact zeros after each update.

    masked gradient -> inner optimizer -> new masks, when due -> zeros where pruned

A method says how masks begin, how they are refreshed and what happens to the step on
which they are. Everything is traced once; a refresh sits behind a `lax.cond`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks
from sparsejax.patterns import Leaf
from sparsejax.transforms._forward import is_due
from sparsejax.transforms._regrown import reset_regrown
from sparsejax.transforms._state import (
    Masked,
    Settings,
    SparseState,
    checked_params,
    loaded_masks,
    settled,
    store_masks,
)
from sparsejax.typing import Params

FlatMasks = list[jax.Array | None]
"""One mask a leaf of the params; None = not governed."""


@dataclasses.dataclass(frozen=True)
class Refresh:
    """What a method may read to choose new masks.

    Attributes:
      params: the weights before this update, or after it where the method steps first.
      grads: the dense gradient.
      masks: the masks so far, flat.
      step: int32[], updates before this one.
      key: a key of this step, or None for a method without randomness.
    """

    params: Params
    grads: Params
    masks: FlatMasks
    step: jax.Array
    key: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Topology:
    """How a hard method chooses its masks.

    Attributes:
      method: its name.
      leaves: params -> the governed leaves.
      first: (params, leaves) -> the masks of `init`.
      refresh: (what it may read, leaves) -> new masks; None for static masks.
      update_every: steps between refreshes.
      stop_step: last step of a refresh; None for no end.
      steps_first: the refresh reads the weights after the optimizer's step.
      skips_step: on a refresh the optimizer takes no step.
      key: the key whose folds each refresh gets.
    """

    method: str
    leaves: Callable[[Params], tuple[Leaf | None, ...]]
    first: Callable[[Params, tuple[Leaf | None, ...]], FlatMasks]
    refresh: Callable[[Refresh, tuple[Leaf | None, ...]], FlatMasks] | None = None
    update_every: int | None = None
    stop_step: int | None = None
    steps_first: bool = False
    skips_step: bool = False
    key: jax.Array | None = None


def hard_method(
    inner: optax.GradientTransformation, topology: Topology, *, pack_masks: bool
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation of a hard method."""
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> SparseState:
        leaves = topology.leaves(params)
        masks.check_scores(params, "params")
        found = topology.first(params, leaves)
        settings = Settings(
            topology.method,
            Masked(),
            leaves,
            sparsities=(None,) * len(leaves),
            update_every=topology.update_every,
            stop_step=topology.stop_step,
        )
        arrays = {}
        if topology.key is not None:
            # raw key data passes through every checkpoint and wrapper; a copy, since
            # the state may be donated and the user's key must outlive it
            arrays["key"] = jnp.copy(jax.random.key_data(topology.key))
        return SparseState(
            jnp.zeros([], jnp.int32),
            store_masks(found, params, pack_masks),
            settled(inner.init(params)),
            arrays,
            settings,
        )

    def update_fn(grads, state: SparseState, params: Params | None = None, **extra):
        params = checked_params(params, state.settings)
        old = loaded_masks(state)
        due = is_due(state)

        def step():
            masked = masks.apply_masks(grads, old)
            updates, inner_state = inner.update(
                masked, state.inner_state, params, **extra
            )
            return updates, settled(inner_state, state.inner_state)

        updates, inner_state = step()
        if topology.refresh is None:
            return _prune(updates, params, old), state._replace(
                step=optax.safe_increment(state.step), inner_state=inner_state
            )

        def refreshed():
            weights = params
            if topology.steps_first:
                # taken again inside the branch: between refreshes the step then stays
                # one fused pass over memory
                weights = optax.apply_updates(params, step()[0])
                weights = masks.apply_masks(weights, old)
            key = _step_key(topology.key, state)
            read = Refresh(weights, grads, old, state.step, key)
            return topology.refresh(read, state.settings.leaves)

        new = jax.lax.cond(due, refreshed, lambda: old)
        if topology.skips_step:
            inner_state = _where(due, state.inner_state, inner_state)
            updates = jax.tree.map(lambda u: jnp.where(due, 0, u), updates)
        regrown = _zip_masks(lambda a, b: b & ~a, old, new)
        # before the first update pruned weights are not 0 yet; regrown ones start there
        fresh = inner.init(masks.apply_masks(params, old))
        inner_state = reset_regrown(inner_state, fresh, params, regrown)
        # regrown weights start from 0, so only those kept before and after move
        both = _zip_masks(lambda a, b: a & b, old, new)
        return _prune(updates, params, both), state._replace(
            step=optax.safe_increment(state.step),
            masks=store_masks(new, state.masks, pack_masks),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _prune(updates: Any, params: Params, kept: FlatMasks) -> Any:
    """Updates after which weights outside `kept` are exactly 0: `p + (-p)`."""

    def prune(mask, update, param):
        # a narrower dtype would round -p and leave a rest
        dtype = jnp.promote_types(update.dtype, param.dtype)
        return jnp.where(mask, update.astype(dtype), -param.astype(dtype))

    return masks.map_masked(prune, kept, updates, params)


def _zip_masks(fn, old: FlatMasks, new: FlatMasks) -> FlatMasks:
    return [None if a is None else fn(a, b) for a, b in zip(old, new, strict=True)]


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _step_key(key: jax.Array | None, state: SparseState) -> jax.Array | None:
    if key is None:
        return None
    stored = jax.random.wrap_key_data(
        state.arrays["key"], impl=jax.random.key_impl(key)
    )
    return jax.random.fold_in(stored, state.step)

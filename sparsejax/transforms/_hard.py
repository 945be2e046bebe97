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
from jax.core import Tracer

from sparsejax import masks
from sparsejax._promotion import common_dtype
from sparsejax.patterns import Leaf
from sparsejax.transforms._arguments import (
    check_given_params,
    check_params,
    check_update,
    optimizer,
)
from sparsejax.transforms._moments import fresh_where_pruned
from sparsejax.transforms._schedules import Checked, check_ahead, check_now
from sparsejax.transforms._state import (
    LeafOptions,
    Masked,
    Options,
    Settings,
    SparseState,
    is_due,
    loaded_masks,
    settled,
    store_masks,
)
from sparsejax.transforms._write_through import Edit, update_from_edited_state
from sparsejax.typing import MaskTree, Params, is_none

FlatMasks = list[jax.Array | None]
"""One mask a leaf of the params; None = not governed."""


@dataclasses.dataclass(frozen=True)
class Refresh:
    """What a method may read to choose new masks.

    Attributes:
      params: the weights before this update, or after it where the method steps first;
        0 where pruned.
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
class MaskChoice:
    """How a hard method chooses its masks.

    Attributes:
      method: its name.
      leaves: params -> the governed leaves.
      first: (params, leaves) -> the masks of `init`.
      common: what was asked for at all leaves alike.
      refresh: (what it may read, leaves) -> new masks; None for static masks.
      update_every: steps between refreshes.
      stop_step: last step of a refresh; None for no end.
      steps_first: the refresh reads the weights after the optimizer's step.
      skips_step: on a refresh the optimizer takes no step.
      grows_by_gradient: the refresh reads the gradient of pruned weights.
      key: the key whose folds each refresh gets.
      scheduled: what a refresh reads that may be a schedule.
    """

    method: str
    leaves: Callable[[Params], tuple[Leaf | None, ...]]
    first: Callable[[Params, tuple[Leaf | None, ...]], FlatMasks]
    common: LeafOptions
    refresh: Callable[[Refresh, tuple[Leaf | None, ...]], FlatMasks] | None = None
    update_every: int | None = None
    stop_step: int | None = None
    steps_first: bool = False
    skips_step: bool = False
    grows_by_gradient: bool = False
    key: jax.Array | None = None
    scheduled: tuple[Checked, ...] = ()


def hard_method(
    inner: optax.GradientTransformation, choice: MaskChoice, *, pack_masks: bool
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation of a hard method."""
    inner = optimizer(inner)

    options = Options((choice.common,), choice.update_every, choice.stop_step)

    def init_fn(params: Params) -> Any:
        check_given_params(choice.method, params)
        check_ahead(choice.scheduled, (0, choice.update_every, choice.stop_step))
        leaves = choice.leaves(params)
        check_params(params, leaves, pack_masks=pack_masks)
        found = choice.first(params, leaves)
        settings = Settings(
            choice.method,
            Masked(),
            leaves,
            sparsities=(None,) * len(leaves),
            update_every=choice.update_every,
            stop_step=choice.stop_step,
            grows_by_gradient=choice.grows_by_gradient,
        )
        arrays = {}
        if choice.key is not None:
            # raw key data passes through every checkpoint and wrapper; a copy, since
            # the state may be donated and the user's key must outlive it
            arrays["key"] = jnp.copy(jax.random.key_data(choice.key))
        return SparseState(
            jnp.zeros([], jnp.int32),
            store_masks(found, params, pack_masks),
            settled(inner.init(params)),
            arrays,
            settings,
        )

    def update_fn(
        updates: Any, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        grads = updates  # optax's name for what comes in and what goes out
        params = check_update(choice.method, grads, state, params, options=options)
        due = is_due(state)
        if not isinstance(due, Tracer) and due:
            check_now(choice.scheduled, state.step)

        def masked(old):
            # before the first update pruned weights are not 0 yet
            return masks.apply_masks(params, old)

        def fresh(old):
            return inner.init(masked(old))

        def step(old):
            before = fresh_where_pruned(state.inner_state, fresh(old), params, old)
            kept_grads, weights = masks.apply_masks(grads, old), masked(old)

            def update():
                updates, after = inner.update(kept_grads, before, weights, **extra)
                return updates, settled(after, before)

            if not choice.skips_step:
                return update()
            skips = [_unless(due, leaf) for leaf in jax.tree.leaves(before)]
            updates, inner_state = update_from_edited_state(update, skips)
            return jax.tree.map(lambda u: jnp.where(due, 0, u), updates), inner_state

        if choice.refresh is None:
            stored, old = state.masks, loaded_masks(state)
            stayed = not_grown = old
        else:
            flipped = jax.lax.cond(
                due,
                lambda: _flips_of_refresh(choice, state, grads, params, step),
                lambda: _no_flips(state),
            )
            # The stored masks are read once, here, and flipped in place: between
            # refreshes a copy of them would cost more than all else.
            stored = _with_flips(jnp.bitwise_xor, state.masks, flipped)
            old, stayed, not_grown = (
                loaded_masks(state._replace(masks=_with_flips(fn, stored, flipped)))
                for fn in (
                    jnp.bitwise_xor,
                    # regrown weights start from 0: only those kept both times move
                    lambda new, flips: new & ~flips,
                    lambda new, flips: ~(new & flips),
                )
            )
        updates, inner_state = step(old)
        if choice.steps_first:
            # what is regrown after a step begins as if it had not been taken
            inner_state = fresh_where_pruned(inner_state, fresh(old), params, not_grown)
        return _prune(updates, params, stayed), state._replace(
            step=optax.safe_increment(state.step),
            masks=stored,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _flips_of_refresh(
    choice: MaskChoice,
    state: SparseState,
    grads: Any,
    params: Params,
    step: Callable[[FlatMasks], tuple[Any, Any]],
) -> list[jax.Array | None]:
    """Which bits of the masks a refresh changes, packed."""
    old = loaded_masks(state)
    weights = params
    if choice.steps_first:
        # taken again inside the branch: between refreshes the step then stays one
        # fused pass over memory
        weights = jax.tree.map(
            lambda p, u: p if p is None or u is None else optax.apply_updates(p, u),
            params,
            step(old)[0],
            is_leaf=is_none,
        )
    # pruned weights are not 0 where something scaled the updates on their way
    weights = masks.apply_masks(weights, old)
    key = _step_key(choice.key, state)
    assert choice.refresh is not None
    read = Refresh(weights, grads, old, state.step, key)
    new = choice.refresh(read, state.settings.leaves)
    return [
        None if bits is None else _pack_flips(bits)
        for bits in _zip_masks(lambda a, b: a ^ b, old, new)
    ]


def _pack_flips(bits: jax.Array) -> jax.Array:
    """One bit a weight, but of a scalar and where devices would cut a byte."""
    return masks.pack(bits) if masks.is_packable(bits) else bits


def _with_flips(fn, stored: MaskTree, flipped: list[jax.Array | None]) -> MaskTree:
    """Masks as stored, packed or not, with the flips in the same form."""

    def combine(flips, mask):
        if mask.dtype != flips.dtype:
            flips = masks.unpack(flips, mask.shape[-1])
        return fn(mask, flips)

    return masks.map_masked(combine, flipped, stored)


def _no_flips(state: SparseState) -> list[jax.Array | None]:
    """Zeros like the flips, in shape and sharding."""
    return [
        None if mask is None else jnp.zeros_like(_pack_flips(mask))
        for mask in loaded_masks(state)
    ]


def _prune(updates: Any, params: Params, kept: FlatMasks) -> Any:
    """Updates after which weights outside `kept` are exactly 0: `p + (-p)`."""

    def prune(mask, update, param):
        # a narrower dtype would round -p and leave a rest
        dtype = common_dtype(update.dtype, param.dtype)
        return jnp.where(mask, update.astype(dtype), -param.astype(dtype))

    return masks.map_masked(prune, kept, updates, params)


def _zip_masks(fn, old: FlatMasks, new: FlatMasks) -> FlatMasks:
    return [None if a is None else fn(a, b) for a, b in zip(old, new, strict=True)]


def _unless(due: jax.Array, before: jax.Array) -> Edit:
    """On a refresh a leaf stays as it was before the step."""
    return lambda after: jnp.where(due, before, after)


def _step_key(key: jax.Array | None, state: SparseState) -> jax.Array | None:
    if key is None:
        return None
    impl, stored = jax.random.key_impl(key), state.arrays["key"]
    if stored.shape != jax.random.key_data(key).shape:
        raise ValueError(
            f"`key` must be of the implementation that the state of "
            f"`{state.settings.method}` was made with; got {impl}, and key data of "
            f"shape {stored.shape} in the state. Pass a key as before."
        )
    stored = jax.random.wrap_key_data(stored, impl=impl)
    return jax.random.fold_in(stored, state.step)

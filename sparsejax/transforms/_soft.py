"""The frame that soft methods share: dense weights, a projected forward.

    gradient of the projected forward (+ a pull) -> inner optimizer -> dense weights

The weights stay dense, the forward projects them (`forward_params`), and
`sparse_params` is exactly sparse. The arrays that the next forward needs are written by
`init` and `update`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks
from sparsejax.transforms._arguments import (
    check_given_params,
    check_params,
    check_update,
    optimizer,
)
from sparsejax.transforms._forward import soft_mask
from sparsejax.transforms._schedules import Checked, check_ahead, check_now
from sparsejax.transforms._sparsity import Sparsity
from sparsejax.transforms._state import (
    Framed,
    Options,
    Projected,
    Settings,
    SparseState,
    is_packed,
    settled,
    store_masks,
)
from sparsejax.typing import Params, is_none

Pull = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(step, mask, gradient or update, weight) -> the same of one governed leaf."""


def soft_method(
    inner: optax.GradientTransformation,
    method: str,
    rule: Sparsity,
    *,
    straight_through: bool,
    frames: tuple[Sparsity, ...] = (),
    arrays_at: Callable[[jax.Array], dict[str, jax.Array]] = lambda step: {},
    pull: Pull | None = None,
    pull_after: Pull | None = None,
    scheduled: tuple[Checked, ...] = (),
    pack_masks: bool,
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation of a soft method.

    Args:
      inner: any optax optimizer.
      method: its name.
      rule: which leaves, at which constant sparsity.
      straight_through: whether pruned weights get the gradient of kept ones.
      frames: the rule of each frame, if there are such; the last is `rule`.
      arrays_at: step -> what the forward before update `step` needs.
      pull: adds to the gradient of a governed leaf.
      pull_after: adds to its update, after the inner optimizer.
      scheduled: what these read that may be a schedule.
      pack_masks: store 1 bit a weight.
    """
    inner = optimizer(inner)
    asked = tuple(rule.common for rule in frames or (rule,))
    options = Options(asked, update_every=1, straight_through=straight_through)

    def init_fn(params: Params) -> Any:
        check_given_params(method, params)
        check_ahead(scheduled, (0, None))
        leaves = rule.leaves(params)
        check_params(params, leaves, pack_masks=pack_masks)
        # under N:M too: the pattern of another frame may read it
        sparsities = rule.settled(params, leaves)
        forward: Projected | Framed = Projected(straight_through)
        if frames:
            of_frames = tuple(frame.leaves(params) for frame in frames)
            forward = Framed(of_frames, straight_through)
        settings = Settings(method, forward, leaves, sparsities, update_every=1)
        step = jnp.zeros([], jnp.int32)
        arrays = arrays_at(step)
        # of frames one is chosen by a switch, out of which the sharding is XLA's guess
        found = [
            None if mask is None else mask | jnp.zeros_like(weight, jnp.bool_)
            for mask, weight in zip(
                current_masks(params, settings, arrays),
                jax.tree.leaves(params, is_leaf=is_none),
                strict=True,
            )
        ]
        return SparseState(
            step,
            store_masks(found, params, pack_masks),
            settled(inner.init(params)),
            arrays,
            settings,
        )

    def update_fn(
        updates: Any, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        grads = updates  # optax's name for what comes in and what goes out
        params = check_update(method, grads, state, params, options=options)
        check_now(scheduled, state.step)
        found = [
            # no step is negative: this tells XLA to shard the mask as the weight, where
            # a mask of whole channels, or out of a switch, leaves it to a guess
            None if mask is None else jnp.where(state.step < 0, weight != 0, mask)
            for mask, weight in zip(
                current_masks(params, state.settings, state.arrays),
                jax.tree.leaves(params, is_leaf=is_none),
                strict=True,
            )
        ]
        if pull is not None:
            add = functools.partial(pull, state.step)
            grads = masks.map_masked(add, found, grads, params)
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
        if pull_after is not None:
            add = functools.partial(pull_after, state.step)
            updates = masks.map_masked(add, found, updates, params)
        step = jnp.asarray(optax.safe_increment(state.step))
        return updates, SparseState(
            step,
            store_masks(found, state.masks, is_packed(state.masks)),
            settled(inner_state, state.inner_state),
            arrays_at(step),
            state.settings,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def current_masks(
    params: Params, settings: Settings, arrays: dict[str, Any]
) -> list[jax.Array | None]:
    """The masks of these params by magnitude, one entry a leaf; None = not governed.

    Args:
      params: the dense weights.
      settings: of a soft method.
      arrays: of its state; holds the frame where the forward is `Framed`.
    """
    flat = jax.tree.leaves(params, is_leaf=is_none)
    return [
        None if leaf is None else soft_mask(weight, settings, i, arrays)
        for i, (weight, leaf) in enumerate(zip(flat, settings.leaves, strict=True))
    ]

"""Checks of what a method is given, before anything is computed."""

import math
import numbers
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparsejax import masks
from sparsejax._devices import shape_on_a_device
from sparsejax._ints import check_int
from sparsejax._names import check_order, names_of
from sparsejax.patterns import Leaf
from sparsejax.transforms._state import (
    Framed,
    LeafOptions,
    Options,
    Projected,
    Settings,
    SparseState,
)
from sparsejax.typing import Params, is_none


def optimizer(inner: Any) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer, which then takes any extra arguments.

    Raises:
      TypeError: if it is none.
    """
    if not all(callable(getattr(inner, name, None)) for name in ("init", "update")):
        raise TypeError(
            "`inner` must be an optax optimizer, such as `optax.adam(1e-3)`; got "
            f"{_words(inner)}."
        )
    return optax.with_extra_args_support(inner)


def check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raises unless a number of steps is a whole Python number.

    Raises:
      TypeError: if it is none: a float, or a value that `inject_hyperparams` traces.
      ValueError: if it is too small.
    """
    hint = "Under `optax.inject_hyperparams`, name it in `static_args`."
    check_int(name, value, least=at_least, hint=hint)


def check_number(
    name: str, value: Any, *, at_most: float = math.inf, at: str = ""
) -> None:
    """Raises unless a value is at least 0; schedules and traced values pass.

    Args:
      name: of the argument, for the message.
      value: anything.
      at_most: the highest value allowed.
      at: the step that it belongs to, for the message.

    Raises:
      TypeError: if it is no number.
      ValueError: if it is out of range, infinite or NaN.
    """
    is_schedule = callable(value) and not isinstance(value, type)
    if is_schedule or isinstance(value, Tracer):
        return
    at = f" at {at}" if at else ""
    is_array = isinstance(value, np.ndarray | jax.Array) and np.ndim(value) == 0
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or is_array):
        raise TypeError(
            f"`{name}` must be a number or a schedule of the step; got "
            f"{_words(value)}{at}."
        )
    number = float(value)  # pyright: ignore[reportArgumentType] - real
    if not 0 <= number <= min(at_most, np.finfo(np.float32).max):
        allowed = "at least 0" if at_most == math.inf else f"a factor in [0, {at_most}]"
        raise ValueError(f"`{name}` must be {allowed}; got {value}{at}.")


def check_key(key: Any) -> None:
    """Raises unless it is one random key, new style or raw.

    Raises:
      TypeError: if it is anything else.
    """
    if isinstance(key, jax.Array | np.ndarray):  # no `nnx.Rngs`, which has any name
        if key.ndim == 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return
        if key.ndim == 1 and key.dtype == jnp.uint32:
            return
    raise TypeError(
        "`key` must be one random key, such as `jax.random.key(0)` or `rngs.params()` "
        f"of an `nnx.Rngs`; got {_words(key)}."
    )


def check_given_params(method: str, params: Any) -> None:
    """Raises if `init` is called with the placeholder of `optax.tree.map_params`.

    Raises:
      TypeError: if so.
    """
    if type(params).__name__ == "_ParamsPlaceholder":  # its only, private name
        raise TypeError(
            f"`optax.tree.map_params` cannot map a state of `{method}`: it calls "
            "`init` without params, and these say which leaves have masks. Use "
            "`jax.tree_util.tree_map_with_path(fn, opt_state)`: the path of a mask or "
            "moment ends with that of its param. To shard a state as its params, call "
            "`tx.init(params)` on sharded ones outside of jit."
        )


def check_params(
    params: Params, leaves: tuple[Leaf | None, ...], *, pack_masks: bool
) -> None:
    """Raises if the values or shardings of the params given to `init` do not do.

    Raises:
      TypeError: if they are shapes without values.
      ValueError: if a weight is NaN, or a mask cannot be packed: it is a scalar, or
        devices would cut a byte.
    """
    masks.check_scores(params, "params")
    if not pack_masks:
        return
    for weight, leaf in zip(
        jax.tree.leaves(params, is_leaf=is_none), leaves, strict=True
    ):
        if leaf is None:
            continue
        if not leaf.shape:
            raise ValueError(
                "`pack_masks` needs leaves with an axis to pack; got shape () at "
                f"{leaf.name}. Exclude the leaf by `where`, or pass pack_masks=False."
            )
        if not masks.is_packable(weight):
            raise ValueError(
                "`pack_masks` needs whole bytes on a device, multiples of 8 weights "
                f"along the last axis; got shape {leaf.shape}, sharded in parts of "
                f"{shape_on_a_device(weight)}, at {leaf.name}. Shard another axis, or "
                "pass pack_masks=False."
            )


def check_update(
    method: str,
    grads: Any,
    state: Any,
    params: Params | None,
    *,
    options: Options,
    period: str = "update_every",
) -> Params:
    """The params given to `update`, if they, the gradients and the state fit.

    Args:
      method: that updates.
      grads: of the params.
      state: of the method.
      params: may be missing.
      options: of the method.
      period: what the method calls its `update_every`.

    Raises:
      TypeError: if the state is none of a method.
      ValueError: if it is another method's or of other options, or the params or
        gradients are missing, or of other shapes or order than at `init`. Axes in front
        of a gradient (of examples, for `optax.contrib.dpsgd`) pass.
    """
    if not isinstance(state, SparseState):
        raise TypeError(
            f"`{method}` needs the state that its `init` returned; got "
            f"{_words(state)}. Call `tx.update(grads, opt_state, params)`."
        )
    settings = state.settings
    if settings.method != method:
        raise ValueError(
            f"`{method}` needs the state that its `init` returned; got that of "
            f"`{settings.method}`. Make a new state by `init`."
        )
    _check_options(settings, options, period)
    if params is None:
        raise ValueError(
            f"`{method}` needs `params` in `update`; got None. Call "
            "`tx.update(grads, opt_state, params)`."
        )
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]
    flat_grads = jax.tree.leaves(grads, is_leaf=is_none)
    for name, found in (("params", flat), ("gradients", flat_grads)):
        if len(found) != len(settings.leaves):
            raise ValueError(
                f"the {name} must mirror the params that `{method}` was initialised "
                f"with, of {len(settings.leaves)} leaves; got {len(found)} leaves. "
                "Make a new state by `init`."
            )
    governed = [pair for pair, leaf in zip(flat, settings.leaves, strict=True) if leaf]
    check_order(
        [leaf.path for leaf in settings.leaves if leaf],
        names_of(governed),
        f"the state of `{method}` and the params",
    )
    for (path, weight), grad, leaf in zip(
        flat, flat_grads, settings.leaves, strict=True
    ):
        if leaf is None:
            continue
        shape = None if weight is None else jnp.shape(weight)
        grad_shape = leaf.shape if grad is None else jnp.shape(grad)
        in_front = max(len(grad_shape) - len(leaf.shape), 0)
        if shape != leaf.shape or grad_shape[in_front:] != leaf.shape:
            raise ValueError(
                f"`{method}` was initialised with shape {leaf.shape} at {leaf.name}; "
                f"got a weight of shape {shape} and a gradient of shape {grad_shape} "
                f"at {jax.tree_util.keystr(path)}. Make a new state by `init`."
            )
        if grad is None:
            raise ValueError(
                f"`{method}` needs a gradient for each leaf that it governs; got None "
                f"at {leaf.name}. Exclude the leaf by `where`."
            )
    return params


def _check_options(settings: Settings, options: Options, period: str) -> None:
    """Raises if a method was built otherwise than the one that made the state.

    What decides on masks stands in the state, so that other options would be half used.
    Functions and trees are not asked again: the params may have other names by now.

    Args:
      settings: of the state.
      options: of the method.
      period: what the method calls its `update_every`.
    """
    for name, before, now, at in _pairs(settings, options, period):
        if before != now:
            raise ValueError(
                f"`{settings.method}` has {name}={now}{at}, and its state was made "
                f"with {name}={before}. To go on with other options take the arrays of "
                "the state into a new one: `jax.tree.unflatten(jax.tree.structure("
                "tx.init(params)), jax.tree.leaves(state))`."
            )


def _pairs(
    settings: Settings, options: Options, period: str
) -> Iterator[tuple[str, Any, Any, str]]:
    """Names of options, that of the state and that of the method, and at which leaf."""
    forward, frames = settings.forward, (settings.leaves,)
    yield period, settings.update_every, options.update_every, ""
    yield "stop_step", settings.stop_step, options.stop_step, ""
    if isinstance(forward, Projected | Framed):
        one, other = forward.straight_through, options.straight_through
        yield "straight_through", one, other, ""
    if isinstance(forward, Framed):
        frames = forward.frames
        yield "len(patterns)", len(frames), len(options.leaves), ""
    for frame, now in zip(frames, options.leaves, strict=True):
        for leaf, sparsity in zip(frame, settings.sparsities, strict=True):
            if leaf is None:
                continue
            of_leaf = LeafOptions(leaf.pattern, leaf.stacked, sparsity)
            for name, before, asked in zip(now._fields, of_leaf, now, strict=True):
                is_known = before is not None and not isinstance(before, Tracer)
                if is_known and asked is not None:
                    yield name, before, asked, f" at {leaf.name}"


def _words(value: Any) -> str:
    """A value for a message: its type, and itself where that is short."""
    text = repr(value)
    kind = type(value).__name__
    return f"{text} ({kind})" if len(text) <= 40 else f"a value of type {kind}"

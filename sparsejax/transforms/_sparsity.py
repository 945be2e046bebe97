"""The sparsity of each leaf at a step, from whatever the user passed."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from sparsejax import allocation as allocations
from sparsejax import masks
from sparsejax.patterns import (
    Leaf,
    Pattern,
    Unstructured,
    broadcast_prefix,
    check_patterns,
    check_sparsity,
    governed,
)
from sparsejax.transforms._schedules import value_at
from sparsejax.transforms._state import LeafOptions
from sparsejax.typing import KeyPath, Params, ScoreTree, Where, is_none

_LOST = 0.01  # the density below which a layer counts as lost


class Sparsity:
    """The resolved `sparsity` argument of a method: a function of params and step.

    Args:
      value: float, schedule, tree prefix of these, or None when every pattern is N:M.
      allocate: spreads a single value over the leaves.
      where: passed on to `allocate` and `governed`.
      pattern: likewise to `governed`.
      stacked: likewise to both.

    Raises:
      ValueError: if a number is outside [0, 1).
      TypeError: if an argument is of another kind.
    """

    def __init__(
        self,
        value: Any,
        *,
        allocate: Callable[..., Any],
        where: Where,
        pattern: Any,
        stacked: Any,
    ):
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            check_sparsity(leaf, at=jax.tree_util.keystr(path))
        if not callable(allocate) or isinstance(allocate, type):
            raise TypeError(
                "`allocation` must be a function such as `sj.erdos_renyi_kernel`; got "
                f"{allocate!r}."
            )
        check_patterns(pattern)
        self._value = jax.tree.map(_settle, value)
        self._allocate = allocate
        self._where, self._pattern, self._stacked = where, pattern, stacked
        self._single = jax.tree_util.all_leaves([value]) or value is None
        if not self._single and allocate is not allocations.uniform:
            raise ValueError(
                "`allocation` spreads one sparsity over the leaves; got it together "
                "with a tree of sparsities. Pass one of the two."
            )

    @classmethod
    def constant(cls, value: Any, **kwargs: Any) -> "Sparsity":
        """For masks chosen once, and for forwards that project anew: no schedules.

        Raises:
          ValueError: if a sparsity is a schedule.
        """
        leaves = jax.tree.leaves(value)
        if any(callable(leaf) and not isinstance(leaf, type) for leaf in leaves):
            raise ValueError(
                "masks that are chosen once, or anew in every forward, need a constant "
                "`sparsity`; got a schedule."
            )
        return cls(value, **kwargs)

    @property
    def common(self) -> LeafOptions:
        """What is the same for all leaves."""
        single = self._single and self._allocate is allocations.uniform
        return LeafOptions(
            self._pattern if isinstance(self._pattern, Pattern) else None,
            self._stacked if isinstance(self._stacked, int) else None,
            self._value if single and isinstance(self._value, int | float) else None,
        )

    def leaves(self, params: Params) -> tuple[Leaf | None, ...]:
        """The governed leaves; a None in a tree of sparsities leaves its leaf dense.

        Raises:
          ValueError: if a sparsity contradicts an N:M pattern, or is missing.
        """
        leaves = governed(
            params, where=self._where, pattern=self._pattern, stacked=self._stacked
        )
        given = [self._value] * len(leaves)
        if not self._single:
            given = broadcast_prefix(self._value, params, name="sparsity")
            leaves = tuple(
                leaf if leaf and (value is not None or _is_fixed(leaf)) else None
                for leaf, value in zip(leaves, given, strict=True)
            )
            if not any(leaves):
                raise ValueError(
                    "at least one leaf must be governed; `sparsity` is None at every "
                    "leaf that `where` chose. Give one a number."
                )
        at_first = self._raw(params, leaves, 0)
        for leaf, value, first in zip(leaves, given, at_first, strict=True):
            if leaf is not None:
                _check(leaf, first, scheduled=callable(value))
        return leaves

    def given(
        self, params: Params, leaves: tuple[Leaf | None, ...], step: ArrayLike
    ) -> list[Any]:
        """As `at`, but where the pattern fixes it too, if one was given."""
        return [
            None if leaf is None else value
            for leaf, value in zip(leaves, self._raw(params, leaves, step), strict=True)
        ]

    def at(
        self, params: Params, leaves: tuple[Leaf | None, ...], step: ArrayLike
    ) -> list[Any]:
        """One sparsity for each leaf, None where dense or fixed by the pattern."""
        return [
            None if leaf and _is_fixed(leaf) else value
            for leaf, value in zip(
                leaves, self.given(params, leaves, step), strict=True
            )
        ]

    def settled(
        self, params: Params, leaves: tuple[Leaf | None, ...]
    ) -> tuple[Any, ...]:
        """As `given` at step 0, as numbers: for settings, which hold no arrays.

        Traced by the user a sparsity stays as it is, for what is jitted whole.

        Raises:
          TypeError: if `allocation` computes with the weights inside jit.
        """
        with jax.ensure_compile_time_eval():  # an allocation may compute by arrays
            found = tuple(_settle(value) for value in self.given(params, leaves, 0))
        if any(isinstance(value, Tracer) for value in jax.tree.leaves(self._value)):
            return found
        for leaf, value in zip(leaves, found, strict=True):
            if leaf is not None and isinstance(value, Tracer):
                raise TypeError(
                    "`allocation` must return numbers that a static state can hold; "
                    f"got {value} at {leaf.name}. Compute them from shapes alone, or "
                    "call `init` outside of jit."
                )
        return found

    def total(self, step: ArrayLike) -> ArrayLike:
        """The single sparsity, for a ranking across leaves.

        Raises:
          ValueError: if there is none, or an allocation that would spread it.
        """
        if self._allocate is not allocations.uniform:
            raise ValueError(
                "`allocation` spreads one sparsity over the leaves, and "
                f"`across_leaves` ranks them together; got {self._allocate} together "
                "with it. Pass one of the two."
            )
        if self._value is None or not self._single:
            raise ValueError(
                "a ranking across leaves needs one `sparsity`, a number or a schedule; "
                f"got {self._value!r}."
            )
        return _evaluate(self._value, step)

    def values_at(self, step: int) -> list[Any]:
        """What its schedules give at a step, traced where they close over such."""
        return [value_at(leaf, step) for _, leaf in self._schedules()]

    def check(self, step: int) -> None:
        """Raises if a schedule's known value at a step is out of range.

        Raises:
          ValueError: if so.
        """
        found = zip(self._schedules(), self.values_at(step), strict=True)
        for (path, _), value in found:
            leaf = f"{jax.tree_util.keystr(path)} at " if path else ""
            check_sparsity(value, at=f"{leaf}step {step}")

    def _schedules(self) -> list[tuple[KeyPath, Callable]]:
        flat = jax.tree_util.tree_flatten_with_path(self._value)[0]
        return [(path, leaf) for path, leaf in flat if callable(leaf)]

    def _raw(self, params, leaves, step) -> list[Any]:
        if self._value is None:
            return [None] * len(leaves)
        if not self._single:
            given = broadcast_prefix(self._value, params, name="sparsity")
            return [_evaluate(value, step) for value in given]
        tree = self._allocate(
            params,
            _evaluate(self._value, step),
            # exactly the governed leaves take part, whatever the node types are (a
            # tree of flags would not do: Equinox modules are trees and callable)
            where=by_path(params, [leaf is not None for leaf in leaves]),
            stacked=by_path(params, [leaf.stacked if leaf else 0 for leaf in leaves]),
        )
        return jax.tree.leaves(tree, is_leaf=is_none)


def by_path(params: Params, values: list[Any]) -> Callable[[KeyPath, Any], Any]:
    """A function of `(path, leaf)` that returns the value of each leaf of `params`."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]
    table = {path: value for (path, _), value in zip(flat, values, strict=True)}
    return lambda path, leaf: table[path]


def _evaluate(value: Any, step: ArrayLike) -> Any:
    return jnp.asarray(value(step), jnp.float32) if callable(value) else value


def _settle(value: Any) -> Any:
    """A number as such: one in an array would be traced, and its checks left out."""
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
    return float(value) if is_array and not isinstance(value, Tracer) else value


def _is_fixed(leaf: Leaf) -> bool:
    return leaf.pattern.sparsity is not None


def _check(leaf: Leaf, value: Any, *, scheduled: bool) -> None:
    fixed = leaf.pattern.sparsity
    if fixed is not None:
        if scheduled or (isinstance(value, int | float) and abs(value - fixed) > 1e-6):
            raise ValueError(
                f"under {leaf.pattern} the sparsity is {fixed}; got "
                f"{'a schedule' if scheduled else value} at {leaf.name}. Omit "
                "`sparsity`, or leave this leaf out of it."
            )
    elif value is None:
        raise ValueError(
            f"`sparsity` must be given under {leaf.pattern}; got None at {leaf.name}. "
            "Only an N:M pattern fixes it."
        )
    else:
        check_sparsity(value, at=leaf.name)  # of a schedule, at step 0


def only_governed(params: Params, leaves: tuple[Leaf | None, ...]) -> Params:
    """None for the others, which may be no numbers, as keys in the state of a model."""
    flat, treedef = jax.tree.flatten(params, is_leaf=is_none)
    return treedef.unflatten(
        [weight if leaf else None for weight, leaf in zip(flat, leaves, strict=True)]
    )


def choose_masks(
    rule: Sparsity,
    score: Callable[[Params], ScoreTree],
    params: Params,
    leaves: tuple[Leaf | None, ...],
    across_leaves: bool,
    step: ArrayLike = 0,
) -> list[jax.Array | None]:
    """The masks of the highest scores at a step, leaf by leaf or across leaves.

    Raises:
      ValueError: if a ranking across leaves meets an allocation, or a pattern other
        than Unstructured.
    """
    flat = jax.tree.leaves(score(only_governed(params, leaves)), is_leaf=is_none)
    if not across_leaves:
        return [
            None if leaf is None else masks.select(score, leaf, sparsity)
            for score, leaf, sparsity in zip(
                flat, leaves, rule.at(params, leaves, step), strict=True
            )
        ]
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf.pattern, Unstructured):
            raise ValueError(
                "a ranking across leaves needs Unstructured(), since units of other "
                f"patterns do not compare; got {leaf.pattern} at {leaf.name}."
            )
    found = masks.select_across(flat, leaves, rule.total(step))
    _warn_of_lost_layers(found, leaves)
    return found


def _warn_of_lost_layers(
    found: list[jax.Array | None], leaves: tuple[Leaf | None, ...]
) -> None:
    kept = [
        (leaf, mask)
        for leaf, mask in zip(leaves, found, strict=True)
        if leaf is not None and mask is not None and mask.size
    ]
    if any(isinstance(mask, Tracer) for _, mask in kept):
        return
    total = sum(float(mask.mean()) * mask.size for _, mask in kept)
    if total < _LOST * sum(mask.size for _, mask in kept):
        return  # asked for
    for leaf, mask in kept:
        own = tuple(range(leaf.stacked, mask.ndim))
        density = float(mask.mean(axis=own).min())
        if density < _LOST:
            warnings.warn(
                f"a ranking across leaves keeps {density:.2%} of a layer at "
                f"{leaf.name}, which then passes on next to nothing. Rank leaf by "
                "leaf, with an `allocation`, or exclude the leaf by `where`.",
                stacklevel=3,
            )

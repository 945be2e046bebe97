"""Schedules of a sparsity, or of any number that holds or rises in steps."""

import itertools
import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def constant(value: float) -> Callable[[ArrayLike], jax.Array]:
    """The same value at every step.

    Args:
      value: what the schedule gives.

    Returns:
      A schedule from the step to that value.

    Example:
      >>> float(constant(0.5)(10))
      0.5
    """
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def cubic(
    final: float, *, begin: int, end: int, initial: float = 0.0
) -> Callable[[ArrayLike], jax.Array]:
    """Gradual pruning: fast while much is redundant, slow towards the end.

    `final + (initial - final) * (1 - (step - begin) / (end - begin))**3` between
    `begin` and `end`; `initial` before, `final` after.

    Args:
      final: sparsity at the end, in [0, 1).
      begin: first step of the ramp.
      end: first step at `final`, after `begin`; at most the step of the last refresh of
        the masks, as one at the run's length is never taken.
      initial: sparsity until `begin`, in [0, 1).

    Returns:
      A schedule from the step to a sparsity.

    Raises:
      ValueError: unless `begin < end` and the sparsities lie in their range.

    Example:
      >>> [round(float(cubic(0.9, begin=0, end=100)(t)), 4) for t in (0, 50, 100)]
      [0.0, 0.7875, 0.9]

    References:
      Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878, equation 1; before `begin`
      they prune nothing, where this gives `initial`.
    """
    _check_span(begin, end)
    _check_fraction("final", final)
    _check_fraction("initial", initial)

    def schedule(step: ArrayLike) -> jax.Array:
        progress = (jnp.asarray(step, jnp.float32) - begin) / (end - begin)
        left = 1 - jnp.clip(progress, 0, 1)
        return jnp.float32(final) + (initial - final) * left**3

    return schedule


def stepwise(
    values: Sequence[float], boundaries: Sequence[int]
) -> Callable[[ArrayLike], jax.Array]:
    """`values[i]` from `boundaries[i - 1]` on; `values[0]` before the first.

    Args:
      values: one more than the boundaries.
      boundaries: increasing steps; at a boundary the later value holds.

    Returns:
      A schedule from the step to a value.

    Raises:
      ValueError: if the lengths do not fit or the boundaries do not increase.

    Example:
      >>> [float(stepwise([0.0, 0.5], [10])(t)) for t in (9, 10)]
      [0.0, 0.5]
    """
    if len(values) != len(boundaries) + 1:
        raise ValueError(
            "`values` must hold one more entry than `boundaries`; got "
            f"{len(values)} and {len(boundaries)}."
        )
    if any(a >= b for a, b in itertools.pairwise(boundaries)):
        raise ValueError(f"`boundaries` must increase; got {tuple(boundaries)}.")
    table, edges = jnp.asarray(values, jnp.float32), tuple(boundaries)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        passed = [(step >= edge).astype(jnp.int32) for edge in edges]
        return table[sum(passed, jnp.zeros(step.shape, jnp.int32))]

    return schedule


def _check_fraction(name: str, value: float) -> None:
    if isinstance(value, numbers.Real) and not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be the share of zeros, a fraction in [0, 1); got {value}."
            + (" Percentages: divide by 100." if 1 < value <= 100 else "")
        )


def _check_span(begin: int, end: int) -> None:
    if not begin < end:
        raise ValueError(f"`begin` must be before `end`; got begin={begin}, end={end}.")

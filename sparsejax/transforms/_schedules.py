"""What a method does with a user's schedules: holds them in their range.

Where a value is known it is checked, where it is traced it is clipped. It is known in
an eager update, and at `init`, under jit too, for some of the steps that lie ahead.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparsejax.transforms._arguments import check_number

# past the end of any ramp; a schedule that differs at them has not come to an end
_LATE = (2**23, 2**24)
_ROUNDING = 1e-6  # how far float32 takes a schedule out of its range by itself


class Checked(Protocol):
    """An argument that may be, or hold, a schedule."""

    def values_at(self, step: int) -> list[Any]:
        """What its schedules give at a step, traced or not."""
        ...

    def check(self, step: int) -> None:
        """Raises if a value that is known at a step is out of range."""
        ...


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A number or a schedule of the step, from 0 to `at_most`: a function of the step.

    Attributes:
      name: of the argument, for messages.
      value: what the user passed.
      at_most: the highest value allowed.

    Raises:
      TypeError: if it is neither.
      ValueError: if it is a number out of range.
    """

    name: str
    value: Any
    at_most: float = math.inf

    def __post_init__(self):
        check_number(self.name, self.value, at_most=self.at_most)

    def __call__(self, step: Any) -> jax.Array:
        """The value, clipped."""
        value = self.value(step) if callable(self.value) else self.value
        value = jnp.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(jnp.float32)
        return jnp.clip(value, 0.0, self.at_most)

    def values_at(self, step: int) -> list[Any]:
        """What it gives at a step, one value, if it is a schedule."""
        return [value_at(self.value, step)] if callable(self.value) else []

    def check(self, step: int) -> None:
        """Raises if it is a schedule, and its known value at a step is out of range."""
        for value in self.values_at(step):
            check_number(self.name, value, at_most=self.at_most, at=f"step {step}")


def value_at(schedule: Any, step: int) -> Any:
    """What a schedule gives at a step: traced if it closes over traced values."""
    with jax.ensure_compile_time_eval():
        value = schedule(jnp.asarray(step, jnp.int32))
    is_number = isinstance(value, numbers.Real | np.ndarray | jax.Array)
    if isinstance(value, Tracer) or not is_number or getattr(value, "ndim", 0):
        return value
    number = float(value)
    nearest = 0.0 if number < 0 else 1.0
    return nearest if abs(number - nearest) <= _ROUNDING else number


def check_ahead(arguments: Iterable[Checked], steps: Iterable[int | None]) -> None:
    """Checks schedules at steps to come, and where they end if that is not known.

    Args:
      arguments: what may hold schedules.
      steps: of the run; None for one that has no end.

    Raises:
      ValueError: if a schedule leaves its range.
    """
    steps = list(steps)
    for argument in arguments:
        for step in steps:
            if step is not None:
                argument.check(step)
        if None not in steps:
            continue
        late, later = (argument.values_at(step) for step in _LATE)
        known = not any(isinstance(value, Tracer) for value in (*late, *later))
        # a line that goes on for ever leaves every range, and its run ends before
        if known and late == later:
            argument.check(_LATE[0])


def check_now(arguments: Iterable[Checked], step: Any) -> None:
    """Checks schedules at the step of an update, where that is known.

    Raises:
      ValueError: if a schedule leaves its range.
    """
    if not isinstance(step, Tracer):
        for argument in arguments:
            argument.check(int(step))

"""The one check of a sparsity."""

import numbers
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def check_sparsity(sparsity: Any, *, at: str = "") -> None:
    """Raises unless a number lies in [0, 1); schedules and traced values pass.

    Traced values are clipped to [0, 1] where they are used.

    Args:
      sparsity: share of zeros: a number, or an array of one.
      at: the leaf it belongs to, for the message.

    Raises:
      TypeError: if it is no number.
      ValueError: if it is a number outside [0, 1), or NaN.

    Example:
      >>> check_sparsity(0.9)
    """
    is_schedule = callable(sparsity) and not isinstance(sparsity, type)
    if is_schedule or isinstance(sparsity, Tracer):
        return
    at = f" at {at}" if at else ""
    is_array = isinstance(sparsity, np.ndarray | jax.Array) and np.ndim(sparsity) == 0
    if not isinstance(sparsity, numbers.Real) and not is_array:
        raise TypeError(
            "`sparsity` must be a number in [0, 1), a schedule of the step, or a tree "
            f"prefix of these; got {sparsity!r}{at}."
        )
    value = float(sparsity)  # pyright: ignore[reportArgumentType] - real
    if not 0 <= value < 1:
        raise ValueError(
            "`sparsity` must be the share of zeros, a fraction in [0, 1); got "
            f"{sparsity}{at}."
            + (" Percentages: divide by 100." if 1 < value <= 100 else "")
        )

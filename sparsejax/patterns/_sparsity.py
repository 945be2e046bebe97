"""The one check of a sparsity."""

import numbers
from typing import Any


def check_sparsity(sparsity: Any, *, at: str = "") -> None:
    """Raises unless a number lies in [0, 1); schedules and traced values pass.

    Args:
      sparsity: share of zeros.
      at: the leaf it belongs to, for the message.

    Raises:
      ValueError: if it is a number outside [0, 1), or NaN.

    Example:
      >>> check_sparsity(0.9)
    """
    if isinstance(sparsity, numbers.Real) and not 0 <= float(sparsity) < 1:
        raise ValueError(
            "`sparsity` must be the share of zeros, a fraction in [0, 1); got "
            f"{sparsity}{f' at {at}' if at else ''}."
            + (" Percentages: divide by 100." if 1 < float(sparsity) <= 100 else "")
        )

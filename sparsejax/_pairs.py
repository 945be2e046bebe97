"""Where comparing all pairs of a row is faster than sorting or scanning it.

Every room may import this module; it imports none of them.
"""

from collections.abc import Callable
from typing import Any

import jax

# Comparisons that a GPU makes in the time of starting a few programs.
_FEW = 2**26


def count_if_few(
    rows: jax.Array,
    num_comparisons: int,
    *,
    count: Callable[[jax.Array], Any],
    otherwise: Callable[[jax.Array], Any],
) -> Any:
    """Counts over pairs on a GPU if they are few, where a sort takes ten programs.

    Args:
      rows: what both functions take.
      num_comparisons: how many counting makes.
      count: reductions over pairs.
      otherwise: gives the same, on other devices too.
    """
    if not are_few(num_comparisons):
        return otherwise(rows)
    return jax.lax.platform_dependent(rows, cuda=count, default=otherwise)


def are_few(num_comparisons: int) -> bool:
    """Whether a GPU had better make so many comparisons than sort or scan."""
    return num_comparisons <= _FEW

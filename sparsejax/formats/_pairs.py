"""Where comparing all pairs of a row is faster than sorting or scanning it."""

from collections.abc import Callable

import jax

# Pairs that a GPU compares in the time of starting a program or two.
_FEW = 2**24


def count_if_few(
    rows: jax.Array,
    num_pairs: int,
    *,
    count: Callable[[jax.Array], jax.Array],
    otherwise: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Counts over pairs on a GPU if they are few, where a sort takes ten programs.

    Args:
      rows: what both functions take.
      num_pairs: how many pairs counting compares.
      count: reductions over pairs.
      otherwise: gives the same, on other devices too.
    """
    if num_pairs > _FEW:
        return otherwise(rows)
    return jax.lax.platform_dependent(rows, cuda=count, default=otherwise)

"""An order in which programs stay together, so that they read the same of x.

Lists differ in length. Where each program has its own consecutive ones, see
`_schedule`, all have as much to do in the end; but in between they are windows apart,
and what one has read of x is gone from the cache when another needs it. In a model of
an LRU cache of 25 MB a product of 8192 x 8192 x 8192 at density 0.1 moves 642 MB then;
x, y and w are 282.

Here each program has, in every window, a list from among the longest and one from among
the shortest, so that all take about as long: 424 MB in that model. From window to
window they change places, so that the rest evens out.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_STEP = 5  # places from window to window
# how much more than the mean the fullest program may have: in a window, and in all
_MOST_AT_A_TIME = 2.5
_MOST_IN_ALL = 1.25


def units_in_turn(
    num: jax.Array, programs: int, windows: int, units_of_list: int
) -> tuple[jax.Array, jax.Array]:
    """Who computes what in each window, and whether that is as good as it should be.

    Args:
      num: int32 `[lists]`, their lengths.
      programs: that share the units of a window; divides their number.
      windows: how many there are.
      units_of_list: tiles along a list.

    Returns:
      int32 `[windows, programs, turns]`, every unit once in each window; and a bool:
      False where some lists are so long that they had better be shared out by length.

    Example:
      >>> units, is_even = units_in_turn(jnp.array([1, 9, 2, 8]), 2, 2, 1)
      >>> print(units.tolist(), is_even)
      [[[1, 0], [3, 2]], [[2, 3], [0, 1]]] True
    """
    by_rank = jnp.argsort(-num, stable=True)  # of equal lengths the first goes first
    length = num[by_rank].astype(jnp.float32)
    ranks = _ranks(programs, windows, len(num) * units_of_list // programs)
    of_list, within = np.divmod(ranks, units_of_list)
    units = by_rank[of_list] * units_of_list + within
    load = jnp.sum(length[of_list], axis=-1)  # of a window and a program
    mean, in_all = jnp.mean(load), jnp.mean(load, axis=0)
    is_even = (jnp.max(load) <= _MOST_AT_A_TIME * mean) & (
        jnp.max(in_all) <= _MOST_IN_ALL * mean
    )
    return units.astype(jnp.int32), is_even


def _ranks(programs: int, windows: int, turns: int) -> np.ndarray:
    """Which of the units, the longest first, `[windows, programs, turns]`."""
    step = next(n for n in range(_STEP, _STEP + programs) if math.gcd(n, programs) == 1)
    window, program, turn = np.ogrid[:windows, :programs, :turns]
    place = (program + step * window) % programs
    # there and back: what is long in one turn is short in the next
    place = np.where(turn % 2, programs - 1 - place, place)
    ranks = turn * programs + place
    # and every other window the other way round: of w, the last is read again first
    ranks[1::2] = ranks[1::2, :, ::-1]
    return ranks

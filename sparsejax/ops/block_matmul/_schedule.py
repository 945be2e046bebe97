"""Who computes what: the tiles of a product with lists of unequal length, shared out.

Scalar arithmetic on the lengths of the lists alone, which each program does for itself:
a kernel before it, to share the work out, would take as long as a tenth of a product at
low density.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_UNROLL = 4  # lengths that are read at a time
_REGION = 16  # blocks along either side of a region that is finished before the next


def add_up(length: Callable[[Any], jax.Array], size: int) -> jax.Array:
    """The sum of `size` lengths, int32; `length` takes an index."""
    return _scan(lambda total, i, n: total + n, jnp.int32(0), length, size)


def cuts(
    cost: Callable[[Any], jax.Array], size: int, targets: Sequence[jax.Array]
) -> list[jax.Array]:
    """Where the cost of the lists so far reaches each of some targets.

    Args:
      cost: takes the index of a list and gives its cost, int32, at least 1.
      size: how many lists.
      targets: float32, at least 0.

    Returns:
      For each, counted in lists: 3.25 is a quarter into list 3. At most `size`. See
      `whole`.

    Example:
      >>> costs = jnp.array([3, 1, 1, 1])
      >>> print(*cuts(lambda i: costs[i], 4, [jnp.float32(n) for n in (0, 1.5, 4, 6)]))
      0.0 0.5 2.0 4.0
    """

    def step(carry, i, n):
        start, found = carry
        n = n.astype(jnp.float32)
        seen = jnp.asarray(i, jnp.float32), start, n
        found = [
            # the last list that begins no later
            [jnp.where(start <= target, a, b) for a, b in zip(seen, last, strict=True)]
            for target, last in zip(targets, found, strict=True)
        ]
        return start + n, found

    zero = jnp.float32(0)
    # all of them by one scan: each of its reads waits for memory
    _, found = _scan(step, (zero, [[zero] * 3] * len(targets)), cost, size)
    return [
        jnp.minimum(i + (target - start) / n, float(size))
        for target, (i, start, n) in zip(targets, found, strict=True)
    ]


def whole(at: jax.Array, window: Any, windows: int) -> jax.Array:
    """Rounds a cut to a whole list, anew for every window.

    The rounding differs from window to window by `1 / windows` of a list: over all
    windows the error of a program is below one list, since
    `sum_g floor(y + g / windows) = floor(windows * y)`.

    Args:
      at: from `cuts`.
      window: its number, int32.
      windows: how many there are; in each of them all lists are shared out.

    Returns:
      int32.
    """
    shift = (window.astype(jnp.float32) + 0.5) / windows
    return (at + shift).astype(jnp.int32)


def nth_kept(
    state: tuple[jax.Array, ...],
    n: jax.Array,
    length: Callable[[Any], jax.Array],
    rows: int,
    columns: int,
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The n-th kept block in an order that goes region by region.

    Blocks that are worked on at a time then lie in few rows and few columns, so that
    what they read of either operand is read by many of them. A region is 16 rows and an
    equal part of each of their lists: with random blocks about as many columns.

    Args:
      state: `(region, its first n, how many it has)`, to begin with `(-1, 0, 0)`.
      n: at least 0, and no smaller than in the call before. Where there are not as many
        blocks, what is found is no block, and not to be read.
      length: takes a row and gives the length of its list, int32.
      rows: of blocks.
      columns: likewise.

    Returns:
      The next state; row and entry of its list.
    """
    strips = -(-columns // _REGION)

    def num_in(region):
        """Takes the number of a row of the region and gives what it has there."""
        first, strip = corner(region)

        def cut(row):
            num = length(jnp.minimum(first + row, rows - 1))
            start = jax.lax.div(num * strip, strips)
            num = jax.lax.div(num * (strip + 1), strips) - start
            return start, jnp.where(first + row < rows, num, 0)

        return cut

    def corner(region):
        """Its first row, and which part it has of each list."""
        return jax.lax.div(region, strips) * _REGION, jax.lax.rem(region, strips)

    def advance(state):
        region, first, num = state
        region, first = region + 1, first + num
        cut = num_in(region)
        return region, first, add_up(lambda row: cut(row)[1], _REGION)

    last = -(-rows // _REGION) * strips - 1

    def is_later(state):
        region, first, num = state
        return (n >= first + num) & (region < last)

    state = jax.lax.while_loop(is_later, advance, state)
    cut, within = num_in(state[0]), n - state[1]

    def step(found, row, of_row):
        (before, last, entry), (start, num) = found, of_row
        here = before <= within  # the last for which this holds
        last = jnp.where(here, row, last)
        entry = jnp.where(here, start + within - before, entry)
        return before + num, last, entry

    zero = jnp.int32(0)
    _, row, entry = _scan(step, (zero, zero, zero), cut, _REGION)
    return state, corner(state[0])[0] + row, entry


def _scan(step, carry, length, size):
    """`carry = step(carry, i, length(i))` for each i, some reads at a time."""

    def several(k, carry):
        first = k * _UNROLL
        lengths = [length(first + i) for i in range(_UNROLL)]
        for i, n in enumerate(lengths):
            carry = step(carry, first + i, n)
        return carry

    carry = jax.lax.fori_loop(0, size // _UNROLL, several, carry)
    for i in range(size - size % _UNROLL, size):
        carry = step(carry, jnp.int32(i), length(jnp.int32(i)))
    return carry

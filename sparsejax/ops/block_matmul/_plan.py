"""Which tiles of y or dx a program computes, and in which order."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.ops.block_matmul._schedule import add_up, cuts, whole
from sparsejax.ops.block_matmul._tiles import Order
from sparsejax.ops.block_matmul._together import units_in_turn

_STORE_COST = 1  # of a tile, in steps
_LEAST_BUSY = 0.9  # of the programs, where all that are busy have equally much


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who computes which tiles: static, but for the lengths of the lists.

    A unit is what lies below each other: the tiles of all rows that belong to a list,
    or to a part of one. Tiles of rows are worked on in windows; in each of them, every
    unit is some program's.

    Attributes:
      order: of the tiles.
      lists: how many.
      units_of_list: tiles along a list.
      row_tiles: tiles of rows.
      substeps: steps for each entry of a list.
      together: whether programs stay together, see `_together`, where lists allow it.
    """

    order: Order
    lists: int
    units_of_list: int
    row_tiles: int
    substeps: int
    together: bool

    @property
    def units(self) -> int:
        return self.lists * self.units_of_list

    @property
    def windows(self) -> int:
        return -(-self.row_tiles // self.order.window)

    @property
    def busy(self) -> int:
        """Programs of a row of tiles, as many as can have equally many units."""
        across = range(1, self.order.across + 1)
        return max(n for n in across if self.units % n == 0)

    @property
    def turns(self) -> int:
        """The units of a busy program in each window."""
        return self.units // self.busy

    @property
    def may_stay(self) -> bool:
        """Whether programs stay together if the lists allow it."""
        enough = self.busy >= _LEAST_BUSY * self.order.across
        return self.together and self.windows > 1 and enough

    def operands(self, num: jax.Array) -> dict[str, jax.Array]:
        """What a kernel reads, by name.

        Args:
          num: int32, the lengths of the lists.
        """
        if not self.may_stay:
            return {"num": num}
        units, is_even = units_in_turn(num, self.busy, self.windows, self.units_of_list)
        is_even = is_even.astype(jnp.int32).reshape(1)
        return {"num": num, "units": units, "is_even": is_even}

    def walk(
        self,
        refs: Mapping[str, Any],
        program: jax.Array,
        visit: Callable[[jax.Array, jax.Array, Any], Any],
        carry: Any,
    ) -> Any:
        """Visits the tiles of a program, in order.

        Args:
          refs: of the operands.
          program: its number, int32.
          visit: `(tile of rows, unit, carry) -> carry`.
          carry: to begin with.

        Returns:
          The last carry.
        """
        row = jax.lax.rem(program, self.order.window)
        number = jax.lax.div(program, self.order.window)
        of_program = self._in_turn if self.may_stay else self._consecutive
        range_of, unit_of = of_program(refs, number)

        def of_window(g, carry):
            row_tile = g * self.order.window + row
            start, stop = range_of(g)
            stop = jnp.where(row_tile < self.row_tiles, stop, start)

            def of_place(i, carry):
                return visit(row_tile, unit_of(g, i), carry)

            return jax.lax.fori_loop(start, stop, of_place, carry)

        return jax.lax.fori_loop(0, self.windows, of_window, carry)

    def _consecutive(self, refs, number):
        """What a program has in a window: a range, and the unit of a place in it."""
        first, last = self._share(refs, number)

        def range_of(g):
            return whole(first, g, self.windows), whole(last, g, self.windows)

        return range_of, lambda g, i: i

    def _in_turn(self, refs, number):
        """As `_consecutive`; and other units where the lists allow to stay together."""
        stays = refs["is_even"][0] != 0
        nothing = jnp.float32(0), jnp.float32(0)
        first, last = jax.lax.cond(
            stays, lambda: nothing, lambda: self._share(refs, number)
        )

        def range_of(g):
            turns = jnp.where(number < self.busy, self.turns, 0)
            start, stop = (
                jnp.where(stays, turn, whole(at, g, self.windows))
                for turn, at in ((0, first), (turns, last))
            )
            return start, stop

        def unit_of(g, i):
            at = g, jnp.minimum(number, self.busy - 1), jnp.minimum(i, self.turns - 1)
            return jnp.where(stays, refs["units"][at], i)

        return range_of, unit_of

    def _share(self, refs, number):
        """Where the units of a program begin and end, see `whole`."""
        if (self.order.across, self.windows) == (self.units, 1):
            # one each: reading all counts took 7 us on an H100
            first = number.astype(jnp.float32)
            return first, first + 1

        def cost(i):
            return refs["num"][i] * self.substeps + _STORE_COST

        share = add_up(cost, self.lists).astype(jnp.float32) / self.order.across
        targets = [share * (number + i).astype(jnp.float32) for i in range(2)]
        first, last = cuts(cost, self.lists, targets)
        return first * self.units_of_list, last * self.units_of_list

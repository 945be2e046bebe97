"""Which tiles of y or dx a program computes, and in which order."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.ops.block_matmul._schedule import add_up, cuts, whole
from sparsejax.ops.block_matmul._tiles import Order
from sparsejax.ops.block_matmul._together import InTurn, Ranked, Window

_STORE_COST = 1  # of a tile, in steps
_LEAST_BUSY = 0.9  # of the programs' time, if all lists were of one length
_MOST_KEPT = 0.6  # of the blocks, where not all programs would be busy then


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who computes which tiles: static, but for the lengths of the lists.

    A unit is what lies below each other: the tiles of all rows that belong to a list,
    or to a part of one. Tiles of rows are worked on in windows; in each of them, every
    unit is some program's.

    Attributes:
      order: of the tiles.
      lists: how many.
      longest: the length of a list of which all is kept.
      units_of_list: tiles along a list.
      row_tiles: tiles of rows.
      substeps: steps for each entry of a list.
      together: whether programs stay together, see `_together`, where lists allow it.
    """

    order: Order
    lists: int
    longest: int
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
    def busy(self) -> float:
        """The share of programs' time, if each had a whole number of equal units."""
        turns = -(-self.units // self.order.across)
        return self.units / (self.order.across * turns)

    @property
    def may_stay(self) -> bool:
        """Whether programs stay together if the lists allow it."""
        return self.together and self.windows > 1 and self.busy >= _LEAST_BUSY

    def operands(self, num: jax.Array) -> dict[str, jax.Array]:
        """What a kernel reads, by name.

        Args:
          num: int32, the lengths of the lists.
        """
        if not self.may_stay:
            return {"num": num}
        return {"num": num} | Ranked.of(num)._asdict()

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
        in_window = of_program(refs, number)

        def of_window(g, carry):
            here = in_window(g)
            row_tile = here.rows * self.order.window + row
            stop = jnp.where(row_tile < self.row_tiles, here.stop, here.start)

            def of_place(i, carry):
                return visit(row_tile, here.unit(i), carry)

            return jax.lax.fori_loop(here.start, stop, of_place, carry)

        return jax.lax.fori_loop(0, self.windows, of_window, carry)

    def _consecutive(self, refs, number):
        """What a program has by window, if all is shared out by length."""
        first, last = self._share(refs, number)

        def in_window(g):
            start, stop = (whole(at, g, self.windows) for at in (first, last))
            return Window(g, start, stop, lambda i: i)

        return in_window

    def _in_turn(self, refs, number):
        """As `_consecutive`; or other units where the lists allow to stay together."""
        turns = self.turns(refs)
        together = turns.of_program(number)
        nothing = jnp.float32(0), jnp.float32(0)
        first, last = jax.lax.cond(
            turns.stays, lambda: nothing, lambda: self._share(refs, number)
        )

        def in_window(g):
            here = together(g)
            start, stop = (whole(at, g, self.windows) for at in (first, last))
            return Window(
                jnp.where(turns.stays, here.rows, g),
                jnp.where(turns.stays, here.start, start),
                jnp.where(turns.stays, here.stop, stop),
                lambda i: jnp.where(turns.stays, here.unit(i), i),
            )

        return in_window

    def turns(self, refs: Mapping[str, Any]) -> InTurn:
        """Who has what, if programs stay together; `refs` as of `walk`."""
        lists = Ranked(*(refs[name] for name in Ranked._fields))
        # with more, all programs had better be busy
        most = self.lists * self.longest * (1 if self.busy == 1 else _MOST_KEPT)
        sizes = self.units_of_list, self.order.across, self.windows
        return InTurn.make(*sizes, lists, most=int(most))

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
        # a product that is rounded may be below the sum: no list is left over
        is_last = number == self.order.across - 1
        last = jnp.where(is_last, float(self.lists), last)
        return first * self.units_of_list, last * self.units_of_list

"""An order in which programs stay together, so that they read the same of x.

Lists differ in length. Where each program has its own consecutive ones, see
`_schedule`, all have as much to do in the end; but in between they are windows apart,
and what one has read of x is gone from the cache when another needs it. A product of
8192 x 8192 x 8192 at density 0.1 moved 598 MB on an H100 then; x, y and w are 282.

Here each program has, in every window, a list from among the longest and one from among
the shortest, so that all take about as long: 389 MB. From window to window they change
places, so that the rest evens out. A list that is as long as what a program has in some
windows, a full one say, is a program's only one for as many windows; another program
has it for the next tiles of rows.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_STEP = 5  # places from window to window
# A list is long if it is longer than one and a half times what a program has in a
# window, and two blocks. One may be; if more are, all are better shared out by length.
_LONG = 1.5, 2


class Window(NamedTuple):
    """What a program has at the time of a window of rows.

    Attributes:
      rows: the window that its units are of, mostly the same.
      start: the first of its places.
      stop: one past the last.
      unit: takes a place and gives the unit.
    """

    rows: jax.Array
    start: jax.Array
    stop: jax.Array
    unit: Callable[[jax.Array], jax.Array]


class Ranked(NamedTuple):
    """Lists by length, int32 `[lists]`.

    By two small programs of XLA, each of which takes 2 us; with sorting it were more.

    Attributes:
      by_rank: the longest first; of equal lengths the first.
      total: of all lengths, that many times.
      longest: likewise.
      second: the longest but one, likewise.

    Example:
      >>> print(*Ranked.of(jnp.array([1, 9, 2, 8])))
      [1 3 2 0] [20 20 20 20] [9 9 9 9] [8 8 8 8]
    """

    by_rank: jax.Array
    total: jax.Array
    longest: jax.Array
    second: jax.Array

    @classmethod
    def of(cls, num: jax.Array) -> "Ranked":
        """Of their lengths, int32 `[lists]`."""
        at = jnp.arange(len(num), dtype=jnp.int32)
        own, others, is_first = num[:, None], num[None], at[None] < at[:, None]
        before = (others > own) | ((others == own) & is_first)
        every = jnp.broadcast_to(num, before.shape)  # so that one program has them all

        def both(a, b):
            second = jnp.maximum(jnp.minimum(a[2], b[2]), jnp.maximum(a[3], b[3]))
            return a[0] + b[0], a[1] + b[1], jnp.maximum(a[2], b[2]), second

        rank, *of_all = jax.lax.reduce(
            (before.astype(jnp.int32), every, every, jnp.zeros_like(every)),
            (jnp.int32(0),) * 4,
            both,
            dimensions=(1,),
        )
        by_rank = jnp.sum(jnp.where(rank[None] == at[:, None], at[None], 0), axis=1)
        return cls(by_rank, *of_all)


@dataclasses.dataclass(frozen=True)
class InTurn:
    """What each program computes in each window; scalar arithmetic on `Ranked`.

    Attributes:
      units: what lies along the columns, some for each list.
      units_of_list: so many.
      programs: that share the units of a window.
      windows: how many there are.
      by_rank: of `Ranked`, read element by element.
      num_long: units that have programs of their own: those of one list, or none.
      lanes: which programs these are.
      stays: False where all are better shared out by length.
    """

    units: int
    units_of_list: int
    programs: int
    windows: int
    by_rank: jax.Array
    num_long: jax.Array
    lanes: "_Lanes"
    stays: jax.Array

    @classmethod
    def make(
        cls,
        units_of_list: int,
        programs: int,
        windows: int,
        lists: Ranked,
        *,
        most: int,
    ) -> "InTurn":
        """For lists that have `most` entries or fewer, all together."""
        total, longest, second = (
            of_all[0].astype(jnp.float32)
            for of_all in (lists.total, lists.longest, lists.second)
        )
        # what a program has in a window, in entries of a list
        share = jnp.maximum(total, 1) * (units_of_list / programs)
        limit = _LONG[0] * share + _LONG[1]
        spans = jnp.clip((longest / share + 0.5).astype(jnp.int32), 1, windows)
        lanes = _Lanes.for_spans(spans, windows)
        num_long = jnp.where(longest > limit, units_of_list, 0)
        few = num_long * lanes.num <= programs // 2
        return cls(
            len(lists.by_rank) * units_of_list,
            units_of_list,
            programs,
            windows,
            lists.by_rank,
            num_long,
            lanes,
            (second <= limit) & (total <= most) & few,
        )

    def of_program(self, program: jax.Array) -> Callable[[jax.Array], Window]:
        """Takes the number of a program, and gives what it has by window."""
        lanes, num_long = self.lanes, self.num_long
        # of programs of a long unit, which unit and which of them
        of_unit, lane = _divide(program, lanes.num)
        is_lane = of_unit < num_long
        of_unit = jnp.minimum(of_unit, num_long)

        def in_window(window):
            first, last = lanes.at_work(window)
            working = jnp.where(num_long > 0, jnp.maximum(last - first, 0), 0)
            works = is_lane & (first <= lane) & (lane < last)
            before = of_unit * working
            before += jnp.where(is_lane, jnp.clip(lane - first, 0, working), 0)
            others = self.programs - num_long * working
            place = jax.lax.rem(program - before + _STEP * window, others)
            is_odd = jax.lax.rem(window, 2) == 1

            def along(turn):  # there and back: first what is long, then what is short
                back = jax.lax.rem(turn, 2) == 1
                return jnp.where(back, others - 1 - place, place)

            full, rest = _divide(self.units - num_long, others)
            num = full + (along(full) < rest).astype(jnp.int32)

            def unit(i):
                # every other window the other way round: the last of w is read again
                turn = jnp.where(is_odd, num - 1 - i, i)
                rank = num_long + turn * others + along(turn)
                rank = jnp.where(works, of_unit, rank)
                in_list, within = _divide(rank, self.units_of_list)
                in_list = jnp.clip(in_list, 0, len(self.by_rank) - 1)
                return self.by_rank[in_list] * self.units_of_list + within

            begins = works & (window == lanes.begins(lane, window))
            return Window(
                jnp.where(works, lanes.window(lane, window), window),
                jnp.int32(0),
                jnp.where(works, begins.astype(jnp.int32), num),
                unit,
            )

        return in_window


class _Lanes(NamedTuple):
    """The programs that share the tiles of one long unit, of all windows.

    In each of some equal stretches of windows, each of them has one tile, if it can of
    the window in which it is half done.

    Attributes:
      spans: windows that a tile takes.
      stretch: the length of a stretch, in windows.
      num: programs.
      windows: how many there are.
    """

    spans: jax.Array
    stretch: jax.Array
    num: jax.Array
    windows: int

    @classmethod
    def for_spans(cls, spans: jax.Array, windows: int) -> "_Lanes":
        stretches = jax.lax.div(windows, spans)
        num = jax.lax.div(windows + stretches - 1, stretches)
        return cls(spans, jax.lax.div(windows, stretches), num, windows)

    def _at(self, window):
        """Where its stretch begins, and the first of the windows of its tiles."""
        number = jax.lax.div(window, self.stretch)
        return number * self.stretch, number * self.num

    def window(self, lane, window):
        """Whose tile a program has at the time of a window."""
        return self._at(window)[1] + lane

    def begins(self, lane, window):
        """At the time of which window it begins that tile."""
        start, of = self._at(window)
        last = start + self.stretch - self.spans
        return jnp.clip(of + lane - jax.lax.div(self.spans, 2), start, last)

    def at_work(self, window):
        """The programs that have a tile at the time of a window: first and last + 1."""
        start, of = self._at(window)
        begun = window + jax.lax.div(self.spans, 2) - of + 1  # those that begin in time
        ended = begun - self.spans
        begun = jnp.where(window >= start + self.stretch - self.spans, self.num, begun)
        ended = jnp.where(window < start + self.spans, 0, ended)
        there = jnp.minimum(self.num, self.windows - of)
        return jnp.maximum(ended, 0), jnp.minimum(begun, there)


def _divide(a, b):
    return jax.lax.div(a, b), jax.lax.rem(a, b)

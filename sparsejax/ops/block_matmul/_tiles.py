"""How the kernel of y and dx for Hopper cuts its work, and in which order it goes."""

import dataclasses
from typing import NamedTuple

from sparsejax.ops._hopper import NUM_SMS

_MAX_ROWS = 256  # of x in one product, as many as the tensor cores take
_MAX_BYTES = 512  # of a column of the result, held in registers during the next tile
_MAX_NARROW_ROWS = 128  # for each warpgroup, so that four slots fit
_FEW_ROWS = 64  # bound by reading w
_READING = 64  # programs that read at the rate of memory; more are no faster


class Order(NamedTuple):
    """In which order programs go over the tiles.

    Attributes:
      window: tiles of rows that are worked on at a time, each by other programs.
      across: programs that share the columns of one tile of rows.
    """

    window: int
    across: int

    @property
    def programs(self) -> int:
        return self.window * self.across


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work of y and dx is cut.

    Attributes:
      columns: of the result in a tile: 128, 64 for each of two warpgroups; or 64, and
        then each warpgroup has rows of its own.
      rows: of x for one warpgroup, at most 256; a multiple of `8 * parts`.
      stages: slots of the ring.
      parts: in which the rows of a tile are stored, each during one step of the tile
        after.
      room: parts that shared memory has room for, so that the copies of as many may be
        under way; divides `parts`, or is more.
      window: tiles of rows that are worked on at a time, side by side, so that what is
        read of `w` is read by as many programs. More where that occupies more of them.
      together: whether programs stay together, see `_together`, where lists allow it.
      num_sms: multiprocessors of the device.
    """

    columns: int
    rows: int
    stages: int = 4
    parts: int = 4
    room: int = 2
    window: int = 4
    together: bool = True
    num_sms: int = NUM_SMS

    @classmethod
    def default(
        cls, num_rows: int, block_side: int, columns: int, itemsize: int = 2
    ) -> "Tiles":
        """The tiles for these shapes.

        Args:
          num_rows: of x.
          block_side: of a block along the columns of the result.
          columns: of the result.
          itemsize: of the result, bytes.

        Example:
          >>> for num_rows in (8192, 5):
          ...     tiles = Tiles.default(num_rows, 128, columns=8192)
          ...     print(tiles.columns, tiles.rows, tiles.stages, tiles.parts)
          128 256 4 4
          128 8 8 1
        """
        most_wide = min(_MAX_ROWS, _MAX_BYTES // itemsize)
        num_wide = -(-num_rows // most_wide) * (columns // 128)
        enough = _READING if num_rows <= _FEW_ROWS else cls.num_sms
        if block_side % 128 or num_wide < enough:  # narrow ones, to occupy more
            width, most = 64, 2 * _MAX_NARROW_ROWS
        else:
            width, most = 128, most_wide
        # as few tiles as can be, then as small as can be
        row_tiles = -(-num_rows // most)
        rows = -(-num_rows // (row_tiles * (128 // width)))
        if rows <= 64:  # keep many copies under way
            return cls(width, _round_up(rows, 8), stages=8, parts=1)
        return cls(width, _round_up(rows, 8 * cls.parts))

    @property
    def rows_of_tile(self) -> int:
        """Rows of x in a tile, of both warpgroups."""
        return self.rows * (128 // self.columns)

    def order(self, num_units: int, row_tiles: int) -> Order:
        """The order of the tiles.

        Of the windows that occupy most programs, it has the one nearest to what is
        asked for.

        Args:
          num_units: tiles along the columns.
          row_tiles: tiles along the rows.

        Example:
          >>> tiles = Tiles.default(8192, 128, columns=8192)
          >>> tiles.order(64, 32)
          Order(window=4, across=33)
          >>> [tiles.order(*shape).window for shape in [(16, 32), (64, 1)]]
          [8, 1]
        """
        found = [
            Order(n, min(self.num_sms // n, num_units))
            for n in range(1, min(row_tiles, self.num_sms) + 1)
        ]

        def occupied(order):
            rows = _round_up(row_tiles, order.window)  # some beyond the last
            return round(order.programs * row_tiles / rows, 6)

        def rank(order):
            return occupied(order), -abs(order.window - self.window)

        return max(found, key=rank)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

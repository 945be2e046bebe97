"""The tiles of dw: the blocks and rows of each, and how it is loaded and summed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.formats import BlockMask
from sparsejax.ops._warpgroups import COMPUTING
from sparsejax.ops.block_matmul._pipeline import DEPTH, Task
from sparsejax.ops.block_matmul._schedule import add_up, nth_kept
from sparsejax.ops.block_matmul._split import Split

SUMS = 2  # blocks for which a warpgroup adds up at a time


@dataclasses.dataclass(frozen=True)
class Grid:
    """The sizes of the work.

    Attributes:
      block_shape: `(height, width)`.
      blocks: rows and columns of blocks.
      capacity: of the list of a row.
      num_places: blocks of the result; of a compact one those that it has room for.
      compact: whether the result is kept blocks alone.
      steps: of a tile, of 64 rows of x and dy each.
    """

    block_shape: tuple[int, int]
    blocks: tuple[int, int]
    capacity: int
    num_places: int
    compact: bool
    steps: int

    @classmethod
    def of(cls, num_rows: int, mask: BlockMask, w: jax.Array) -> "Grid":
        rows, columns = mask.blocks_shape
        compact = w.ndim == 3
        return cls(
            mask.block_shape,
            (rows, columns),
            mask.indices.shape[1],
            len(w) if compact else rows * columns,
            compact,
            num_rows // DEPTH,
        )

    @property
    def together(self) -> bool:
        """Whether the warpgroups share a block."""
        return self.block_shape[0] % 128 == 0

    @property
    def x_columns(self) -> int:
        return 128 if self.together else DEPTH

    @property
    def columns(self) -> int:
        return 64 if self.block_shape[1] % 128 else 128

    @property
    def in_tile(self) -> int:
        """Blocks of a tile."""
        return SUMS if self.together else COMPUTING * SUMS

    @property
    def across(self) -> int:
        """Tiles side by side in a block."""
        return self.block_shape[1] // self.columns

    @property
    def parts(self) -> int:
        """Tiles of a block."""
        return self.block_shape[0] // self.x_columns * self.across

    @property
    def most_tiles(self) -> int:
        of_row = -(-self.capacity // self.in_tile)
        return min(self.num_places, self.blocks[0] * of_row) * self.parts

    @property
    def slot_bytes(self) -> int:
        return 2 * DEPTH * (self.x_columns + self.in_tile * self.columns)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one program knows of the tiles, and how it computes one.

    A tile is `(row, group, part, first step, steps, number)`: of a row of blocks the
    group-th blocks, of each a part. `number` is that of its piece, or, where all pieces
    are added up, that of the tile among those that are cut; -1 for a tile that is not.
    """

    grid: Grid
    refs: dict[str, Any]
    programs: int
    cut: bool

    @property
    def program(self) -> jax.Array:
        return jax.lax.axis_index("program")

    def length(self, row):
        return self.refs["num"][row]

    def groups(self, row):
        """How many tiles the blocks of a row make."""
        in_tile = self.grid.in_tile
        return jax.lax.div(self.length(row) + in_tile - 1, in_tile)

    def mine(self, number):
        """How many of so many are this program's, every `programs`-th."""
        return jax.lax.div(number - self.program + self.programs - 1, self.programs)

    def num_tiles(self):
        return add_up(self.groups, self.grid.blocks[0]) * self.grid.parts

    def split(self, num_tiles) -> Split:
        if not self.cut:
            return Split.none(num_tiles, self.grid.steps)
        return Split.of(num_tiles, self.grid.steps, self.programs)

    @property
    def start(self):
        """The first state, see `nth_kept`."""
        return jnp.int32(-1), jnp.int32(0), jnp.int32(0)

    def find(self, state, number):
        """The next state, and row, group and part of a tile; see `nth_kept`."""
        n = jax.lax.div(number, self.grid.parts)
        part = jax.lax.rem(number, self.grid.parts)
        state, row, group = nth_kept(state, n, self.groups, *self.grid.blocks)
        return state, (row, group, part)

    def corner(self, part):
        """The first row and column of a part within its block."""
        row = jax.lax.div(part, self.grid.across)
        column = jax.lax.rem(part, self.grid.across)
        return row * self.grid.x_columns, column * self.grid.columns

    def source(self, tile, step):
        row, group, *_ = tile
        last = self.length(row) - 1
        return tuple(
            self.refs["indices"][row, jnp.minimum(group * self.grid.in_tile + i, last)]
            for i in range(self.grid.in_tile)
        )

    def load(self, tile, source, step, slot, full):
        row, _, part, first, *_ = tile
        (height, width), refs = self.grid.block_shape, self.refs
        down, right = self.corner(part)
        rows = pl.ds((first + step) * DEPTH, DEPTH)
        from_x = refs["x"].at[rows, pl.ds(row * height + down, self.grid.x_columns)]
        plgpu.copy_gmem_to_smem(from_x, refs["x_ring"].at[slot], full)
        for i, column in enumerate(source):
            at = pl.ds(column * width + right, self.grid.columns)
            to = refs["dy_ring"].at[slot, i]
            plgpu.copy_gmem_to_smem(refs["dy"].at[rows, at], to, full)

    def multiply(self, sums, slot, warpgroup):
        rows = self.refs["x_ring"].at[slot]
        if self.grid.together:
            rows = rows.at[:, pl.ds(warpgroup * DEPTH, DEPTH)]
        for i, of_block in enumerate(sums):
            block = i if self.grid.together else warpgroup * SUMS + i
            plgpu.wgmma(of_block, rows.T, self.refs["dy_ring"].at[slot, block])

    def task(self, walk, finish, store, **kwargs) -> Task:
        return Task(
            walk,
            lambda tile: tile[4],
            self.source,
            self.load,
            self.multiply,
            finish,
            store,
            **kwargs,
        )

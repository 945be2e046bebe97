"""The kernel for Hopper that computes dw at kept blocks, and writes zeros elsewhere."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax.formats import BlockMask, block_slots
from sparsejax.ops._warpgroups import COMPUTING, smem
from sparsejax.ops.block_matmul._aside import is_listed, spread_out
from sparsejax.ops.block_matmul._pipeline import DEPTH, Task, run
from sparsejax.ops.block_matmul._schedule import add_up, nth_kept
from sparsejax.ops.block_matmul._split import Split, may_cut

_SUMS = 2  # blocks for which a warpgroup adds up at a time
_RING_BYTES = 200 * 1024
_COPYING_REGISTERS = 40  # more than for y, to look for zeros


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work of dw is cut.

    Attributes:
      stages: slots of the ring, of 64 rows of x and dy each; fewer where there is not
        as much shared memory.
      num_sms: multiprocessors of the device.
    """

    stages: int = 5
    num_sms: int = 132


def grad_w(
    x: jax.Array,
    dy: jax.Array,
    block_mask: BlockMask,
    w: jax.Array,
    *,
    tiles: Tiles | None = None,
) -> jax.Array:
    """`x.T @ dy` at kept blocks, 0 elsewhere; see `Products`.

    A tile is 128 rows of two blocks of a row, 64 rows for each warpgroup; or, if a
    block has not as many, 64 rows of four blocks, two for each: what is read of x is
    used that often, as the second level of cache has no more to give. Where a row has
    no more blocks, what is computed is not stored. The warpgroup that loads writes the
    zeros, from shared memory, a few between any two loads: they cost no time of their
    own.

    With thousands of rows, tiles that would leave most programs idle are cut along the
    rows, see `_split`: a kernel before this one computes their pieces, which take 35 MB
    while both run.
    """
    tiles = tiles or Tiles()
    pad = -len(x) % DEPTH
    if pad:
        x, dy = (jnp.pad(a, ((0, pad), (0, 0))) for a in (x, dy))
    grid = _Grid.of(len(x), block_mask, w)
    operands = {"x": x, "dy": dy, "num": block_mask.num, "indices": block_mask.indices}
    cut = may_cut(grid.steps, tiles.num_sms)
    programs = tiles.num_sms if cut else min(tiles.num_sms, grid.most_tiles)
    settings = {
        "sums_shape": (DEPTH, grid.columns),
        "num_sums": _SUMS,
        "no_tile": (-1, 0, 0, 0, 0, 0),
        "stages": max(2, min(tiles.stages, _RING_BYTES // grid.slot_bytes)),
        "copies": 1 + grid.in_tile,
        "programs": programs,
        "copying_registers": _COPYING_REGISTERS,
    }
    stages = settings["stages"]
    rings = {
        "x_ring": smem((stages, DEPTH, grid.x_columns), x.dtype),
        "dy_ring": smem((stages, grid.in_tile, DEPTH, grid.columns), x.dtype),
    }

    def make_pieces(refs):
        return _pieces(_Work(grid, refs, programs, cut))

    def make_tiles(refs):
        return _tiles(_Work(grid, refs, programs, cut), w.dtype)

    if cut:
        shape = (2 * programs, COMPUTING, _SUMS, DEPTH, grid.columns)
        out_type = jax.ShapeDtypeStruct(shape, jnp.float32)
        operands["pieces"] = run(
            make_pieces, operands=operands, out_type=out_type, scratch=rings, **settings
        )
    if grid.compact:
        operands["slots"] = block_slots(block_mask)[0]
    return run(
        make_tiles,
        operands=operands,
        out_type=jax.ShapeDtypeStruct(w.shape, w.dtype),
        scratch={
            **rings,
            "staging": smem((COMPUTING, DEPTH, DEPTH), w.dtype),
            "zeros": smem((DEPTH, DEPTH), w.dtype),
        },
        **settings,
    )


@dataclasses.dataclass(frozen=True)
class _Grid:
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
    def of(cls, num_rows: int, mask: BlockMask, w: jax.Array) -> "_Grid":
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
        return _SUMS if self.together else COMPUTING * _SUMS

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
        return self.num_places * self.parts

    @property
    def slot_bytes(self) -> int:
        return 2 * DEPTH * (self.x_columns + self.in_tile * self.columns)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What one program knows of the tiles, and how it computes one.

    A tile is `(row, group, part, first step, steps, number)`: of a row of blocks the
    group-th blocks, of each a part. `number` is that of its piece, or, where all pieces
    are added up, that of the tile among those that are cut; -1 for a tile that is not.
    """

    grid: _Grid
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
            return Split(num_tiles, jnp.int32(0), self.grid.steps, self.programs)
        return Split.of(num_tiles, self.grid.steps, self.programs)

    def find(self, state, number):
        """The next state, and row, group and part of a tile; see `nth_kept`."""
        n = jax.lax.div(number, self.grid.parts)
        part = jax.lax.rem(number, self.grid.parts)
        state, row, group = nth_kept(state, n, self.groups, *self.grid.blocks)
        return state, (row, group, part)

    def walk(self, tile, visit, carry, first, last):
        """Visits `tile(state, i)`, which gives the next state too, for i from first."""

        def of_tile(i, state_and_carry):
            state, carry = state_and_carry
            state, found = tile(state, i)
            return state, visit(found, carry)

        start = jnp.int32(-1), jnp.int32(0), jnp.int32(0)
        return jax.lax.fori_loop(first, last, of_tile, (start, carry))[1]

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
            block = i if self.grid.together else warpgroup * _SUMS + i
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


def _pieces(work: _Work) -> Task:
    """Adds up this program's run of the steps of all tiles that are cut."""
    split, steps = work.split(work.num_tiles()), work.grid.steps
    begin, end = split.run(work.program)

    def tile(state, n):
        state, found = work.find(state, split.whole + n)
        first = jnp.maximum(begin - n * steps, 0)
        last = jnp.minimum(end - n * steps, steps)
        return state, (*found, first, last - first, split.piece(work.program, n))

    def walk(visit, carry):
        first = jax.lax.div(begin, steps)
        last = jnp.where(end > begin, jax.lax.div(end - 1, steps) + 1, first)
        return work.walk(tile, visit, carry, first, last)

    def finish(tile, sums, number, warpgroup):
        work.refs["out"][tile[5], warpgroup, number] = sums

    return work.task(walk, finish, store=lambda *_: None, parts=0)


def _tiles(work: _Work, dtype) -> Task:
    """Computes every `programs`-th tile, or adds up its pieces; and stores it."""
    grid, refs = work.grid, work.refs
    (height, width), (block_rows, block_columns) = grid.block_shape, grid.blocks
    split = work.split(work.num_tiles())

    def tile(state, i):
        number = work.program + i * work.programs
        state, found = work.find(state, number)
        is_whole = number < split.whole
        steps = jnp.where(is_whole, grid.steps, 0)
        which = jnp.where(is_whole, -1, number - split.whole)
        return state, (*found, jnp.int32(0), steps, which)

    def walk(visit, carry):
        last = work.mine(split.whole + split.left)
        return work.walk(tile, visit, carry, jnp.int32(0), last)

    def finish(tile, sums, number, warpgroup):
        if not work.cut:
            return sums.astype(dtype)
        n = tile[5]
        first, last = split.programs_of(n)

        def add(program, sums):
            piece = split.piece(program, n)
            found = _compat.mosaic_gpu_load(
                plgpu,
                refs["pieces"].at[piece, warpgroup, number],
                plgpu.Layout.WGMMA,
            )
            return sums + found

        last = jnp.where(n < 0, first, last)  # of a whole tile there are no pieces
        return jax.lax.fori_loop(first, last, add, sums).astype(dtype)

    def target(row, column, place):
        """A block in the result."""
        if grid.compact:
            return refs["out"].at[place]
        return refs["out"].at[pl.ds(row * height, height), pl.ds(column * width, width)]

    def store(tile, values, number, warpgroup):
        row, group, part = tile[:3]
        down, right = work.corner(part)
        i, piece = divmod(number, grid.columns // DEPTH)
        entry = group * grid.in_tile + i
        if grid.together:
            down += warpgroup * DEPTH
        else:
            entry += warpgroup * _SUMS
        exists = entry < work.length(row)
        entry = jnp.minimum(entry, work.length(row) - 1)
        place = refs["slots"][row, entry] if grid.compact else jnp.int32(0)
        exists &= place < grid.num_places
        staging = refs["staging"].at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = values[i][:, piece * DEPTH : (piece + 1) * DEPTH]
        plgpu.commit_smem()

        @pl.when(exists)
        def _():
            block = target(row, refs["indices"][row, entry], place)
            to = pl.ds(down, DEPTH), pl.ds(right + piece * DEPTH, DEPTH)
            plgpu.copy_smem_to_gmem(staging, block.at[to])

    kept = jnp.int32(0)
    if grid.compact:
        kept = jnp.minimum(add_up(work.length, block_rows), grid.num_places)

    def write_zeros(i):
        """Where the i-th place that this program looks at is to be 0."""
        number = work.program + i * work.programs
        row = jax.lax.div(number, block_columns)
        column = jax.lax.rem(number, block_columns)

        def copy():
            block = target(row, column, kept + number)
            for down in range(0, height, DEPTH):
                for right in range(0, width, DEPTH):
                    to = block.at[pl.ds(down, DEPTH), pl.ds(right, DEPTH)]
                    plgpu.copy_smem_to_gmem(refs["zeros"], to)

        if grid.compact:
            copy()
        else:
            listed = is_listed(
                lambda i: refs["indices"][row, i],
                work.length(row),
                grid.capacity,
                column,
            )
            pl.when(~listed)(copy)

    aside = spread_out(
        refs["zeros"],
        write_zeros,
        num=work.mine(grid.num_places - kept),
        num_steps=work.mine(split.whole) * grid.steps,
    )
    parts = _SUMS * grid.columns // DEPTH
    return work.task(walk, finish, store, parts=parts, aside=aside)

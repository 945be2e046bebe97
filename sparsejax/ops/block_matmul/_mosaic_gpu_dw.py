"""The kernel for Hopper that computes dw at kept blocks, and writes zeros elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax.formats import BlockMask, block_slots
from sparsejax.ops._hopper import NUM_SMS, SHARED_BYTES
from sparsejax.ops._warpgroups import COMPUTING, smem
from sparsejax.ops.block_matmul._aside import is_listed, spread_out
from sparsejax.ops.block_matmul._dw_tiles import SUMS, Grid, Work
from sparsejax.ops.block_matmul._pipeline import DEPTH, Task, run
from sparsejax.ops.block_matmul._schedule import add_up
from sparsejax.ops.block_matmul._split import may_cut, most_pieces


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work of dw is cut.

    Attributes:
      stages: slots of the ring, of 64 rows of x and dy each; fewer where there is not
        as much shared memory.
      num_sms: multiprocessors of the device.
      cut: whether tiles that would leave many programs idle are cut along the rows, see
        `_split`: a kernel before computes their pieces, which take 35 MB while both
        run. On an H200 up to twice as fast where there are fewer than two tiles for a
        program, as in most FFNs, and at most 6 % slower with more.
    """

    stages: int = 5
    num_sms: int = NUM_SMS
    cut: bool = True


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
    """
    tiles = tiles or Tiles()
    pad = -len(x) % DEPTH
    if pad:
        x, dy = (jnp.pad(a, ((0, pad), (0, 0))) for a in (x, dy))
    grid = Grid.of(len(x), block_mask, w)
    operands = {"x": x, "dy": dy, "num": block_mask.num, "indices": block_mask.indices}
    cut = tiles.cut and may_cut(grid.steps)
    programs = tiles.num_sms if cut else min(tiles.num_sms, grid.most_tiles)
    settings = {
        "sums_shape": (DEPTH, grid.columns),
        "num_sums": SUMS,
        "no_tile": (-1, 0, 0, 0, 0, 0),
        "stages": max(2, min(tiles.stages, SHARED_BYTES // grid.slot_bytes)),
        "copies": 1 + grid.in_tile,
        "programs": programs,
    }
    stages = settings["stages"]
    rings = {
        "x_ring": smem((stages, DEPTH, grid.x_columns), x.dtype),
        "dy_ring": smem((stages, grid.in_tile, DEPTH, grid.columns), x.dtype),
    }

    def make_pieces(refs):
        return _pieces(Work(grid, refs, programs, cut))

    def make_tiles(refs):
        return _tiles(Work(grid, refs, programs, cut), w.dtype)

    if cut:
        shape = (most_pieces(programs), COMPUTING, SUMS, DEPTH, grid.columns)
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


def _pieces(work: Work) -> Task:
    """Adds up every `programs`-th piece of the tiles that are cut."""
    split = work.split(work.num_tiles())

    def walk(visit, carry):
        def of_piece(i, carry):
            number = work.program + i * work.programs
            n, first, num_steps = split.piece(number)
            _, tile = work.find(work.start, split.whole + n)
            return visit((*tile, first, num_steps, number), carry)

        return jax.lax.fori_loop(0, work.mine(split.num_pieces), of_piece, carry)

    def finish(tile, sums, number, warpgroup):
        work.refs["out"][tile[5], warpgroup, number] = sums

    return work.task(walk, finish, store=lambda *_: None, parts=0)


def _tiles(work: Work, dtype) -> Task:
    """Computes every `programs`-th tile, or adds up its pieces; and stores it."""
    grid, refs = work.grid, work.refs
    (height, width), (block_rows, block_columns) = grid.block_shape, grid.blocks
    split = work.split(work.num_tiles())

    def walk(visit, carry):
        def of_tile(i, state_and_carry):
            state, carry = state_and_carry
            number = work.program + i * work.programs
            state, found = work.find(state, number)
            is_whole = number < split.whole
            num_steps = jnp.where(is_whole, grid.steps, 0)
            which = jnp.where(is_whole, -1, number - split.whole)
            return state, visit((*found, jnp.int32(0), num_steps, which), carry)

        num = work.mine(split.whole + split.left)
        return jax.lax.fori_loop(0, num, of_tile, (work.start, carry))[1]

    def finish(tile, sums, number, warpgroup):
        if not work.cut:
            return sums.astype(dtype)
        n = tile[5]

        def add(part, sums):
            found = _compat.mosaic_gpu_load(
                plgpu,
                refs["pieces"].at[split.number(n, part), warpgroup, number],
                plgpu.Layout.WGMMA,
            )
            return sums + found

        parts = jnp.where(n < 0, 0, split.parts)  # of a whole tile there are no pieces
        return jax.lax.fori_loop(0, parts, add, sums).astype(dtype)

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
            entry += warpgroup * SUMS
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
        """Writes zeros to the i-th place of this program, if no kept block is there."""
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
    parts = SUMS * grid.columns // DEPTH
    return work.task(walk, finish, store, parts=parts, aside=aside)

"""The kernel for Hopper that computes dw at kept blocks, and writes zeros elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.formats import BlockMask, block_slots
from sparsejax.ops._warpgroups import COMPUTING, smem
from sparsejax.ops.block_matmul._aside import is_listed, spread_out
from sparsejax.ops.block_matmul._pipeline import DEPTH, Task, run
from sparsejax.ops.block_matmul._schedule import add_up, nth_kept

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
    """
    tiles = tiles or Tiles()
    pad = -len(x) % DEPTH
    if pad:
        x, dy = (jnp.pad(a, ((0, pad), (0, 0))) for a in (x, dy))
    height, width = block_mask.block_shape
    block_rows, block_columns = block_mask.blocks_shape
    capacity = block_mask.indices.shape[1]
    columns = 64 if width % 128 else 128
    together = height % 128 == 0  # the warpgroups share a block
    across = width // columns
    parts = height // (128 if together else DEPTH) * across  # tiles of a block
    in_tile = _SUMS if together else COMPUTING * _SUMS  # blocks
    compact = w.ndim == 3
    num_places = len(w) if compact else block_rows * block_columns
    programs = min(tiles.num_sms, num_places * parts)
    steps_of_tile = len(x) // DEPTH
    x_columns = 128 if together else DEPTH
    slot_bytes = 2 * DEPTH * (x_columns + in_tile * columns)
    stages = max(2, min(tiles.stages, _RING_BYTES // slot_bytes))

    def make_task(refs):
        x_ring, dy_ring, staging = refs["x_ring"], refs["dy_ring"], refs["staging"]
        program = jax.lax.axis_index("program")

        def length(row):
            return refs["num"][row]

        def groups(row):
            """How many tiles the blocks of a row make."""
            return jax.lax.div(length(row) + in_tile - 1, in_tile)

        def mine(number):
            """How many of so many are this program's, every `programs`-th."""
            return jax.lax.div(number - program + programs - 1, programs)

        num_tiles = mine(add_up(groups, block_rows) * parts)

        def walk(visit, carry):
            """A tile is `(row, group, part)`."""

            def of_tile(t, state_and_carry):
                state, carry = state_and_carry
                number = program + t * programs
                n, part = jax.lax.div(number, parts), jax.lax.rem(number, parts)
                state, row, group = nth_kept(
                    state, n, groups, block_rows, block_columns
                )
                return state, visit((row, group, part), carry)

            start = jnp.int32(-1), jnp.int32(0), jnp.int32(0)
            return jax.lax.fori_loop(0, num_tiles, of_tile, (start, carry))[1]

        def corner(part):
            """The first row and column of a part within its block."""
            row, column = jax.lax.div(part, across), jax.lax.rem(part, across)
            return row * x_columns, column * columns

        def target(row, column, place):
            """A block in the result."""
            if compact:
                return refs["out"].at[place]
            return refs["out"].at[
                pl.ds(row * height, height), pl.ds(column * width, width)
            ]

        def source(tile, step):
            row, group, _ = tile
            last = length(row) - 1
            return tuple(
                refs["indices"][row, jnp.minimum(group * in_tile + i, last)]
                for i in range(in_tile)
            )

        def load(tile, source, step, slot, full):
            row, _, part = tile
            down, right = corner(part)
            rows = pl.ds(step * DEPTH, DEPTH)
            from_x = refs["x"].at[rows, pl.ds(row * height + down, x_columns)]
            plgpu.copy_gmem_to_smem(from_x, x_ring.at[slot], full)
            for i, column in enumerate(source):
                at = pl.ds(column * width + right, columns)
                plgpu.copy_gmem_to_smem(
                    refs["dy"].at[rows, at], dy_ring.at[slot, i], full
                )

        def multiply(sums, slot, warpgroup):
            rows = x_ring.at[slot]
            if together:
                rows = rows.at[:, pl.ds(warpgroup * DEPTH, DEPTH)]
            for i, of_block in enumerate(sums):
                block = i if together else warpgroup * _SUMS + i
                plgpu.wgmma(of_block, rows.T, dy_ring.at[slot, block])

        def finish(tile, sums, warpgroup):
            return sums.astype(w.dtype)

        def store(tile, values, number, warpgroup):
            row, group, part = tile
            down, right = corner(part)
            i, piece = divmod(number, columns // DEPTH)
            entry = group * in_tile + i
            if together:
                down += warpgroup * DEPTH
            else:
                entry += warpgroup * _SUMS
            exists = entry < length(row)
            entry = jnp.minimum(entry, length(row) - 1)
            place = None
            if compact:
                place = refs["slots"][row, entry]
                exists &= place < num_places
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staging[warpgroup] = values[i][:, piece * DEPTH : (piece + 1) * DEPTH]
            plgpu.commit_smem()

            @pl.when(exists)
            def _():
                block = target(row, refs["indices"][row, entry], place)
                to = pl.ds(down, DEPTH), pl.ds(right + piece * DEPTH, DEPTH)
                plgpu.copy_smem_to_gmem(staging.at[warpgroup], block.at[to])

        kept = jnp.minimum(add_up(length, block_rows), num_places) if compact else 0

        def write_zeros(i):
            """Where the i-th place that this program looks at is to be 0."""
            number = program + i * programs
            row = jax.lax.div(number, block_columns)
            column = jax.lax.rem(number, block_columns)

            def copy():
                block = target(row, column, kept + number)
                for down in range(0, height, DEPTH):
                    for right in range(0, width, DEPTH):
                        to = block.at[pl.ds(down, DEPTH), pl.ds(right, DEPTH)]
                        plgpu.copy_smem_to_gmem(refs["zeros"], to)

            if compact:
                copy()
            else:
                listed = is_listed(
                    lambda i: refs["indices"][row, i], length(row), capacity, column
                )
                pl.when(~listed)(copy)

        aside = spread_out(
            refs["zeros"],
            write_zeros,
            num=mine(num_places - kept),
            num_steps=num_tiles * steps_of_tile,
        )
        return Task(
            walk,
            lambda tile: jnp.int32(steps_of_tile),
            source,
            load,
            multiply,
            finish,
            store,
            parts=_SUMS * columns // DEPTH,
            aside=aside,
        )

    operands = {"x": x, "dy": dy, "num": block_mask.num, "indices": block_mask.indices}
    if compact:
        operands["slots"] = block_slots(block_mask)[0]
    return run(
        make_task,
        operands=operands,
        out_type=jax.ShapeDtypeStruct(w.shape, w.dtype),
        scratch={
            "x_ring": smem((stages, DEPTH, x_columns), x.dtype),
            "dy_ring": smem((stages, in_tile, DEPTH, columns), x.dtype),
            "staging": smem((COMPUTING, DEPTH, DEPTH), w.dtype),
            "zeros": smem((DEPTH, DEPTH), w.dtype),
        },
        sums_shape=(DEPTH, columns),
        num_sums=_SUMS,
        no_tile=(-1, 0, 0),
        stages=stages,
        copies=1 + in_tile,
        programs=programs,
        copying_registers=_COPYING_REGISTERS,
    )

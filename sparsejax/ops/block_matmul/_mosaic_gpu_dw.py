"""The kernel for Hopper that computes dw at kept blocks, and writes zeros elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.formats import BlockMask
from sparsejax.ops._warpgroups import smem
from sparsejax.ops.block_matmul._pipeline import DEPTH, Task, run
from sparsejax.ops.block_matmul._schedule import kept_first


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work of dw is cut.

    Attributes:
      stages: slots of the ring, of 64 rows of x and dy each.
      num_sms: multiprocessors of the device.
    """

    stages: int = 6
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

    A tile is 128 rows of a block, 64 for each warpgroup; or, if a block has not as
    many, 64 rows of two blocks, one for each.
    """
    tiles = tiles or Tiles()
    pad = -len(x) % DEPTH
    if pad:
        x, dy = (jnp.pad(a, ((0, pad), (0, 0))) for a in (x, dy))
    height, width = block_mask.block_shape
    columns = 64 if width % 128 else 128
    together = height % 128 == 0  # the warpgroups share a block
    across = width // columns
    down = height // (128 if together else DEPTH)
    parts = down * across  # tiles of a block
    order, num_kept = kept_first(block_mask)
    compact = w.ndim == 3
    if compact:
        order, places = _by_place(order, num_kept, block_mask, len(w))
    else:
        places = order
    num_pieces = len(order) * parts  # that a warpgroup or both compute
    num_tiles = num_pieces if together else -(-num_pieces // 2)
    programs = min(tiles.num_sms, num_tiles)
    block_columns = block_mask.blocks_shape[1]
    num_steps_of_kept = len(x) // DEPTH

    def make_task(refs):
        x_ring, dy_ring, staging = refs["x_ring"], refs["dy_ring"], refs["staging"]

        def walk(visit, carry):
            program = jax.lax.axis_index("program")
            mine = jax.lax.div(num_tiles - program + programs - 1, programs)

            def of_tile(t, carry):
                return visit((program + t * programs,), carry)

            return jax.lax.fori_loop(0, mine, of_tile, carry)

        def numbered(tile, warpgroup):  # the last of two may be one too many
            return tile[0] if together else 2 * tile[0] + warpgroup

        def piece(tile, warpgroup):
            """Which block, by its place in the order, and which tile of it."""
            number = jnp.minimum(numbered(tile, warpgroup), num_pieces - 1)
            return jax.lax.div(number, parts), jax.lax.rem(number, parts)

        def corner(part, warpgroup):
            """The first row and column, within the block, of what a warpgroup sums."""
            row, column = jax.lax.div(part, across), jax.lax.rem(part, across)
            if together:
                return row * 128 + warpgroup * DEPTH, column * columns
            return row * DEPTH, column * columns

        def num_steps(tile):
            kept = (
                piece(tile, 0)[0] < refs["kept"][0]
            )  # the first of the two is kept too
            return jnp.where(kept, num_steps_of_kept, 0)

        def load(tile, step, slot, full):
            rows = pl.ds(step * DEPTH, DEPTH)
            for warpgroup in range(2):
                at, part = piece(tile, warpgroup)
                row, column = corner(part, warpgroup)
                block = refs["order"][at]
                row += jax.lax.div(block, block_columns) * height
                column += jax.lax.rem(block, block_columns) * width
                source = refs["x"].at[rows, pl.ds(row, DEPTH)]
                plgpu.copy_gmem_to_smem(source, x_ring.at[slot, warpgroup], full)
                if warpgroup == 0 or not together:
                    source = refs["dy"].at[rows, pl.ds(column, columns)]
                    plgpu.copy_gmem_to_smem(source, dy_ring.at[slot, warpgroup], full)

        def multiply(sums, slot, warpgroup):
            dy_tile = dy_ring.at[slot, 0 if together else warpgroup]
            plgpu.wgmma(sums, x_ring.at[slot, warpgroup].T, dy_tile)

        def store(tile, sums, warpgroup):
            at, part = piece(tile, warpgroup)
            sums = jnp.where(at < refs["kept"][0], sums, 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staging[warpgroup] = sums.astype(w.dtype)
            plgpu.commit_smem()
            row, column = corner(part, warpgroup)
            place = refs["places"][at]
            if compact:
                to = refs["out"].at[place]
            else:
                to = refs["out"]
                row += jax.lax.div(place, block_columns) * height
                column += jax.lax.rem(place, block_columns) * width
            to = to.at[pl.ds(row, DEPTH), pl.ds(column, columns)]

            @pl.when(numbered(tile, warpgroup) < num_pieces)
            def _():
                plgpu.copy_smem_to_gmem(staging.at[warpgroup], to)

        return Task(walk, num_steps, load, multiply, store)

    operands = {"x": x, "dy": dy, "order": order, "places": places}
    return run(
        make_task,
        operands=operands | {"kept": num_kept.reshape(1)},
        out_type=jax.ShapeDtypeStruct(w.shape, w.dtype),
        scratch={
            "x_ring": smem((tiles.stages, 2, DEPTH, DEPTH), x.dtype),
            "dy_ring": smem(
                (tiles.stages, 1 if together else 2, DEPTH, columns), x.dtype
            ),
            "staging": smem((2, DEPTH, columns), w.dtype),
        },
        sums_shape=(DEPTH, columns),
        stages=tiles.stages,
        copies=3 if together else 4,
        programs=programs,
    )


def _by_place(order, num_kept, block_mask, capacity):
    """The order cut to a capacity, and where in the values each of its blocks stands.

    Kept blocks stand in row-major order; the places beyond them are left for zeros.
    """
    rank = jnp.cumsum(block_mask.to_blocks().reshape(-1), dtype=jnp.int32) - 1
    at = jnp.arange(capacity, dtype=jnp.int32)
    order = jnp.pad(order, (0, max(0, capacity - len(order))))[:capacity]
    return order, jnp.where(at < num_kept, rank[order], at)

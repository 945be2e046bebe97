"""The kernels for Hopper: one for y and dx, one for dw, both over kept blocks alone.

y and dx are one kernel: each tile of the result belongs to a block column (a block row
for dx) and sums over the blocks in its list. It computes the transposed tile, so that
the tensor cores see the block as their first operand and up to 256 rows of x as the
second: a block of 64 or 128 then still gives the widest product, a small batch a narrow
one, and neither operand is moved or transposed in memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax.formats import BlockMask, block_slots
from sparsejax.ops._activations import Activation, without_custom_rules
from sparsejax.ops._warpgroups import COMPUTING, smem
from sparsejax.ops.block_matmul import _mosaic_gpu_dw
from sparsejax.ops.block_matmul._gradients import Products, differentiable
from sparsejax.ops.block_matmul._pipeline import DEPTH, Task, run
from sparsejax.ops.block_matmul._plan import Plan
from sparsejax.ops.block_matmul._reference import epilogue
from sparsejax.ops.block_matmul._tiles import Tiles

_DTYPES = (jnp.bfloat16, jnp.float16)


def unsupported_reason(x, w, block_mask, bias, full_dw=False) -> str | None:
    """Why these kernels cannot take these operands; None if they can.

    Args:
      x: `[num_rows, d_in]`; of all operands shapes and dtypes are read.
      w: `[d_in, d_out]` or `[capacity, height, width]`.
      block_mask: of `w`.
      bias: `[d_out]` or None.
      full_dw: a scalar.

    Returns:
      The reason, or None.
    """
    del w, bias, full_dw
    if x.dtype not in _DTYPES:
        return (
            "`x` and `w` must be bfloat16 or float16, which the tensor cores multiply "
            f"exactly; got {x.dtype}"
        )
    if any(side % DEPTH for side in block_mask.block_shape):
        return (
            f"the sides of a block must be multiples of {DEPTH}; got "
            f"{block_mask.block_shape}"
        )
    if not x.size:
        return f"there must be a row; got shape {x.shape}"
    return None


def forward(
    x: jax.Array,
    w: jax.Array,
    block_mask: BlockMask,
    bias: jax.Array | None,
    activation: Activation | None,
    dtype: Any = None,
    *,
    tiles: Tiles | None = None,
) -> jax.Array:
    """`activation(x @ w + bias)` over the lists by column; see `Products`.

    `dtype` is that of `x` by default.
    """
    dtype = x.dtype if dtype is None else dtype
    side, itemsize = block_mask.block_shape[1], jnp.dtype(dtype).itemsize
    tiles = tiles or Tiles.default(len(x), side, block_mask.shape[1], itemsize)
    return _listed(x, w, block_mask.T, bias, activation, dtype, tiles, w_by_list=False)


def grad_x(
    dy: jax.Array, w: jax.Array, block_mask: BlockMask, *, tiles: Tiles | None = None
) -> jax.Array:
    """`dy @ w.T` over the lists by row; see `Products`."""
    side, d_in = block_mask.block_shape[0], block_mask.shape[0]
    tiles = tiles or Tiles.default(len(dy), side, d_in)
    return _listed(dy, w, block_mask, None, None, dy.dtype, tiles, w_by_list=True)


block_matmul = differentiable(Products(forward, grad_x, _mosaic_gpu_dw.grad_w))


def _listed(x, w, lists, bias, activation, dtype, tiles, *, w_by_list):
    """Sums over the list of each row of blocks of `lists`.

    Args:
      x: `[num_rows, depth]`, the columns of `lists`.
      w: as in the reference.
      lists: the mask, its rows along the columns of the result.
      bias: `[columns]` or None.
      activation: or None.
      dtype: of the result.
      tiles: how the work is cut.
      w_by_list: whether the rows of a block of `w` lie along the rows of `lists`; else
        along its columns.

    Returns:
      `[num_rows, columns]`.
    """
    num_rows = len(x)
    side, depth = lists.block_shape
    num_lists, columns = len(lists.num), lists.shape[0]
    pad = -num_rows % tiles.rows_of_tile
    if pad:
        x = jnp.pad(x, ((0, pad), (0, 0)))
    apart = tiles.columns == DEPTH  # the warpgroups have rows of their own
    units_of_list, substeps = side // tiles.columns, depth // DEPTH
    row_tiles = len(x) // tiles.rows_of_tile
    num_units = num_lists * units_of_list
    plan = Plan(
        tiles.order(num_units, row_tiles),
        num_lists,
        lists.shape[1] // depth,
        units_of_list,
        row_tiles,
        substeps,
        tiles.together,
    )
    part_rows, room = tiles.rows // tiles.parts, min(tiles.parts, tiles.room)
    assert tiles.parts % room == 0, tiles
    fused = activation and without_custom_rules(activation)

    def make_task(refs):
        x_ring, w_ring, staging = refs["x_ring"], refs["w_ring"], refs["staging"]

        def walk(visit, carry):
            def visit_place(row_tile, unit, carry):
                return visit((row_tile * num_units + unit,), carry)

            program = jax.lax.axis_index("program")
            return plan.walk(refs, program, visit_place, carry)

        def place(tile):
            return jax.lax.rem(tile[0], num_units), jax.lax.div(tile[0], num_units)

        def num_steps(tile):
            return refs["num"][jax.lax.div(place(tile)[0], units_of_list)] * substeps

        def source(tile, step):
            of_list = jax.lax.div(place(tile)[0], units_of_list)
            entry = jax.lax.div(step, substeps)
            entry = jnp.minimum(entry, lists.indices.shape[1] - 1)
            index = refs["indices"][of_list, entry]
            return index, refs["slots"][of_list, entry] if w.ndim == 3 else None

        def load(tile, source, step, slot, full):
            unit, row_tile = place(tile)
            index, slot_of_w = source
            substep = jax.lax.rem(step, substeps) * DEPTH
            deep = pl.ds(index * depth + substep, DEPTH)
            rows = pl.ds(row_tile * tiles.rows_of_tile, tiles.rows_of_tile)
            plgpu.copy_gmem_to_smem(refs["x"].at[rows, deep], x_ring.at[slot], full)
            if w.ndim == 2:
                wide = pl.ds(unit * tiles.columns, tiles.columns)
                block, within = refs["w"], deep
            else:
                in_list = jax.lax.rem(unit, units_of_list)
                wide = pl.ds(in_list * tiles.columns, tiles.columns)
                block, within = refs["w"].at[slot_of_w], pl.ds(substep, DEPTH)
            block = block.at[wide, within] if w_by_list else block.at[within, wide]
            plgpu.copy_gmem_to_smem(block, w_ring.at[slot], full)

        def multiply(sums, slot, warpgroup):
            rows, block = x_ring.at[slot], w_ring.at[slot]
            if apart:
                rows = rows.at[pl.ds(warpgroup * tiles.rows, tiles.rows)]
            else:
                mine = pl.ds(warpgroup * DEPTH, DEPTH)
                block = block.at[mine] if w_by_list else block.at[:, mine]
            plgpu.wgmma(sums[0], block if w_by_list else block.T, rows.T)

        def corner(tile, warpgroup):
            """The first row and column of what a warpgroup sums."""
            unit, row_tile = place(tile)
            row, column = row_tile * tiles.rows_of_tile, unit * tiles.columns
            if apart:
                return row + warpgroup * tiles.rows, column
            return row, column + warpgroup * DEPTH

        def finish(tile, sums, number, warpgroup):
            if bias is not None:
                of_tile = _compat.mosaic_gpu_load(
                    plgpu,
                    refs["bias"].at[pl.ds(corner(tile, warpgroup)[1], DEPTH)],
                    plgpu.Layout.WGMMA.reduce(1),
                )
                sums += jax.lax.broadcast_in_dim(
                    of_tile.astype(jnp.float32), sums.shape, [0]
                )
            return epilogue(sums, None, fused).astype(dtype)

        def store(tile, values, part, warpgroup):
            row, column = corner(tile, warpgroup)
            mine = staging.at[warpgroup, part % room]
            piece = values[0][:, part * part_rows : (part + 1) * part_rows]
            piece = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
            # of the others, the copies may go on
            plgpu.wait_smem_to_gmem(room - 1, wait_read_only=True)
            mine.T[...] = piece
            plgpu.commit_smem()
            to = pl.ds(row + part * part_rows, part_rows), pl.ds(column, DEPTH)
            plgpu.copy_smem_to_gmem(mine, refs["out"].at[to])

        return Task(walk, num_steps, source, load, multiply, finish, store, tiles.parts)

    operands = {"x": x, "w": w, "indices": lists.indices} | plan.operands(lists.num)
    if w.ndim == 3:
        slots, slots_t = block_slots(lists if w_by_list else lists.T)
        operands["slots"] = slots if w_by_list else slots_t
    if bias is not None:
        operands["bias"] = bias
    block = (tiles.columns, DEPTH) if w_by_list else (DEPTH, tiles.columns)
    y = run(
        make_task,
        operands=operands,
        out_type=jax.ShapeDtypeStruct((len(x), columns), dtype),
        scratch={
            "x_ring": smem((tiles.stages, tiles.rows_of_tile, DEPTH), x.dtype),
            "w_ring": smem((tiles.stages, *block), x.dtype),
            "staging": smem((COMPUTING, room, part_rows, DEPTH), dtype),
        },
        sums_shape=(DEPTH, tiles.rows),
        num_sums=1,
        no_tile=(-1,),
        stages=tiles.stages,
        copies=2,
        programs=plan.order.programs,
    )
    return y[:num_rows] if pad else y

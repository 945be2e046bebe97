"""The kernels for Hopper: one for y and dx, one for dw, both over kept blocks alone.

y and dx are one kernel: each tile of the result belongs to a block column (a block row
for dx) and sums over the blocks in its list. It computes the transposed tile, so that
the tensor cores see the block as their first operand and up to 256 rows of x as the
second: a block of 64 or 128 then still gives the widest product, a small batch a narrow
one, and neither operand is moved or transposed in memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax.formats import BlockMask, block_slots
from sparsejax.ops._warpgroups import smem
from sparsejax.ops.block_matmul import _mosaic_gpu_dw
from sparsejax.ops.block_matmul._gradients import Products, differentiable
from sparsejax.ops.block_matmul._pipeline import DEPTH, Task, run
from sparsejax.ops.block_matmul._reference import Activation, epilogue
from sparsejax.ops.block_matmul._schedule import shares

_DTYPES = (jnp.bfloat16, jnp.float16)
_MAX_ROWS = 256  # of x in one product, as many as the tensor cores take
_MAX_NARROW_ROWS = 128  # for each warpgroup, so that four slots fit
_STORE_COST = 0.5  # of a tile, in blocks of its list


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work of y and dx is cut.

    Attributes:
      columns: of the result in a tile: 128, 64 for each of two warpgroups; or 64, and
        then each warpgroup has rows of its own.
      rows: of x for one warpgroup, at most 256; a multiple of `8 * parts`.
      stages: slots of the ring.
      parts: in which the rows of a tile are stored, one after the other, so that the
        shared memory for it is as much smaller.
      window: tiles of rows that all programs work on at a time.
      num_sms: multiprocessors of the device.
    """

    columns: int
    rows: int
    stages: int = 4
    parts: int = 2
    window: int = 8
    num_sms: int = 132

    @classmethod
    def default(cls, num_rows: int, block_side: int, columns: int) -> "Tiles":
        """The tiles for these shapes.

        Args:
          num_rows: of x.
          block_side: of a block along the columns of the result.
          columns: of the result.

        Example:
          >>> Tiles.default(8192, 128, columns=8192)
          Tiles(columns=128, rows=256, stages=4, parts=2, window=8, num_sms=132)
          >>> Tiles.default(5, 128, columns=8192)
          Tiles(columns=64, rows=16, stages=8, parts=1, window=8, num_sms=132)
        """
        num_wide = -(-num_rows // _MAX_ROWS) * (columns // 128)
        if block_side % 128 or num_wide < cls.num_sms:  # narrow ones, to occupy all
            width, most = 64, 2 * _MAX_NARROW_ROWS
        else:
            width, most = 128, _MAX_ROWS
        # as few tiles as can be, then as small as can be
        row_tiles = -(-num_rows // most)
        rows = 16 * -(-num_rows // (row_tiles * (128 // width) * 16))
        if rows <= 64:  # bound by reading w: keep many copies under way
            return cls(width, rows, stages=8, parts=1)
        return cls(width, rows)

    @property
    def rows_of_tile(self) -> int:
        """Rows of x in a tile, of both warpgroups."""
        return self.rows * (128 // self.columns)


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
    *,
    tiles: Tiles | None = None,
) -> jax.Array:
    """`activation(x @ w + bias)` over the lists by column; see `Products`."""
    side = block_mask.block_shape[1]
    tiles = tiles or Tiles.default(len(x), side, block_mask.shape[1])
    return _listed(x, w, block_mask.T, bias, activation, tiles, w_by_list=False)


def grad_x(
    dy: jax.Array, w: jax.Array, block_mask: BlockMask, *, tiles: Tiles | None = None
) -> jax.Array:
    """`dy @ w.T` over the lists by row; see `Products`."""
    side, d_in = block_mask.block_shape[0], block_mask.shape[0]
    tiles = tiles or Tiles.default(len(dy), side, d_in)
    return _listed(dy, w, block_mask, None, None, tiles, w_by_list=True)


block_matmul = differentiable(Products(forward, grad_x, _mosaic_gpu_dw.grad_w))


def _listed(x, w, lists, bias, activation, tiles, *, w_by_list):
    """Sums over the list of each row of blocks of `lists`.

    Args:
      x: `[num_rows, depth]`, the columns of `lists`.
      w: as in the reference.
      lists: the mask, its rows along the columns of the result.
      bias: `[columns]` or None.
      activation: or None.
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
    halves, row_parts = tiles.columns // DEPTH, 128 // tiles.columns
    units_of_list, substeps = side // tiles.columns, depth // DEPTH
    row_tiles = len(x) // tiles.rows_of_tile
    window = next(
        n for n in range(min(tiles.window, row_tiles), 0, -1) if not row_tiles % n
    )
    num_units = num_lists * units_of_list
    programs = min(tiles.num_sms, num_units * row_tiles)
    costs = lists.num.astype(jnp.float32) * (depth / 128) + _STORE_COST
    bounds = shares(
        jnp.repeat(costs, units_of_list, total_repeat_length=num_units),
        copies=window,
        windows=row_tiles // window,
        programs=programs,
    )
    slots, slots_t = block_slots(lists if w_by_list else lists.T)
    positions = lists.indices if w.ndim == 2 else slots if w_by_list else slots_t
    part_rows = tiles.rows // tiles.parts
    fused = activation and _compat.without_custom_rules(activation)

    def make_task(refs):
        x_ring, w_ring, staging = refs["x_ring"], refs["w_ring"], refs["staging"]

        def walk(visit, carry):
            program = jax.lax.axis_index("program")

            def of_window(g, carry):
                def of_tile(t, carry):
                    unit = jax.lax.div(t, window)
                    return visit((unit, g * window + jax.lax.rem(t, window)), carry)

                first, last = refs["bounds"][g, program], refs["bounds"][g, program + 1]
                return jax.lax.fori_loop(first, last, of_tile, carry)

            return jax.lax.fori_loop(0, row_tiles // window, of_window, carry)

        def num_steps(tile):
            return refs["num"][jax.lax.div(tile[0], units_of_list)] * substeps

        def load(tile, step, slot, full):
            unit, row_tile = tile
            of_list = jax.lax.div(unit, units_of_list)
            entry, substep = jax.lax.div(step, substeps), jax.lax.rem(step, substeps)
            deep = pl.ds(
                refs["indices"][of_list, entry] * depth + substep * DEPTH, DEPTH
            )
            for part in range(row_parts):
                row = row_tile * tiles.rows_of_tile + part * tiles.rows
                source = refs["x"].at[pl.ds(row, tiles.rows), deep]
                plgpu.copy_gmem_to_smem(source, x_ring.at[slot, part], full)
            for half in range(halves):
                if w.ndim == 2:
                    wide = pl.ds(unit * tiles.columns + half * DEPTH, DEPTH)
                    block, within = refs["w"], deep
                else:
                    in_list = jax.lax.rem(unit, units_of_list)
                    wide = pl.ds(in_list * tiles.columns + half * DEPTH, DEPTH)
                    block = refs["w"].at[refs["positions"][of_list, entry]]
                    within = pl.ds(substep * DEPTH, DEPTH)
                source = block.at[wide, within] if w_by_list else block.at[within, wide]
                plgpu.copy_gmem_to_smem(source, w_ring.at[slot, half], full)

        def multiply(sums, slot, warpgroup):
            block = w_ring.at[slot, warpgroup if halves == 2 else 0]
            rows = x_ring.at[slot, warpgroup if row_parts == 2 else 0]
            plgpu.wgmma(sums, block if w_by_list else block.T, rows.T)

        def store(tile, sums, warpgroup):
            unit, row_tile = tile
            row = row_tile * tiles.rows_of_tile
            column = unit * tiles.columns
            if halves == 2:
                column += warpgroup * DEPTH
            else:
                row += warpgroup * tiles.rows
            if bias is not None:
                of_tile = _compat.mosaic_gpu_load(
                    plgpu,
                    refs["bias"].at[pl.ds(column, DEPTH)],
                    plgpu.Layout.WGMMA.reduce(1),
                )
                sums += jax.lax.broadcast_in_dim(
                    of_tile.astype(jnp.float32), sums.shape, [0]
                )
            values = epilogue(sums, None, fused).astype(x.dtype)
            for part in range(tiles.parts):
                piece = values[:, part * part_rows : (part + 1) * part_rows]
                piece = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # it is free
                staging.at[warpgroup].T[...] = piece
                plgpu.commit_smem()
                to = pl.ds(row + part * part_rows, part_rows), pl.ds(column, DEPTH)
                plgpu.copy_smem_to_gmem(staging.at[warpgroup], refs["out"].at[to])

        return Task(walk, num_steps, load, multiply, store)

    operands = {"x": x, "w": w, "bounds": bounds, "num": lists.num}
    operands |= {"indices": lists.indices, "positions": positions}
    if bias is not None:
        operands["bias"] = bias
    y = run(
        make_task,
        operands=operands,
        out_type=jax.ShapeDtypeStruct((len(x), columns), x.dtype),
        scratch={
            "x_ring": smem((tiles.stages, row_parts, tiles.rows, DEPTH), x.dtype),
            "w_ring": smem((tiles.stages, halves, DEPTH, DEPTH), x.dtype),
            "staging": smem((2, part_rows, DEPTH), x.dtype),
        },
        sums_shape=(DEPTH, tiles.rows),
        stages=tiles.stages,
        copies=row_parts + halves,
        programs=programs,
    )
    return y[:num_rows] if pad else y

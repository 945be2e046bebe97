"""The kernels for TPU: a grid step for each kept block, and none for the others.

The lists of a mask are walked one after the other. They are in scalar memory before the
first step, so the copy of a block starts while the one before it is multiplied. The
number of steps is an operand too: time follows what is kept, not the lists' capacity.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparsejax.formats import BlockMask, block_positions, block_slots
from sparsejax.ops._tpu import dot, result
from sparsejax.ops.block_matmul._gradients import Products, differentiable
from sparsejax.ops.block_matmul._reference import epilogue

_DTYPES = (jnp.bfloat16, jnp.float32)
_MAX_STEPS = 2**16  # three int32 lists of it fill 3/4 of the scalar memory of TPU v4 on
_VMEM_BYTES = 12 * 2**20  # of the 16 MiB that a kernel is given where least
_MAX_TILE_ROWS = 512  # by then the matrix unit, not the copies of `w`, is the limit
_MIN_TILE_ROWS = 128  # what the matrix unit takes at a time
_ROW_MULTIPLE = 16  # rows of a tile of 16-bit values


def unsupported_reason(x, w, block_mask, bias=None, full_dw=False) -> str | None:
    """Why these kernels cannot take the operands; None if they can.

    Args:
      x: `[num_rows, d_in]`; of all operands shapes and dtypes are read.
      w: `[d_in, d_out]`, or the values of a `BlockSparse`.
      block_mask: of `w`.
      bias: any.
      full_dw: any; the dense gradient of `w` is left to XLA.

    Returns:
      The reason, or None.
    """
    del bias, full_dw
    if x.dtype not in _DTYPES:
        return f"`x` and `w` must be bfloat16 or float32; got {x.dtype}"
    height, width = block_mask.block_shape
    if height % 128 or width % 128:
        return f"blocks must be multiples of 128; got {block_mask.block_shape}"
    if _fitting_rows(block_mask.block_shape, x.dtype) < _MIN_TILE_ROWS:
        return (
            f"blocks must leave room for {_MIN_TILE_ROWS} rows of `x` in VMEM; got "
            f"{block_mask.block_shape} of {x.dtype}"
        )
    entries = max(block_mask.indices.size, block_mask.indices_t.size)
    if entries > _MAX_STEPS:
        return (
            f"the lists of the mask must have at most {_MAX_STEPS} entries in all, "
            f"counting their capacity; got {entries}"
        )
    if x.size == 0 or w.size == 0:
        return f"no operand may be empty; got shapes {x.shape} and {w.shape}"
    return None


class _Steps(NamedTuple):
    """The blocks of `w` as the products of rows meet them, list by list.

    Attributes:
      outer: int32 `[length + 1]`, the list of each step; -1 beyond the last step.
      inner: int32 `[length + 1]`, its entry; -1 where the step adds nothing.
      slot: int32 `[length + 1]`, where in the values of a `BlockSparse` the block
        stands; None for a dense `w`.
    """

    outer: jax.Array
    inner: jax.Array
    slot: jax.Array | None

    def entry(self, s):
        """The entry of step `s`; an index also where it adds nothing."""
        return jnp.maximum(self.inner[s], 0)


def _steps(lists: BlockMask, slots, num_slots) -> tuple[_Steps, jax.Array]:
    """The steps and their number, at least one a list: its sum, if 0, is written too.

    `slots` has the shape of `lists.indices`, or is None.
    """
    walked = dataclasses.replace(lists, num=jnp.maximum(lists.num, 1))
    length, count = lists.indices.size + 1, jnp.sum(walked.num)
    outer, inner = block_positions(walked, length)
    steps = jnp.arange(length) < count
    adds = steps & (lists.num[outer] > 0)
    slot = None
    if slots is not None:
        slot = block_positions(dataclasses.replace(walked, indices=slots), length)[1]
        adds = adds & (slot < num_slots)  # a block that has no values is 0
        slot = jnp.minimum(slot, num_slots - 1)
    outer, inner = jnp.where(steps, outer, -1), jnp.where(adds, inner, -1)
    return _Steps(outer, inner, slot), count


def _forward(x, w, block_mask, bias, activation, dtype):
    slots_t = None if w.ndim == 2 else block_slots(block_mask)[1]
    if bias is not None:
        bias = bias.astype(jnp.float32)[None]
    lists = block_mask.T
    return _rows_product(x, w, lists, slots_t, bias, activation, dtype, contract=0)


def _grad_x(dy, w, block_mask):
    slots = None if w.ndim == 2 else block_slots(block_mask)[0]
    return _rows_product(dy, w, block_mask, slots, None, None, dy.dtype, contract=1)


def _rows_product(x, w, lists, slots, bias, activation, dtype, *, contract):
    """The rows of `x` times `w`, of whose blocks the axis `contract` is contracted.

    List i of `lists` says of which blocks of columns of `x` block i of the result is
    made.
    """
    steps, count = _steps(lists, slots, len(w))

    def kernel(steps, x_ref, w_ref, bias_ref, y_ref, sum_ref):
        s = pl.program_id(1)
        outer = steps.outer[s]

        @pl.when((s == 0) | (steps.outer[jnp.maximum(s - 1, 0)] != outer))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(steps.inner[s] >= 0)
        def _():
            sum_ref[...] += dot(x_ref[...], w_ref[...], (1, contract))

        @pl.when(steps.outer[s + 1] != outer)
        def _():
            bias = None if bias_ref is None else bias_ref[...]
            y_ref[...] = epilogue(sum_ref[...], bias, activation).astype(y_ref.dtype)

    num_rows = len(x)
    y_width, x_width = lists.block_shape
    wider = jnp.dtype(dtype).itemsize - x.dtype.itemsize
    tile_rows = _tile_rows(num_rows, lists.block_shape, x.dtype, 2 * wider * y_width)
    x = _padded(x, tile_rows)
    w_block = (y_width, x_width) if contract else (x_width, y_width)
    if w.ndim == 3:
        w_spec = pl.BlockSpec((None, *w_block), lambda r, s, at: (at.slot[s], 0, 0))
    elif contract:
        w_spec = pl.BlockSpec(w_block, lambda r, s, at: (at.outer[s], at.entry(s)))
    else:
        w_spec = pl.BlockSpec(w_block, lambda r, s, at: (at.entry(s), at.outer[s]))
    bias_spec = pl.BlockSpec((1, y_width), lambda r, s, at: (0, at.outer[s]))
    y = pl.pallas_call(
        kernel,
        out_shape=result((len(x), lists.shape[0]), dtype, x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(x) // tile_rows, count),
            in_specs=[
                pl.BlockSpec((tile_rows, x_width), lambda r, s, at: (r, at.entry(s))),
                w_spec,
                None if bias is None else bias_spec,
            ],
            out_specs=pl.BlockSpec(
                (tile_rows, y_width), lambda r, s, at: (r, at.outer[s])
            ),
            scratch_shapes=[pltpu.VMEM((tile_rows, y_width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
    )(steps, x, w, bias)
    return y[:num_rows]


# under vmap one after the other: the zeros, written in place, can have no axis more
@jax.custom_batching.sequential_vmap
def _grad_w(x, dy, block_mask, w):
    """The kept blocks of `x.T @ dy`, in row-major order, written into zeros."""
    tile_rows = _tile_rows(len(x), block_mask.block_shape, x.dtype)
    x, dy = _padded(x, tile_rows), _padded(dy, tile_rows)
    num_tiles = len(x) // tile_rows
    num_kept = jnp.sum(block_mask.num, keepdims=True)
    if w.ndim == 3:
        num_kept = jnp.minimum(num_kept, len(w))
    positions = block_positions(block_mask, block_mask.indices.size)
    height, width = block_mask.block_shape

    def kernel(rows, columns, num_kept, x_ref, dy_ref, zeros_ref, dw_ref, sum_ref):
        del rows, columns, zeros_ref
        s, r = pl.program_id(0), pl.program_id(1)

        @pl.when(r == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(s < num_kept[0])  # not so in the only step of an empty mask
        def _():
            sum_ref[...] += dot(x_ref[...], dy_ref[...], (0, 0))

        @pl.when(r == num_tiles - 1)
        def _():
            dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)

    if w.ndim == 3:  # blocks are stored in the order of the steps
        dw_spec = pl.BlockSpec((None, height, width), lambda s, r, *at: (s, 0, 0))
    else:
        dw_spec = pl.BlockSpec(
            (height, width), lambda s, r, rows, columns, _: (rows[s], columns[s])
        )
    return pl.pallas_call(
        kernel,
        out_shape=result(w.shape, w.dtype, w),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(jnp.maximum(num_kept[0], 1), num_tiles),
            in_specs=[
                pl.BlockSpec(
                    (tile_rows, height), lambda s, r, rows, columns, _: (r, rows[s])
                ),
                pl.BlockSpec(
                    (tile_rows, width), lambda s, r, rows, columns, _: (r, columns[s])
                ),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=dw_spec,
            scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)],
        ),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary")
        ),
    )(*positions, num_kept, x, dy, jnp.zeros(w.shape, w.dtype))


def _fitting_rows(block_shape, dtype, more_bytes: int = 0) -> int:
    """How many rows of operands fit into VMEM with a block of `w`, in any product.

    Operands and results are held twice, the other for the copy under way; sums are
    float32, held once and once more as the product that is added to them. A row of a
    result that is wider than the operands takes `more_bytes`.
    """
    height, width = block_shape
    copies, sums = 2 * jnp.dtype(dtype).itemsize, 2 * 4
    of_block = (copies + sums) * height * width
    of_row = copies * (height + width) + sums * max(height, width) + more_bytes
    rows = max(_VMEM_BYTES - of_block, 0) // of_row
    return min(rows // _ROW_MULTIPLE * _ROW_MULTIPLE, _MAX_TILE_ROWS)


def _tile_rows(num_rows: int, block_shape, dtype, more_bytes: int = 0) -> int:
    """Rows of a tile: as many tiles as needed, of nearly equal size."""
    num_tiles = pl.cdiv(num_rows, _fitting_rows(block_shape, dtype, more_bytes))
    return pl.cdiv(pl.cdiv(num_rows, num_tiles), _ROW_MULTIPLE) * _ROW_MULTIPLE


def _padded(rows: jax.Array, multiple: int) -> jax.Array:
    """With rows of zeros at the end, which add nothing to any sum."""
    return jnp.pad(rows, ((0, -len(rows) % multiple), (0, 0)))


block_matmul = differentiable(Products(_forward, _grad_x, _grad_w))

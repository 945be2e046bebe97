"""What the kernels for Hopper share: who computes what, and how a list is walked.

A program is three warpgroups. The third copies the tiles that the lists name into rings
of slots in shared memory; the other two compute, each with 64 rows of its own. Blocks
that the rules cut through come first, then those that are seen whole.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax.formats import BlockMask
from sparsejax.ops.block_attention._gradients import Lists
from sparsejax.ops.block_attention._rules import Rules

ROWS = 64  # of a warpgroup, as the tensor cores take
COMPUTING = 2  # warpgroups
TILE = COMPUTING * ROWS  # rows of a program
LOG2_E = math.log2(math.e)
_COPYING_REGISTERS, _COMPUTING_REGISTERS = 24, 240


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      columns: of the tiles that are walked, 64 or 128; must divide the blocks' side.
      stages: slots of each ring, at least 2.
      in_registers: whether the second products take their first operand from registers
        and add to sums there. Else it goes through shared memory, and the program adds:
        that is what the interpret mode of jax can do.
      take_turns: whether the two warpgroups take turns at the tensor cores, so that one
        computes exponentials while the other multiplies.
    """

    columns: int
    stages: int = 2
    in_registers: bool = True
    take_turns: bool = True


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a program stands.

    Attributes:
      batch: its batch.
      head: its head.
      row: its block row in the lists.
      tile: of two times 64 rows, counted over all blocks.
    """

    batch: jax.Array
    head: jax.Array
    row: jax.Array
    tile: jax.Array


def locate(order: Any, *, batch: int, heads: int, rows: int, of_block: int) -> Place:
    """The place of this program: tiles of one head first, so that they share its keys.

    Args:
      order: reference of what `longest_first` gives.
      batch: number of batches.
      heads: number of heads that have programs.
      rows: block rows of a head.
      of_block: tiles of a block.
    """
    program, row_tiles = jax.lax.axis_index("program"), rows * of_block
    rank, program = jax.lax.rem(program, row_tiles), jax.lax.div(program, row_tiles)
    head, at = jax.lax.rem(program, heads), jax.lax.div(program, heads)
    lead = lead_of(order, at, head, batch, heads)
    row = order[*lead, jax.lax.div(rank, of_block)]
    return Place(at, head, row, row * of_block + jax.lax.rem(rank, of_block))


def lead_of(
    ref: Any, at: jax.Array, head: jax.Array, batch: int, heads: int
) -> tuple[jax.Array, jax.Array]:
    """Batch and head in an array whose leading axes several may share."""

    def shared(index, size, of):
        return jnp.int32(0) if size == 1 else jax.lax.div(index, of // size)

    return shared(at, ref.shape[0], batch), shared(head, ref.shape[1], heads)


def smem(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory that the tensor cores read and bulk copies write."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def longest_first(*masks: BlockMask | None, heads: int | None = None) -> jax.Array:
    """The block rows of each batch and head, those with most blocks first.

    The device starts programs in order; long ones that start last would be waited for.

    Args:
      masks: whose blocks are walked; None for none.
      heads: that have programs, where a mask may have more; one for each by default.

    Returns:
      int32, of the shape of `num`, for as many heads.
    """
    nums = [mask.num for mask in masks if mask is not None]
    num = functools.reduce(jnp.add, nums)
    if heads is not None and num.shape[1] > heads:
        num = num.reshape(num.shape[0], heads, -1, num.shape[2]).sum(axis=2)
    return jnp.argsort(-num, axis=-1, stable=True).astype(jnp.int32)


def list_operands(lists: Lists) -> dict[str, jax.Array]:
    """The arrays that a kernel reads besides q, k and v, by name."""
    operands = {}
    for name, mask in (("whole", lists.whole), ("partial", lists.partial)):
        if mask is not None:
            operands |= {f"{name}_num": mask.num, f"{name}_indices": mask.indices}
    for name in ("prefix", "query_segments", "key_segments"):
        if (array := getattr(lists.rules, name)) is not None and lists.partial:
            operands[name] = array
    if lists.bias is not None:
        operands["bias"] = lists.bias
    return operands


def walk(
    refs: dict[str, Any],
    lead: tuple[jax.Array, jax.Array],
    row: jax.Array,
    substeps: int,
    visit: Callable[..., Any],
    carry: Any,
    done: jax.Array | int = 0,
) -> tuple[Any, jax.Array]:
    """Visits the tiles of the lists of a block row.

    Args:
      refs: of the operands.
      lead: batch and head of the lists.
      row: the block row.
      substeps: tiles in a block.
      visit: `(step, column, substep, partial, carry) -> carry`; `step` counts tiles,
        `column` is the block and `substep` the tile in it, `partial` a Python bool.
      carry: to begin with.
      done: steps before this walk.

    Returns:
      The last carry, and the steps that are done.
    """
    for kind in ("partial", "whole"):
        if f"{kind}_num" not in refs:
            continue
        num = refs[f"{kind}_num"][*lead, row] * substeps
        indices = refs[f"{kind}_indices"]

        def step(i, carry, *, kind=kind, indices=indices, done=done):
            entry, substep = jax.lax.div(i, substeps), jax.lax.rem(i, substeps)
            column = indices[*lead, row, entry]
            return visit(done + i, column, substep, kind == "partial", carry)

        carry = jax.lax.fori_loop(0, num, step, carry)
        done = done + num
    return carry, jnp.asarray(done)


def copy_tiles(
    refs: dict[str, Any],
    step: jax.Array,
    stages: int,
    sources: dict[str, tuple[Any, ...]],
) -> None:
    """Fills a slot of each ring as soon as it is free.

    Args:
      refs: with `NAME_ring`, `NAME_full` and `NAME_empty` of each name.
      step: counts the slots that were filled.
      stages: slots of a ring.
      sources: what to copy, by name; into `NAME_ring`, and `NAME_rows_ring` where there
        are two.
    """
    slot = jax.lax.rem(step, stages)
    for name, from_gmem in sources.items():

        @pl.when(step >= stages)
        def _(name=name):
            plgpu.barrier_wait(refs[f"{name}_empty"].at[slot])

        rings = (f"{name}_ring", f"{name}_rows_ring")
        for source, ring in zip(from_gmem, rings, strict=False):
            full = refs[f"{name}_full"].at[slot]
            plgpu.copy_gmem_to_smem(source, refs[ring].at[slot], full)


def ring(
    name: str, shape: tuple[int, ...], dtype, stages: int, *, with_rows: bool = False
) -> dict[str, Any]:
    """A ring of tiles and its barriers; `with_rows` also of a number for each row."""
    found = {
        f"{name}_ring": smem((stages, *shape), dtype),
        f"{name}_full": plgpu.Barrier(
            num_arrivals=2 if with_rows else 1, num_barriers=stages
        ),
        f"{name}_empty": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
    }
    if with_rows:
        found[f"{name}_rows_ring"] = plgpu.SMEM((stages, shape[0]), jnp.float32)
    return found


def visible(
    rules: Rules,
    refs: dict[str, Any],
    batch: jax.Array,
    first_query: jax.Array,
    first_key: jax.Array,
    shape: tuple[int, int],
    *,
    queries_along: int,
) -> jax.Array:
    """The rules on one tile, in the registers of a warpgroup.

    Args:
      rules: on positions.
      refs: of the operands.
      batch: of the tile.
      first_query: its position.
      first_key: likewise.
      shape: of the tile.
      queries_along: the axis of the queries, 0 or 1.
    """
    iota = functools.partial(
        plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA
    )

    def along(ref, first, axis):
        values = _compat.mosaic_gpu_load(
            plgpu,
            ref.at[batch, pl.ds(first, shape[axis])],
            plgpu.Layout.WGMMA.reduce(1 - axis),
        )
        return spread(values, shape, axis)

    segments = {"query_segments": None, "key_segments": None}
    if "query_segments" in refs:
        segments = {
            "query_segments": along(refs["query_segments"], first_query, queries_along),
            "key_segments": along(refs["key_segments"], first_key, 1 - queries_along),
        }
    return rules.visible(
        first_query + iota(queries_along),
        first_key + iota(1 - queries_along),
        prefix=refs["prefix"][batch] if "prefix" in refs else None,
        **segments,
    )


def product(a: Any, b: Any, shape: tuple[int, int], between=None) -> jax.Array:
    """`a @ b` in float32; `between` runs while the tensor cores work."""

    def start(sums):
        plgpu.wgmma(sums, a, b)
        if between is not None:
            between()
        return sums[...]

    return pl.run_scoped(start, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def add_product(sums: jax.Array, a: jax.Array, b: Any, staging: Any) -> jax.Array:
    """`sums + a @ b`, of `a` in registers.

    Args:
      sums: float32, in registers.
      a: of the dtype of `b`.
      b: in shared memory.
      staging: shared memory of the shape of `a`, for this warpgroup alone; None to
        multiply and add in registers.
    """
    if staging is None:
        start: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))
        return start(plgpu.WGMMAAccumulatorRef.init(sums))
    staging[...] = a
    plgpu.commit_smem()
    rows, columns = sums.shape
    return sums + product(staging, b, (rows, columns))


def spread(values: jax.Array, shape: tuple[int, int], axis: int = 0) -> jax.Array:
    """Spreads one number a row (a column, for axis 1) over a tile."""
    return jax.lax.broadcast_in_dim(values, shape, [axis])


def constant(value: float, shape: tuple[int, ...]) -> jax.Array:
    """In registers, laid out as a tile is, or as one number for each of its rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def launch(
    copying: Callable[[dict[str, Any]], None],
    computing: Callable[[dict[str, Any], jax.Array], None],
    operands: dict[str, jax.Array],
    results: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    programs: int,
) -> dict[str, jax.Array]:
    """Runs a kernel of one warpgroup that copies and two that compute.

    Args:
      copying: takes all references, by name.
      computing: likewise, and the number of the warpgroup.
      operands: in device memory.
      results: likewise.
      scratch: shared memory and barriers.
      programs: the length of the grid, whose axis is called "program".

    Returns:
      The results, by name.
    """
    names = [*operands, *results, *scratch]

    def body(*refs):
        refs = dict(zip(names, refs, strict=True))
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup == COMPUTING)
        def _():
            plgpu.set_max_registers(_COPYING_REGISTERS, action="decrease")
            copying(refs)

        @pl.when(warpgroup < COMPUTING)
        def _():
            plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
            computing(refs, warpgroup)
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=tuple(scratch.values()),
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=_compat.mosaic_gpu_params(plgpu, approx_math=True),
    )
    return dict(zip(results, kernel(*operands.values()), strict=True))


def padded(x: jax.Array, length: int, *, axis: int = 1, value: float = 0) -> jax.Array:
    """Lengthens an axis to whole blocks."""
    pad = length - x.shape[axis]
    if not pad:
        return x
    widths = [(0, pad if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)

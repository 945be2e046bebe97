"""What the kernels for Hopper share: who computes what, and how a list is walked.

A program has 128 rows, 64 for each of two warpgroups that compute, while the third
copies the tiles that the lists name. Blocks that the rules cut through come first, then
those that are seen whole.
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
from sparsejax.ops._warpgroups import COMPUTING, smem
from sparsejax.ops.block_attention._gradients import Lists
from sparsejax.ops.block_attention._rules import Rules

ROWS = 64  # of a warpgroup, as the tensor cores take
TILE = COMPUTING * ROWS  # rows of a program
LOG2_E = math.log2(math.e)


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


@dataclasses.dataclass(frozen=True)
class ByQuery:
    """Programs with queries of their own, which walk over keys and values.

    Attributes:
      lists: by block row.
      batch: number of batches.
      heads: query heads.
      kv_heads: key heads.
      tiles: how the work is cut.
    """

    lists: Lists
    batch: int
    heads: int
    kv_heads: int
    tiles: Tiles

    @property
    def substeps(self) -> int:
        """Tiles of keys in a block."""
        return self.lists.whole.block_shape[1] // self.tiles.columns

    def place(self, refs: dict[str, Any]) -> tuple[Place, tuple[jax.Array, jax.Array]]:
        """Where this program stands, and batch and head of its lists."""
        here = locate(
            refs["order"],
            batch=self.batch,
            heads=self.heads,
            rows=self.lists.whole.blocks_shape[2],
            of_block=self.lists.whole.block_shape[0] // TILE,
        )
        lead = lead_of(refs["whole_num"], here.batch, here.head, self.batch, self.heads)
        return here, lead

    def first_key(self, column: jax.Array, substep: jax.Array) -> jax.Array:
        """The first key of a tile."""
        width = self.lists.whole.block_shape[1]
        return column * width + substep * self.tiles.columns

    def copying(self, refs: dict[str, Any]) -> None:
        """Copies the tiles of keys and values that the lists name."""
        here, lead = self.place(refs)
        kv_head = jax.lax.div(here.head, self.heads // self.kv_heads)

        def visit(step, column, substep, partial, carry):
            keys = pl.ds(self.first_key(column, substep), self.tiles.columns)
            at = here.batch, keys, kv_head
            sources = {"k": (refs["k"].at[at],), "v": (refs["v"].at[at],)}
            copy_tiles(refs, step, self.tiles.stages, sources)
            return carry

        walk(refs, lead, here.row, self.substeps, visit, None)

    def rings(self, dim: int, dtype) -> dict[str, Any]:
        """Shared memory for the tiles, and for operands of second products."""
        shape, stages = (self.tiles.columns, dim), self.tiles.stages
        found = {**ring("k", shape, dtype, stages), **ring("v", shape, dtype, stages)}
        return found | staging_for(self.tiles, dtype)


def staging_for(tiles: Tiles, dtype) -> dict[str, Any]:
    """Shared memory for second products that do not start from registers."""
    if tiles.in_registers:
        return {}
    return {"staging": smem((COMPUTING, ROWS, tiles.columns), dtype)}


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


def padded(x: jax.Array, length: int, *, axis: int = 1, value: float = 0) -> jax.Array:
    """Lengthens an axis to whole blocks."""
    pad = length - x.shape[axis]
    if not pad:
        return x
    widths = [(0, pad if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)

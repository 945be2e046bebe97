"""Kernels for Hopper that read each row once, keep it on chip, and write it once.

Every block of threads walks over its share of the rows. A ring of slots in shared
memory holds rows that are being loaded, the row at work, and the one being stored. A
block is a single warpgroup, since a reduction over a whole row is not to be had across
several; several blocks share a multiprocessor instead, so that one computes while
another waits.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax.ops._hopper import COLUMNS, NUM_SMS, SHARED_BYTES


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      slots: of the ring of one block; with one alone nothing overlaps.
      blocks_per_sm: blocks of threads that share a multiprocessor.
      chunk: entries of a row that are in registers at a time, a multiple of 512.
      num_sms: multiprocessors of the device.
    """

    slots: int
    blocks_per_sm: int
    chunk: int = 4096
    num_sms: int = NUM_SMS

    @classmethod
    def default(cls, slot_bytes: int, *, heavy: bool = False) -> "Tiles":
        """The tiles for slots of this size.

        Args:
          slot_bytes: bytes of all rows that one slot holds.
          heavy: much is computed with an entry, and takes registers.

        Returns:
          The tiles.

        Example:
          >>> Tiles.default(32 * 1024)
          Tiles(slots=2, blocks_per_sm=3, chunk=4096, num_sms=132)
        """
        fitting = SHARED_BYTES // slot_bytes
        # blocks hide each other's waits better than slots of one do
        blocks = max(1, min(fitting, 4 if heavy or fitting >= 8 else 3))
        slots = max(1, min(8, fitting // blocks))
        chunk = 2048 if heavy else 4096
        return cls(slots=slots, blocks_per_sm=blocks, chunk=chunk)


def kernel(
    body: Callable[..., None],
    num_rows: int,
    tiles: Tiles,
    *,
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch_types: Sequence[Any],
    loads: int,
) -> Callable[..., Any]:
    """The kernel of a body that calls `walk`.

    Args:
      body: takes the operands, results and scratch, and last the barriers of the slots.
      num_rows: rows of all blocks.
      tiles: how the work is cut.
      out_type: of the results.
      scratch_types: shared memory, the barriers aside.
      loads: arrays of which a slot holds a row.

    Returns:
      A function of the operands.
    """
    assert tiles.slots >= 1 and tiles.chunk >= 512, tiles
    full = plgpu.Barrier(num_arrivals=loads, num_barriers=tiles.slots)
    return plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=(*scratch_types, full),
        grid=(_num_blocks(num_rows, tiles),),
        grid_names=("block",),
        compiler_params=_compat.mosaic_gpu_params(plgpu),
    )


def _num_blocks(num_rows: int, tiles: Tiles) -> int:
    return min(num_rows, tiles.num_sms * tiles.blocks_per_sm)


def walk(
    num_rows: int,
    tiles: Tiles,
    full: Any,
    copies: Callable[[Any, Any], Iterable[tuple[Any, Any]]],
    compute: Callable[[Any, Any], None],
) -> None:
    """Takes the rows `block`, `block + num_blocks`, ... through the ring.

    Args:
      num_rows: rows of all blocks.
      tiles: how the work is cut.
      full: the barriers of the slots, reached when the rows are loaded.
      copies: takes a row and a slot; gives what is copied from device memory for it,
        and where to.
      compute: takes a row and a slot; starts one group of copies back, from the slot.
    """
    block, slots = jax.lax.axis_index("block"), tiles.slots
    num_blocks = _num_blocks(num_rows, tiles)
    mine = (num_rows - block + num_blocks - 1) // num_blocks

    def row(i):
        return block + i * num_blocks

    def load(i, slot):
        for source, place in copies(row(i), slot):
            plgpu.copy_gmem_to_smem(source, place, full.at[slot])

    for i in range(slots):

        @pl.when(i < mine)
        def _(i=i):
            load(i, i)

    def step(i, _):
        slot = jax.lax.rem(i, slots)
        plgpu.barrier_wait(full.at[slot])
        compute(row(i), slot)
        # A slot is free once its store has read it. The store of the row before had
        # this step's time for that.
        lag = 0 if slots == 1 else 1
        upcoming = i - lag + slots

        @pl.when((i >= lag) & (upcoming < mine))
        def _():
            plgpu.wait_smem_to_gmem(lag, wait_read_only=True)
            load(upcoming, jax.lax.rem(upcoming, slots))

        return _

    jax.lax.fori_loop(0, mine, step, None)
    plgpu.wait_smem_to_gmem(0)


def chunks(length: int, chunk: int) -> list[Any]:
    """Slices of equal size that cover `length` pieces of a row, each at most `chunk`.

    A slice has an even number of pieces: 512 entries are four for each thread.
    """
    size = max(
        s for s in range(2, length + 1, 2) if length % s == 0 and s * COLUMNS <= chunk
    )
    return [pl.ds(start, size) for start in range(0, length, size)]


def total(pieces: Iterable[jax.Array]) -> jax.Array:
    """The sum over all entries of all pieces, added piece to piece first."""
    return jnp.sum(functools.reduce(jnp.add, pieces))


def squared(x: jax.Array) -> jax.Array:
    """`x` times itself, which needs no operation of its own."""
    return x * x


def split_quantile(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether all of a row survives, which z = -inf says; and a z that is finite."""
    every = z == -jnp.inf
    return every, jnp.where(every, 0.0, z)


def std(var: jax.Array) -> jax.Array:
    """The root; sqrt is not in every version's lane semantics, rsqrt is."""
    return jnp.where(var == 0.0, 0.0, var * jax.lax.rsqrt(var))

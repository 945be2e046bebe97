"""The kernel for Hopper: `up` and `down` rows of active neurons, each read once.

The active neurons are dealt out to about as many blocks of threads as there are
multiprocessors. A block walks over its neurons with the next rows already on the way
into a ring of slots in shared memory. It keeps a float32 sum `[batch, d_model]` in
registers and writes it once; the sums of the blocks are then added by XLA. No atomics:
the result does not depend on which block is done first.

A block is a single warpgroup, since a reduction over a whole row is not to be had
across several; blocks share a multiprocessor instead.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat

_COLUMNS = 256  # the longest side of a piece that one bulk copy takes
_THREADS = 128  # of a warpgroup
_SHARED_BYTES = 200 * 1024  # of a multiprocessor, less what reductions and barriers use
_MAX_SUMS = 128  # float32 sums that a thread can hold beside its other registers
_MAX_BATCH = 16
_MAX_SLOTS = 8
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      slots: neurons in the ring of one block, at least 2.
      parts: blocks that share a neuron; each sums its part of the columns of `down`.
        All of them read the whole row of `up`, the second from the cache.
      blocks_per_sm: blocks of threads that share a multiprocessor.
      chunk: entries of a row that are in registers at a time, a multiple of 512.
      num_sms: multiprocessors of the device.
    """

    slots: int
    parts: int = 1
    blocks_per_sm: int = 1
    chunk: int = 1024
    num_sms: int = 132

    @classmethod
    def default(cls, batch: int, d_in: int, d_model: int, itemsize: int) -> "Tiles":
        """The tiles for these shapes.

        Args:
          batch: rows of `x`.
          d_in: columns of `up`.
          d_model: columns of `down`.
          itemsize: bytes of an entry of either.

        Returns:
          The tiles. `slots` is less than 2 if shared memory is too small.

        Example:
          >>> Tiles.default(1, 4096, 4096, itemsize=2)
          Tiles(slots=5, parts=1, blocks_per_sm=2, chunk=1024, num_sms=132)
          >>> Tiles.default(8, 4096, 4096, itemsize=2)
          Tiles(slots=3, parts=2, blocks_per_sm=2, chunk=1024, num_sms=132)
        """
        length = d_model // _COLUMNS
        divisors = (n for n in range(1, length + 1) if length % n == 0)
        sums = batch * d_model // _THREADS
        parts = next(n for n in divisors if sums <= n * _MAX_SUMS or n == length)
        slot_bytes = (d_in + d_model // parts) * itemsize

        def slots(blocks):
            left = _SHARED_BYTES // blocks - batch * d_in * itemsize
            return min(_MAX_SLOTS, left // slot_bytes)

        # one computes while the other waits for its row
        blocks_per_sm = 2 if slots(2) >= 3 else 1
        # more rows of `x` beside a chunk would not fit into the registers
        chunk = 1024 if batch <= 8 else 512
        return cls(slots(blocks_per_sm), parts, blocks_per_sm, chunk)


def unsupported_reason(x, gate, indices, num_active, up, down) -> str | None:
    """Why this kernel cannot take these operands; None if it can.

    Args:
      x: `[batch, d_in]`; of all operands shapes and dtypes are read.
      gate: `[batch, capacity]`.
      indices: `[capacity]`.
      num_active: a scalar.
      up: `[d_ff, d_in]`.
      down: `[d_ff, d_model]`.

    Returns:
      The reason, or None.
    """
    del gate, indices, num_active
    dtypes = x.dtype, up.dtype, down.dtype
    if len(set(dtypes)) > 1 or x.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in dtypes)
        return (
            "`x`, `up` and `down` must be of one dtype, bfloat16, float16 or float32; "
            f"got {names}"
        )
    batch, d_in = x.shape
    d_model = down.shape[1]
    if d_in % _COLUMNS or d_model % _COLUMNS:
        return (
            f"d_in and d_model must be multiples of {_COLUMNS}; got {d_in} and "
            f"{d_model}"
        )
    if batch > _MAX_BATCH:
        return f"the batch must be at most {_MAX_BATCH}; got {batch}"
    if Tiles.default(batch, d_in, d_model, x.dtype.itemsize).slots < 2:
        return (
            f"{batch} rows of `x` and two rows each of `up` and `down` must fit into "
            f"{_SHARED_BYTES} bytes; got d_in={d_in} and d_model={d_model} of {x.dtype}"
        )
    return None


def active_ffn(
    x: jax.Array,
    gate: jax.Array,
    indices: jax.Array,
    num_active: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    tiles: Tiles | None = None,
) -> jax.Array:
    """As the public function, by one kernel and the sum of what its blocks give.

    Args:
      x: `[batch, d_in]`; see `unsupported_reason`.
      gate: `[batch, capacity]`.
      indices: `[capacity]`, int32.
      num_active: a scalar, int32; clipped to `[0, capacity]`.
      up: `[d_ff, d_in]`.
      down: `[d_ff, d_model]`.
      tiles: how the work is cut; None for the default.

    Returns:
      `[batch, d_model]` of `x.dtype`.
    """
    (batch, d_in), d_model = x.shape, down.shape[1]
    if tiles is None:
        tiles = Tiles.default(batch, d_in, d_model, x.dtype.itemsize)
    sums = _sums_of_blocks(
        x.reshape(batch, -1, _COLUMNS),
        gate,
        indices,
        num_active.reshape(1),
        up.reshape(len(up), -1, _COLUMNS),
        down.reshape(len(down), -1, _COLUMNS),
        tiles,
    )
    return jnp.sum(sums, axis=0).reshape(batch, d_model).astype(x.dtype)


# jitted: layers of equal shapes share the lowered kernel
@functools.partial(jax.jit, static_argnames="tiles")
def _sums_of_blocks(x, gate, indices, num_active, up, down, tiles):
    batch, up_length, _ = x.shape
    part_length = down.shape[1] // tiles.parts
    assert part_length * tiles.parts == down.shape[1], (down.shape, tiles)
    assert tiles.slots >= 2 and tiles.chunk % (2 * _COLUMNS) == 0, tiles
    slots, capacity = tiles.slots, indices.size
    num_blocks = max(1, tiles.num_sms * tiles.blocks_per_sm // tiles.parts)
    up_chunks = _chunks(up_length, tiles.chunk)
    down_chunks = _chunks(part_length, tiles.chunk)

    def body(*refs):
        x_gmem, gate_gmem, indices_gmem, num_gmem, up_gmem, down_gmem = refs[:6]
        out_gmem, x_smem, up_ring, down_ring, x_full, full = refs[6:]
        block, part = jax.lax.axis_index("block"), jax.lax.axis_index("part")

        def entry(i):
            """The place in the list of this block's i-th neuron."""
            return block + i * num_blocks

        def neuron(i):  # read early, so maybe beyond the last one
            return indices_gmem[jnp.minimum(entry(i), capacity - 1)]

        def load(neuron, slot):
            columns = pl.ds(part * part_length, part_length)
            plgpu.copy_gmem_to_smem(up_gmem.at[neuron], up_ring.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(
                down_gmem.at[neuron, columns], down_ring.at[slot], full.at[slot]
            )

        # all at once: each of these reads waits for memory
        first = [neuron(i) for i in range(slots)]
        left = jnp.maximum(jnp.minimum(num_gmem[0], capacity) - block, 0)
        mine = jax.lax.div(left + (num_blocks - 1), num_blocks)
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, x_full)
        for i in range(slots):

            @pl.when(i < mine)
            def _(i=i):
                load(first[i], i)

        plgpu.barrier_wait(x_full)

        def step(i, sums):
            slot = jax.lax.rem(i, slots)
            # the slot of the step before is loaded again in this one
            upcoming = i - 1 + slots
            next_neuron = neuron(upcoming)
            gates = [gate_gmem[b, entry(i)].astype(jnp.float32) for b in range(batch)]
            plgpu.barrier_wait(full.at[slot])

            dots = _dots(up_ring, slot, x_smem, up_chunks)

            # All threads are done with that slot: the sums above waited for them. The
            # fence orders their reads before the copy, which takes another path.
            @pl.when((i >= 1) & (upcoming < mine))
            def _():
                plgpu.commit_smem()
                load(next_neuron, jax.lax.rem(upcoming, slots))

            hidden = [dot * g for dot, g in zip(dots, gates, strict=True)]
            new = []
            for c, rows in enumerate(down_chunks):
                row = down_ring[slot, pl.ds(*rows)].astype(jnp.float32)
                new.append([sums[c][b] + hidden[b] * row for b in range(batch)])
            return new

        sums = [[_zeros(size, down.dtype)] * batch for _, size in down_chunks]
        sums = jax.lax.fori_loop(0, mine, step, sums)
        for (start, size), sums_of_rows in zip(down_chunks, sums, strict=True):
            to = pl.ds(part * part_length + start, size)
            for b, sum_of_rows in enumerate(sums_of_rows):
                out_gmem[block, b, to] = sum_of_rows

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (num_blocks, batch, *down.shape[1:]), jnp.float32
        ),
        scratch_types=(
            plgpu.SMEM(x.shape, x.dtype),
            plgpu.SMEM((slots, up_length, _COLUMNS), up.dtype),
            plgpu.SMEM((slots, part_length, _COLUMNS), down.dtype),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        ),
        grid=(num_blocks, tiles.parts),
        grid_names=("block", "part"),
        compiler_params=_compat.mosaic_gpu_params(plgpu),
    )(x, gate, indices, num_active, up, down)


def _dots(up_ring, slot, x_smem, chunks) -> list[jax.Array]:
    """The dot products of one row of `up` with each row of `x`."""
    batch = x_smem.shape[0]
    # products of chunks of one size are added in place, then once over the threads
    products = [{} for _ in range(batch)]
    for start, size in chunks:
        row = up_ring[slot, pl.ds(start, size)].astype(jnp.float32)
        for b, of_size in enumerate(products):
            product = row * x_smem[b, pl.ds(start, size)].astype(jnp.float32)
            of_size[size] = of_size[size] + product if size in of_size else product
    return [
        functools.reduce(operator.add, map(jnp.sum, of_size.values()))
        for of_size in products
    ]


def _chunks(length: int, chunk: int) -> list[tuple[int, int]]:
    """Cuts `length` pieces of a row into chunks of at most `chunk` entries.

    All but the last have an even number of pieces, of equal size but for one: 512
    entries are four for each thread, which is what one load takes.

    Args:
      length: pieces of `_COLUMNS` entries in a row.
      chunk: a multiple of 512.

    Returns:
      Start and size of each chunk, in pieces.
    """
    sizes, left = [], length
    while left:
        size = min(left, chunk // _COLUMNS)
        size -= size % 2 if size > 1 else 0
        sizes.append(size)
        left -= size
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return list(zip(starts, sizes, strict=True))


def _zeros(size: int, dtype) -> jax.Array:
    """Zeros in registers, laid out as a chunk of that dtype is when it is loaded."""
    shape = (size, _COLUMNS)
    vec_size = min(8 // jnp.dtype(dtype).itemsize, size * _COLUMNS // _THREADS)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=vec_size)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

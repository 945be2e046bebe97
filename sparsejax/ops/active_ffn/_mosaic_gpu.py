"""The kernel for Hopper: `up` and `down` rows of active neurons, each read once.

The active neurons are dealt out to about as many blocks of threads as there are
multiprocessors, see `_dealing`. A block walks over its neurons with the next rows
already on the way into a ring of slots in shared memory. It keeps a float32 sum
`[batch, d_model]` in registers and writes it once; the sums of the blocks are then
added by XLA. No atomics: the result does not depend on which block is done first.

A block is a single warpgroup, since a reduction over a whole row is not to be had
across several; blocks share a multiprocessor instead.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax.ops._activations import Activation, unsupported_activation
from sparsejax.ops._hopper import COLUMNS, SHARED_BYTES, THREADS
from sparsejax.ops._platform import jit_kernel
from sparsejax.ops.active_ffn._dealing import Dealing, Found, Listed
from sparsejax.ops.active_ffn._tiles import Tiles

_MAX_BATCH = 16
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def unsupported_reason(x, gate, indices, num_active, up, down) -> str | None:
    """Why `active_ffn` cannot take these operands; None if it can.

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
    return _unsupported(x, up, down)


def gated_unsupported_reason(
    x, gate, up, down, threshold=None, *, activation: Activation | None = None
) -> str | None:
    """As `unsupported_reason`, of `gated_ffn`; `gate` is `[batch, d_ff]`."""
    del threshold
    if gate.dtype != x.dtype:
        return f"`gate` must have the dtype of `x`, {x.dtype}; got {gate.dtype}"
    reason = unsupported_activation(activation) or _unsupported(x, up, down)
    if reason is not None:
        return reason
    found = _found(gate, _default_tiles(x, down))
    return found.unsupported_reason(gate.dtype.itemsize)


def _unsupported(x, up, down) -> str | None:
    dtypes = x.dtype, up.dtype, down.dtype
    if len(set(dtypes)) > 1 or x.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in dtypes)
        return (
            "`x`, `up` and `down` must be of one dtype, bfloat16, float16 or float32; "
            f"got {names}"
        )
    batch, d_in = x.shape
    d_model = down.shape[1]
    if d_in % COLUMNS or d_model % COLUMNS:
        return (
            f"d_in and d_model must be multiples of {COLUMNS}; got {d_in} and {d_model}"
        )
    if batch > _MAX_BATCH:
        return f"the batch must be at most {_MAX_BATCH}; got {batch}"
    if _default_tiles(x, down).slots < 2:
        return (
            f"{batch} rows of `x` and two rows each of `up` and `down` must fit into "
            f"{SHARED_BYTES} bytes; got d_in={d_in} and d_model={d_model} of {x.dtype}"
        )
    return None


def _default_tiles(x, down) -> Tiles:
    (batch, d_in), d_model = x.shape, down.shape[1]
    return Tiles.default(batch, d_in, d_model, x.dtype.itemsize)


def _found(gate, tiles: Tiles, activation: Activation | None = None) -> Found:
    batch, d_ff = gate.shape
    itemsize = gate.dtype.itemsize
    return Found.default(batch, d_ff, tiles.num_blocks, itemsize, activation)


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
    tiles = tiles or _default_tiles(x, down)
    batch, capacity = gate.shape
    dealing = Listed(batch, capacity, tiles.num_blocks)
    return _run(dealing, x, (gate, indices, num_active.reshape(1)), up, down, tiles)


def gated_ffn(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    threshold: jax.Array | None = None,
    *,
    activation: Activation | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """As the public function; see `gated_unsupported_reason` and `active_ffn`."""
    tiles = tiles or _default_tiles(x, down)
    gates = (gate,) if threshold is None else (gate, threshold)
    return _run(_found(gate, tiles, activation), x, gates, up, down, tiles)


def _run(dealing: Dealing, x, gates, up, down, tiles: Tiles) -> jax.Array:
    rows, up, down = (a.reshape(len(a), -1, COLUMNS) for a in (x, up, down))
    sums = _sums_of_blocks(rows, gates, up, down, dealing, tiles)
    return jnp.sum(sums, axis=0).reshape(len(x), -1).astype(x.dtype)


@functools.partial(jit_kernel, static_argnames=("dealing", "tiles"))
def _sums_of_blocks(x, gates, up, down, dealing: Dealing, tiles: Tiles):
    """`[num_blocks, batch, d_model]`, rows cut into pieces of `COLUMNS`.

    `gates` are the operands of `dealing`.
    """
    batch, up_length, _ = x.shape
    part_length = down.shape[1] // tiles.parts
    assert part_length * tiles.parts == down.shape[1], (down.shape, tiles)
    assert tiles.slots >= 2 and tiles.chunk % (2 * COLUMNS) == 0, tiles
    slots = tiles.slots
    up_chunks = _chunks(up_length, tiles.chunk)
    down_chunks = _chunks(part_length, tiles.chunk)

    def body(x_gmem, *refs):
        gates_gmem, refs = refs[: len(gates)], refs[len(gates) :]
        up_gmem, down_gmem, out_gmem, x_smem, up_ring, down_ring = refs[:6]
        x_full, full, *scratch = refs[6:]
        block, part = jax.lax.axis_index("block"), jax.lax.axis_index("part")

        def load(neuron, slot):
            columns = pl.ds(part * part_length, part_length)
            plgpu.copy_gmem_to_smem(up_gmem.at[neuron], up_ring.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(
                down_gmem.at[neuron, columns], down_ring.at[slot], full.at[slot]
            )

        walk_of_block = dealing.begin(block, gates_gmem, scratch, slots)
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, x_full)
        walk = walk_of_block()
        for i in range(slots):

            @pl.when(i < walk.num)
            def _(i=i):
                load(walk.first[i], i)

        plgpu.barrier_wait(x_full)

        def step(i, carry):
            sums, state = carry
            slot = jax.lax.rem(i, slots)
            # the slot of the step before is loaded again in this one
            upcoming = i - 1 + slots
            next_neuron = walk.ahead(i, state)
            gates = walk.gates(i, state)
            plgpu.barrier_wait(full.at[slot])

            dots = _dots(up_ring, slot, x_smem, up_chunks)

            # All threads are done with that slot: the sums above waited for them. The
            # fence orders their reads before the copy, which takes another path.
            @pl.when((i >= 1) & (upcoming < walk.num))
            def _():
                plgpu.commit_smem()
                load(next_neuron, jax.lax.rem(upcoming, slots))

            hidden = [dot * g for dot, g in zip(dots, gates, strict=True)]
            new = []
            for c, rows in enumerate(down_chunks):
                row = down_ring[slot, pl.ds(*rows)].astype(jnp.float32)
                new.append([sums[c][b] + hidden[b] * row for b in range(batch)])
            return new, walk.advance(state)

        sums = [[_zeros(size, down.dtype)] * batch for _, size in down_chunks]
        sums, _ = jax.lax.fori_loop(0, walk.num, step, (sums, walk.state))
        for (start, size), sums_of_rows in zip(down_chunks, sums, strict=True):
            to = pl.ds(part * part_length + start, size)
            for b, sum_of_rows in enumerate(sums_of_rows):
                out_gmem[block, b, to] = sum_of_rows

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (dealing.num_blocks, batch, *down.shape[1:]), jnp.float32
        ),
        scratch_types=(
            plgpu.SMEM(x.shape, x.dtype),
            plgpu.SMEM((slots, up_length, COLUMNS), up.dtype),
            plgpu.SMEM((slots, part_length, COLUMNS), down.dtype),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            *dealing.scratch(gates[0].dtype),
        ),
        grid=(dealing.num_blocks, tiles.parts),
        grid_names=("block", "part"),
        compiler_params=_compat.mosaic_gpu_params(plgpu),
    )(x, *gates, up, down)


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
      length: pieces of `COLUMNS` entries in a row.
      chunk: a multiple of 512.

    Returns:
      Start and size of each chunk, in pieces.
    """
    sizes, left = [], length
    while left:
        size = min(left, chunk // COLUMNS)
        size -= size % 2 if size > 1 else 0
        sizes.append(size)
        left -= size
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return list(zip(starts, sizes, strict=True))


def _zeros(size: int, dtype) -> jax.Array:
    """Zeros in registers, laid out as a chunk of that dtype is when it is loaded."""
    shape = (size, COLUMNS)
    vec_size = min(8 // jnp.dtype(dtype).itemsize, size * COLUMNS // THREADS)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=vec_size)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

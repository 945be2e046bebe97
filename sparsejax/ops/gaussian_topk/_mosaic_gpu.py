"""The kernel for Hopper: each row is read once, kept on chip, and written once.

Every block of threads walks over its share of the rows. A ring of slots in shared
memory holds rows that are being loaded, the row at work, and the one being stored; the
result overwrites its row. A block is a single warpgroup, since a reduction over a whole
row is not to be had across several; several blocks share a multiprocessor instead, so
that one computes while another waits.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from sparsejax import _compat
from sparsejax.ops.gaussian_topk._slopes import passed_back, survivors

_COLUMNS = 256  # the longest side of a piece that one bulk copy takes
_SHARED_BYTES = 200 * 1024  # of a multiprocessor, less what reductions and barriers use
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


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
    num_sms: int = 132

    @classmethod
    def default(cls, slot_bytes: int) -> "Tiles":
        """The tiles for slots of this size.

        Args:
          slot_bytes: bytes of all rows that one slot holds.

        Returns:
          The tiles.

        Example:
          >>> Tiles.default(32 * 1024)
          Tiles(slots=3, blocks_per_sm=2, chunk=4096, num_sms=132)
        """
        fitting = [b for b in (4, 2, 1) if 3 * b * slot_bytes <= _SHARED_BYTES]
        blocks = fitting[0] if fitting else 1
        slots = min(8, _SHARED_BYTES // (blocks * slot_bytes))
        return cls(slots=slots, blocks_per_sm=blocks)


def unsupported_reason(x: jax.Array, z: ArrayLike) -> str | None:
    """Why this kernel cannot take these operands; None if it can.

    Args:
      x: rows along the last axis; its shape and dtype are read.
      z: a scalar, or one value a row.

    Returns:
      The reason, or None.
    """
    del z
    if x.dtype not in _DTYPES:
        return f"`x` must be bfloat16, float16 or float32; got {x.dtype}"
    d = x.shape[-1]
    if d == 0 or d % 512:
        return f"the last axis must be a multiple of 512; got {d}"
    # a slot of the backward holds two rows, x and the gradient
    longest = _SHARED_BYTES // (2 * x.dtype.itemsize) // 512 * 512
    if d > longest:
        return f"a row of {x.dtype} must have at most {longest} entries; got {d}"
    if x.size == 0:
        return f"there must be a row; got shape {x.shape}"
    return None


def gaussian_topk(
    x: jax.Array,
    z: ArrayLike,
    *,
    huber_delta: float = 0.0,
    tiles: Tiles | None = None,
    grad_tiles: Tiles | None = None,
) -> jax.Array:
    """`max(x - (mean + std * z), 0)` over the last axis, as the reference gives it.

    Args:
      x: rows along the last axis; see `unsupported_reason`.
      z: a scalar, or one value a row: broadcastable to `[*batch, 1]`; a row with -inf
        is returned unchanged.
      huber_delta: width of the quadratic part; 0 for none.
      tiles: how the forward is cut; None for the default.
      grad_tiles: how the backward is cut; None for the default.

    Returns:
      As `x`.
    """
    d = x.shape[-1]
    num_rows = math.prod(x.shape[:-1])
    rows = x.reshape(num_rows, d // _COLUMNS, _COLUMNS)
    z = jnp.broadcast_to(jnp.asarray(z, jnp.float32), (*x.shape[:-1], 1))
    row_bytes = d * x.dtype.itemsize
    tiles = tiles or Tiles.default(row_bytes)
    grad_tiles = grad_tiles or Tiles.default(2 * row_bytes)
    z = z.reshape(num_rows)
    return jnp.reshape(_rows(rows, z, huber_delta, tiles, grad_tiles), x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rows(x, z, huber_delta, tiles, grad_tiles):
    del grad_tiles
    return _forward(x, z, huber_delta, tiles, with_statistics=False)[0]


def _rows_fwd(x, z, huber_delta, tiles, grad_tiles):
    del grad_tiles
    out, mean, std = _forward(x, z, huber_delta, tiles, with_statistics=True)
    return out, (x, z, mean, std)


def _rows_bwd(huber_delta, tiles, grad_tiles, residuals, grad):
    del tiles
    x, z, mean, std = residuals
    dx, total = _backward(grad, x, z, mean, std, huber_delta, grad_tiles)
    return dx, jnp.where(z == -jnp.inf, 0, -total * std)


_rows.defvjp(_rows_fwd, _rows_bwd)


# jitted, as is the backward: layers of equal shapes share the lowered kernel
@functools.partial(jax.jit, static_argnums=(2, 3), static_argnames="with_statistics")
def _forward(x, z, huber_delta, tiles, *, with_statistics):
    num_rows, length, _ = x.shape
    d = length * _COLUMNS
    chunks = _chunks(length, tiles.chunk)

    def body(x_gmem, z_gmem, out_gmem, *rest):
        *statistics_gmem, ring, full = rest

        def load(row, slot):
            plgpu.copy_gmem_to_smem(x_gmem.at[row], ring.at[slot], full.at[slot])

        def compute(row, slot):
            def piece(rows):
                return ring[slot, rows].astype(jnp.float32)

            mean = _total(piece(rows) for rows in chunks) * (1 / d)
            var = _total(_squared(piece(rows) - mean) for rows in chunks) * (1 / d)
            # sqrt is not in every version's lane semantics, rsqrt is
            std = jnp.where(var == 0.0, 0.0, var * jax.lax.rsqrt(var))
            unchanged, z = _split(z_gmem[row])
            theta = _rounded(mean + std * z, x.dtype)
            for rows in chunks:
                x_piece = piece(rows)
                out = survivors(x_piece - theta, huber_delta)
                ring[slot, rows] = jnp.where(unchanged, x_piece, out).astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ring.at[slot], out_gmem.at[row])
            if with_statistics:
                mean_gmem, std_gmem = statistics_gmem
                mean_gmem[row] = mean
                std_gmem[row] = std

        _walk(num_rows, tiles, full, load, compute)

    per_row = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _kernel(
        body,
        num_rows,
        tiles,
        out_type=(out, per_row, per_row) if with_statistics else (out,),
        slot=plgpu.SMEM((tiles.slots, length, _COLUMNS), x.dtype),
        num_arrivals=1,
    )(x, z)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _backward(grad, x, z, mean, std, huber_delta, tiles):
    num_rows, length, _ = x.shape
    d = length * _COLUMNS
    chunks = _chunks(length, tiles.chunk)

    def body(
        grad_gmem, x_gmem, z_gmem, mean_gmem, std_gmem, dx_gmem, total_gmem, ring, full
    ):
        def load(row, slot):
            plgpu.copy_gmem_to_smem(x_gmem.at[row], ring.at[slot, 0], full.at[slot])
            plgpu.copy_gmem_to_smem(grad_gmem.at[row], ring.at[slot, 1], full.at[slot])

        def compute(row, slot):
            mean, std = mean_gmem[row], std_gmem[row]
            unchanged, z = _split(z_gmem[row])
            theta = _rounded(mean + std * z, x.dtype)

            def piece(rows):
                x_piece = ring[slot, 0, rows].astype(jnp.float32)
                grad_piece = ring[slot, 1, rows].astype(jnp.float32)
                passed = passed_back(grad_piece, x_piece - theta, huber_delta)
                return x_piece, grad_piece, passed

            total = _total(piece(rows)[-1] for rows in chunks)
            shift = total * (1 / d)
            scale = jnp.where(std == 0.0, 0.0, shift * z / std)
            for rows in chunks:
                x_piece, grad_piece, passed = piece(rows)
                dx = passed - (shift + scale * (x_piece - mean))
                dx = jnp.where(unchanged, grad_piece, dx)
                ring[slot, 0, rows] = dx.astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ring.at[slot, 0], dx_gmem.at[row])
            total_gmem[row] = total

        _walk(num_rows, tiles, full, load, compute)

    per_row = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    return _kernel(
        body,
        num_rows,
        tiles,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), per_row),
        slot=plgpu.SMEM((tiles.slots, 2, length, _COLUMNS), x.dtype),
        num_arrivals=2,
    )(grad, x, z, mean, std)


def _kernel(body, num_rows, tiles, *, out_type, slot, num_arrivals):
    assert tiles.slots >= 1 and tiles.chunk >= 512, tiles
    full = plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=tiles.slots)
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=(slot, full),
        grid=(_num_blocks(num_rows, tiles),),
        grid_names=("block",),
        compiler_params=_compat.mosaic_gpu_params(plgpu),
    )


def _num_blocks(num_rows: int, tiles: Tiles) -> int:
    return min(num_rows, tiles.num_sms * tiles.blocks_per_sm)


def _walk(num_rows, tiles, full, load, compute) -> None:
    """Takes the rows `block`, `block + num_blocks`, ... through the ring.

    Args:
      num_rows: rows of all blocks.
      tiles: how the work is cut.
      full: the barriers of the slots, reached when a row is loaded.
      load: takes a row and a slot; starts the copy.
      compute: takes a row and a slot; starts one copy back, from the slot.
    """
    block, slots = jax.lax.axis_index("block"), tiles.slots
    num_blocks = _num_blocks(num_rows, tiles)
    mine = (num_rows - block + num_blocks - 1) // num_blocks

    def row(i):
        return block + i * num_blocks

    for i in range(slots):

        @pl.when(i < mine)
        def _(i=i):
            load(row(i), i)

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
            load(row(upcoming), jax.lax.rem(upcoming, slots))

        return _

    jax.lax.fori_loop(0, mine, step, None)
    plgpu.wait_smem_to_gmem(0)


def _chunks(length: int, chunk: int):
    """Slices of equal size that cover `length` pieces of a row, each at most `chunk`.

    A slice has an even number of pieces: 512 entries are four for each thread.
    """
    size = max(
        s for s in range(2, length + 1, 2) if length % s == 0 and s * 256 <= chunk
    )
    return [pl.ds(start, size) for start in range(0, length, size)]


def _total(pieces) -> jax.Array:
    """The sum over all entries of all pieces, added piece to piece first."""
    return jnp.sum(functools.reduce(jnp.add, pieces))


def _squared(x: jax.Array) -> jax.Array:
    return x * x


def _split(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether the row is unchanged, which z = -inf says; and a z that is finite."""
    unchanged = z == -jnp.inf
    return unchanged, jnp.where(unchanged, 0.0, z)


def _rounded(value: jax.Array, dtype) -> jax.Array:
    return value.astype(dtype).astype(jnp.float32)

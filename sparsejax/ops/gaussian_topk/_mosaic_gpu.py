"""The kernel for Hopper, of the form that `_rows` describes.

Results overwrite their operands.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from sparsejax.ops import _rows
from sparsejax.ops._activations import Activation, without_custom_rules
from sparsejax.ops._hopper import COLUMNS, SHARED_BYTES
from sparsejax.ops._once import differentiated_once
from sparsejax.ops._platform import jit_kernel
from sparsejax.ops._rows import Tiles
from sparsejax.ops.gaussian_topk._reference import glu
from sparsejax.ops.gaussian_topk._slopes import glu_back, passed_back, survivors

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def unsupported_reason(
    x: jax.Array, z: ArrayLike, up: jax.Array | None = None
) -> str | None:
    """Why this kernel cannot take these operands; None if it can.

    Args:
      x: rows along the last axis; its shape and dtype are read.
      z: a scalar, or one value a row.
      up: as `x`, or None.

    Returns:
      The reason, or None.
    """
    del z
    if x.dtype not in _DTYPES:
        return f"`x` must be bfloat16, float16 or float32; got {x.dtype}"
    d = x.shape[-1]
    if d == 0 or d % 512:
        return f"the last axis must be a multiple of 512; got {d}"
    # a slot of the backward holds these rows: x, the gradient, and `up`
    held, names = (2, "row") if up is None else (3, "row with `up`")
    longest = SHARED_BYTES // (held * x.dtype.itemsize) // 512 * 512
    if d > longest:
        return f"a {names} of {x.dtype} must have at most {longest} entries; got {d}"
    if x.size == 0:
        return f"there must be a row; got shape {x.shape}"
    return None


def gaussian_topk(
    x: jax.Array,
    z: ArrayLike,
    up: jax.Array | None = None,
    *,
    activation: Activation | None = None,
    huber_delta: float = 0.0,
    tiles: Tiles | None = None,
    grad_tiles: Tiles | None = None,
) -> jax.Array:
    """`activation(max(x - (mean + std * z), 0)) * up`, as the reference gives it.

    The backward rounds the gradient of what survives to `x.dtype` after it has added it
    up over the row, and before it takes off what mean and std contribute.

    Args:
      x: rows along the last axis; see `unsupported_reason`.
      z: a scalar, or one value a row: broadcastable to `[*batch, 1]`; a row with -inf
        survives unchanged.
      up: as `x`, or None for no product.
      activation: elementwise, of what survives; None for none.
      huber_delta: width of the quadratic part; 0 for none.
      tiles: how the forward is cut; None for the default.
      grad_tiles: how the backward is cut; None for the default.

    Returns:
      As `x`.
    """
    d = x.shape[-1]
    num_rows = math.prod(x.shape[:-1])
    rows, up = (
        None if a is None else a.reshape(num_rows, d // COLUMNS, COLUMNS)
        for a in (x, up)
    )
    z = jnp.broadcast_to(jnp.asarray(z, jnp.float32), (*x.shape[:-1], 1))
    row_bytes = d * x.dtype.itemsize
    held = 1 if up is None else 2
    tiles = tiles or Tiles.default(held * row_bytes)
    heavy = up is not None or activation is not None
    grad_tiles = grad_tiles or Tiles.default((held + 1) * row_bytes, heavy=heavy)
    elementwise = _Elementwise(activation, huber_delta)
    z = z.reshape(num_rows)
    return jnp.reshape(_on_rows(rows, z, up, elementwise, tiles, grad_tiles), x.shape)


@dataclasses.dataclass(frozen=True)
class _Elementwise:
    """What is done with each entry; `activation` may be None."""

    activation: Activation | None
    huber_delta: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _on_rows(x, z, up, elementwise, tiles, grad_tiles):
    del grad_tiles
    return _forward(x, z, up, elementwise, tiles, with_statistics=False)[0]


def _on_rows_fwd(x, z, up, elementwise, tiles, grad_tiles):
    x, z, up = differentiated_once((x, z, up))
    del grad_tiles
    out, mean, std = _forward(x, z, up, elementwise, tiles, with_statistics=True)
    return out, (x, z, up, mean, std)


def _on_rows_bwd(elementwise, tiles, grad_tiles, residuals, grad):
    del tiles
    grad = differentiated_once(grad)
    x, z, up, mean, std = residuals
    total, dx, *dup = _backward(grad, x, z, up, mean, std, elementwise, grad_tiles)
    dz = jnp.where(z == -jnp.inf, 0, -total * std)
    return dx, dz, dup[0] if dup else None


_on_rows.defvjp(_on_rows_fwd, _on_rows_bwd)


@functools.partial(jit_kernel, static_argnums=(3, 4), static_argnames="with_statistics")
def _forward(x, z, up, elementwise, tiles, *, with_statistics):
    num_rows, length, _ = x.shape
    d = length * COLUMNS
    chunks = _rows.chunks(length, tiles.chunk)
    sources = (x,) if up is None else (x, up)
    activated = without_custom_rules(
        functools.partial(glu, activation=elementwise.activation)
    )

    def body(z_gmem, *refs):
        sources_gmem, refs = refs[: len(sources)], refs[len(sources) :]
        out_gmem, *statistics_gmem, ring, full = refs

        def compute(row, slot):
            def piece(rows, i=0):
                return ring[slot, i, rows].astype(jnp.float32)

            mean = _rows.total(piece(rows) for rows in chunks) * (1 / d)
            squares = (_rows.squared(piece(rows) - mean) for rows in chunks)
            var = _rows.total(squares) * (1 / d)
            std = _rows.std(var)
            unchanged, z = _rows.split_quantile(z_gmem[row])
            theta = _rounded(mean + std * z, x.dtype)
            for rows in chunks:
                x_piece = piece(rows)
                out = survivors(x_piece - theta, elementwise.huber_delta)
                out = jnp.where(unchanged, x_piece, out)
                out = activated(out, None if up is None else piece(rows, 1))
                ring[slot, 0, rows] = out.astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ring.at[slot, 0], out_gmem.at[row])
            if with_statistics:
                mean_gmem, std_gmem = statistics_gmem
                mean_gmem[row] = mean
                std_gmem[row] = std

        _walk(num_rows, tiles, sources_gmem, ring, full, compute)

    per_row = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _kernel(
        body,
        x,
        tiles,
        out_type=(out, per_row, per_row) if with_statistics else (out,),
        held=len(sources),
    )(z, *sources)


@functools.partial(jit_kernel, static_argnums=(6, 7))
def _backward(grad, x, z, up, mean, std, elementwise, tiles):
    num_rows, length, _ = x.shape
    d = length * COLUMNS
    chunks = _rows.chunks(length, tiles.chunk)
    sources = (x, grad) if up is None else (x, grad, up)
    huber_delta = elementwise.huber_delta
    activated_back = without_custom_rules(
        functools.partial(glu_back, activation=elementwise.activation)
    )

    def body(z_gmem, mean_gmem, std_gmem, *refs):
        sources_gmem, refs = refs[: len(sources)], refs[len(sources) :]
        total_gmem, *grads_gmem, ring, full = refs

        def compute(row, slot):
            mean, std = mean_gmem[row], std_gmem[row]
            unchanged, z = _rows.split_quantile(z_gmem[row])
            theta = _rounded(mean + std * z, x.dtype)

            def piece(rows, i):
                return ring[slot, i, rows].astype(jnp.float32)

            def passed_first(rows):
                x_piece, grad_piece = piece(rows, 0), piece(rows, 1)
                if elementwise.activation is not None or up is not None:
                    # computed once, as it takes long: the gradients of s and `up` take
                    # the places of the gradient given and of `up`
                    s = survivors(x_piece - theta, huber_delta)
                    s = jnp.where(unchanged, x_piece, s)
                    up_piece = None if up is None else piece(rows, 2)
                    grad_piece, dup = activated_back(grad_piece, s, up_piece)
                    ring[slot, 1, rows] = grad_piece.astype(x.dtype)
                    if up is not None:
                        ring[slot, 2, rows] = dup.astype(x.dtype)
                return passed_back(grad_piece, x_piece - theta, huber_delta)

            total = _rows.total(passed_first(rows) for rows in chunks)
            shift = total * (1 / d)
            scale = jnp.where(std == 0.0, 0.0, shift * z / std)
            for rows in chunks:
                x_piece, grad_piece = piece(rows, 0), piece(rows, 1)
                passed = passed_back(grad_piece, x_piece - theta, huber_delta)
                dx = passed - (shift + scale * (x_piece - mean))
                dx = jnp.where(unchanged, grad_piece, dx)
                ring[slot, 0, rows] = dx.astype(x.dtype)
            plgpu.commit_smem()
            for i, gmem in zip((0, 2), grads_gmem, strict=False):
                plgpu.copy_smem_to_gmem(
                    ring.at[slot, i], gmem.at[row], commit_group=False
                )
            plgpu.commit_smem_to_gmem_group()
            total_gmem[row] = total

        _walk(num_rows, tiles, sources_gmem, ring, full, compute)

    total = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _kernel(
        body,
        x,
        tiles,
        out_type=(total, like_x) if up is None else (total, like_x, like_x),
        held=len(sources),
    )(z, mean, std, *sources)


def _kernel(body, x, tiles, *, out_type, held):
    """The kernel of a body whose slots hold so many rows like those of `x`."""
    num_rows, *row = x.shape
    ring = plgpu.SMEM((tiles.slots, held, *row), x.dtype)
    return _rows.kernel(
        body, num_rows, tiles, out_type=out_type, scratch_types=(ring,), loads=held
    )


def _walk(num_rows, tiles, sources, ring, full, compute) -> None:
    """As `_rows.walk`: each slot of the ring holds a row of each source."""

    def copies(row, slot):
        for place, source in enumerate(sources):
            yield source.at[row], ring.at[slot, place]

    _rows.walk(num_rows, tiles, full, copies, compute)


def _rounded(value: jax.Array, dtype) -> jax.Array:
    return value.astype(dtype).astype(jnp.float32)

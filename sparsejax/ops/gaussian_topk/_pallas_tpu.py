"""The kernel for TPU: a block of whole rows in VMEM, read once and written once."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike

from sparsejax.ops._activations import Activation
from sparsejax.ops._once import differentiated_once
from sparsejax.ops._tpu import result
from sparsejax.ops.gaussian_topk._reference import glu
from sparsejax.ops.gaussian_topk._slopes import glu_back, passed_back, survivors

_BLOCKS_BYTES = 3 * 2**20  # of a backward's blocks in float32; VMEM is five times that
_LANES = 128  # what a column, one entry a row, takes of each row in VMEM
_COLUMNS = 4  # of a backward: z, mean, std and the sum of the gradient
_LONGEST = 16384  # entries of a row: one tile of such rows in each block still fits
_MIN_ROWS = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float32): 8}  # of a tile


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
    del z, up
    if x.dtype not in _MIN_ROWS:
        return f"`x` must be bfloat16 or float32; got {x.dtype}"
    d = x.shape[-1]
    if d == 0 or d % 128 or d > _LONGEST:
        return f"the last axis must be a multiple of 128, at most {_LONGEST}; got {d}"
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
    interpret: bool = False,
) -> jax.Array:
    """`activation(max(x - (mean + std * z), 0)) * up`, as the reference gives it.

    Args:
      x: rows along the last axis; see `unsupported_reason`.
      z: a scalar, or one value a row: broadcastable to `[*batch, 1]`; a row with -inf
        survives unchanged.
      up: as `x`, or None for no product.
      activation: elementwise, of what survives; None for none.
      huber_delta: width of the quadratic part; 0 for none.
      interpret: whether to run it, slowly, on any device.

    Returns:
      As `x`.
    """
    num_rows = math.prod(x.shape[:-1])
    z = jnp.broadcast_to(jnp.asarray(z, jnp.float32), (*x.shape[:-1], 1))
    rows, up = (
        None if a is None else a.reshape(num_rows, x.shape[-1]) for a in (x, up)
    )
    z = z.reshape(num_rows, 1)
    return jnp.reshape(_rows(rows, z, up, activation, huber_delta, interpret), x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _rows(x, z, up, activation, huber_delta, interpret):
    settings = activation, huber_delta, interpret
    return _forward(x, z, up, *settings, with_statistics=False)[0]


def _rows_fwd(x, z, up, *settings):
    x, z, up = differentiated_once((x, z, up))
    out, mean, std = _forward(x, z, up, *settings, with_statistics=True)
    return out, (x, z, up, mean, std)


def _rows_bwd(activation, huber_delta, interpret, residuals, grad):
    grad = differentiated_once(grad)
    x, z, up, mean, std = residuals
    settings = activation, huber_delta, interpret
    total, dx, *dup = _backward(grad, x, z, up, mean, std, *settings)
    dz = jnp.where(z == -jnp.inf, 0, -total * std)
    return dx, dz, dup[0] if dup else None


_rows.defvjp(_rows_fwd, _rows_bwd)


def _forward(x, z, up, activation, huber_delta, interpret, *, with_statistics):
    ups = () if up is None else (up,)

    def kernel(x_ref, z_ref, *refs):
        up_refs, (out_ref, *statistics_refs) = refs[: len(ups)], refs[len(ups) :]
        x_block = x_ref[...].astype(jnp.float32)
        mean = jnp.mean(x_block, axis=-1, keepdims=True)
        var = jnp.mean(jnp.square(x_block - mean), axis=-1, keepdims=True)
        std = jnp.sqrt(var)
        unchanged, z = _split(z_ref[...])
        theta = _rounded(mean + std * z, out_ref.dtype)
        out = survivors(x_block - theta, huber_delta)
        out = jnp.where(unchanged, x_block, out)
        up_block = up_refs[0][...].astype(jnp.float32) if up_refs else None
        out_ref[...] = glu(out, up_block, activation).astype(out_ref.dtype)
        if with_statistics:
            mean_ref, std_ref = statistics_refs
            mean_ref[...] = mean
            std_ref[...] = std

    scalars = result(z.shape, jnp.float32, x)
    out = result(x.shape, x.dtype, x)
    outs = (out, scalars, scalars) if with_statistics else (out,)
    return _call(kernel, (x, z, *ups), outs, up, interpret)


def _backward(grad, x, z, up, mean, std, activation, huber_delta, interpret):
    ups = () if up is None else (up,)

    def kernel(grad_ref, x_ref, z_ref, mean_ref, std_ref, *refs):
        up_refs, (total_ref, dx_ref, *dup_refs) = refs[: len(ups)], refs[len(ups) :]
        mean, std = mean_ref[...], std_ref[...]
        unchanged, z = _split(z_ref[...])
        x_block = x_ref[...].astype(jnp.float32)
        excess = x_block - _rounded(mean + std * z, dx_ref.dtype)
        s = jnp.where(unchanged, x_block, survivors(excess, huber_delta))
        up_block = up_refs[0][...].astype(jnp.float32) if up_refs else None
        grad_block = grad_ref[...].astype(jnp.float32)
        grad_block, dup = glu_back(grad_block, s, up_block, activation)
        passed = passed_back(grad_block, excess, huber_delta)
        total = jnp.sum(passed, axis=-1, keepdims=True)
        shift = total * (1 / x_block.shape[-1])
        scale = jnp.where(std == 0.0, 0.0, shift * z / jnp.where(std == 0.0, 1.0, std))
        dx = passed - (shift + scale * (x_block - mean))
        dx_ref[...] = jnp.where(unchanged, grad_block, dx).astype(dx_ref.dtype)
        total_ref[...] = total
        if dup is not None:
            dup_refs[0][...] = dup.astype(dx_ref.dtype)

    total = result(z.shape, jnp.float32, x)
    rows = result(x.shape, x.dtype, x)
    outs = (total, rows, *(rows for _ in ups))
    return _call(kernel, (grad, x, z, mean, std, *ups), outs, up, interpret)


def _call(kernel, operands, outs, up, interpret):
    """Calls the kernel on blocks of rows; the last block may reach past the end."""
    x = operands[0]
    num_rows, d = x.shape
    block_rows = min(num_rows, _fitting_rows(d, x.dtype, with_up=up is not None))

    def spec(array):
        return pl.BlockSpec((block_rows, array.shape[-1]), lambda i: (i, 0))

    return pl.pallas_call(
        kernel,
        out_shape=outs,
        grid=(pl.cdiv(num_rows, block_rows),),
        in_specs=[spec(operand) for operand in operands],
        out_specs=tuple(spec(out) for out in outs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(*operands)


def _fitting_rows(d: int, dtype, *, with_up: bool) -> int:
    """Rows of a block, of which a backward holds most: whole tiles, at least one."""
    blocks = 5 if with_up else 3  # x and two gradients; `up` and its own
    fitting = _BLOCKS_BYTES // (4 * (blocks * d + _COLUMNS * _LANES))
    tile = _MIN_ROWS[dtype]
    return max(1, fitting // tile) * tile


def _split(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows are unchanged, which z = -inf says; and z, finite everywhere."""
    unchanged = z == -jnp.inf
    return unchanged, jnp.where(unchanged, 0.0, z)


def _rounded(value: jax.Array, dtype) -> jax.Array:
    return value.astype(dtype).astype(jnp.float32)

"""The kernel for TPU: a block of whole rows in VMEM, read once and written once."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike

from sparsejax.ops.gaussian_topk._slopes import passed_back, survivors

_BLOCK_BYTES = 2**20  # of a block in float32; a few of them, doubled, fill VMEM
_MIN_ROWS = 16  # of a tile of 16-bit values
_DTYPES = (jnp.bfloat16, jnp.float32)


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
        return f"`x` must be bfloat16 or float32; got {x.dtype}"
    d, longest = x.shape[-1], _BLOCK_BYTES // (4 * _MIN_ROWS)
    if d == 0 or d % 128 or d > longest:
        return f"the last axis must be a multiple of 128, at most {longest}; got {d}"
    if x.size == 0:
        return f"there must be a row; got shape {x.shape}"
    return None


def gaussian_topk(
    x: jax.Array, z: ArrayLike, *, huber_delta: float = 0.0, interpret: bool = False
) -> jax.Array:
    """`max(x - (mean + std * z), 0)` over the last axis, as the reference gives it.

    Args:
      x: rows along the last axis; see `unsupported_reason`.
      z: a scalar, or one value a row: broadcastable to `[*batch, 1]`; a row with -inf
        is returned unchanged.
      huber_delta: width of the quadratic part; 0 for none.
      interpret: whether to run it, slowly, on any device.

    Returns:
      As `x`.
    """
    num_rows = math.prod(x.shape[:-1])
    z = jnp.broadcast_to(jnp.asarray(z, jnp.float32), (*x.shape[:-1], 1))
    rows, z = x.reshape(num_rows, x.shape[-1]), z.reshape(num_rows, 1)
    return jnp.reshape(_rows(rows, z, huber_delta, interpret), x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rows(x, z, huber_delta, interpret):
    return _forward(x, z, huber_delta, interpret, with_statistics=False)[0]


def _rows_fwd(x, z, huber_delta, interpret):
    out, mean, std = _forward(x, z, huber_delta, interpret, with_statistics=True)
    return out, (x, z, mean, std)


def _rows_bwd(huber_delta, interpret, residuals, grad):
    x, z, mean, std = residuals
    dx, total = _backward(grad, x, z, mean, std, huber_delta, interpret)
    return dx, jnp.where(z == -jnp.inf, 0, -total * std)


_rows.defvjp(_rows_fwd, _rows_bwd)


def _forward(x, z, huber_delta, interpret, *, with_statistics):
    def kernel(x_ref, z_ref, out_ref, *statistics_refs):
        x_block = x_ref[...].astype(jnp.float32)
        mean = jnp.mean(x_block, axis=-1, keepdims=True)
        var = jnp.mean(jnp.square(x_block - mean), axis=-1, keepdims=True)
        std = jnp.sqrt(var)
        unchanged, z = _split(z_ref[...])
        theta = _rounded(mean + std * z, out_ref.dtype)
        out = survivors(x_block - theta, huber_delta)
        out_ref[...] = jnp.where(unchanged, x_block, out).astype(out_ref.dtype)
        if with_statistics:
            mean_ref, std_ref = statistics_refs
            mean_ref[...] = mean
            std_ref[...] = std

    scalars = jax.ShapeDtypeStruct(z.shape, jnp.float32)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    outs = (out, scalars, scalars) if with_statistics else (out,)
    return _call(kernel, (x, z), outs, x.shape, interpret)


def _backward(grad, x, z, mean, std, huber_delta, interpret):
    def kernel(grad_ref, x_ref, z_ref, mean_ref, std_ref, dx_ref, total_ref):
        mean, std = mean_ref[...], std_ref[...]
        unchanged, z = _split(z_ref[...])
        x_block = x_ref[...].astype(jnp.float32)
        theta = _rounded(mean + std * z, dx_ref.dtype)
        grad_block = grad_ref[...].astype(jnp.float32)
        passed = passed_back(grad_block, x_block - theta, huber_delta)
        total = jnp.sum(passed, axis=-1, keepdims=True)
        shift = total * (1 / x_block.shape[-1])
        scale = jnp.where(std == 0.0, 0.0, shift * z / jnp.where(std == 0.0, 1.0, std))
        dx = passed - (shift + scale * (x_block - mean))
        dx_ref[...] = jnp.where(unchanged, grad_block, dx).astype(dx_ref.dtype)
        total_ref[...] = total

    outs = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct(z.shape, jnp.float32),
    )
    return _call(kernel, (grad, x, z, mean, std), outs, x.shape, interpret)


def _call(kernel, operands, outs, shape, interpret):
    """Calls the kernel on blocks of rows; the last block may reach past the end."""
    num_rows, d = shape
    fitting = _BLOCK_BYTES // (4 * d) // _MIN_ROWS * _MIN_ROWS
    block_rows = min(num_rows, fitting)

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


def _split(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows are unchanged, which z = -inf says; and z, finite everywhere."""
    unchanged = z == -jnp.inf
    return unchanged, jnp.where(unchanged, 0.0, z)


def _rounded(value: jax.Array, dtype) -> jax.Array:
    return value.astype(dtype).astype(jnp.float32)

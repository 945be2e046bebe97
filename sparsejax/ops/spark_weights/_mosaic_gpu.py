"""The kernel for Hopper, of the form that `_rows` describes.

What a row is computed from goes four times over shared memory: for sum and maximum, the
squared distances to the mean, the softmax over what is selected, and the product.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike

from sparsejax import _compat
from sparsejax.ops import _rows
from sparsejax.ops._hopper import COLUMNS, SHARED_BYTES
from sparsejax.ops._once import differentiated_once
from sparsejax.ops._platform import jit_kernel
from sparsejax.ops._rows import Tiles
from sparsejax.ops.gaussian_topk import num_entries

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_TERMS = 7  # of the series in `_softplus`: the next is below 2**-26 of the sum


def unsupported_reason(
    scores: jax.Array, z: ArrayLike, where: jax.Array, *, dtype
) -> str | None:
    """Why this kernel cannot take these, by shape and dtype; None if it can."""
    del z, where
    if scores.dtype != jnp.float32:
        return f"`scores` must be float32; got {scores.dtype}"
    if dtype not in _DTYPES:
        return f"`dtype` must be bfloat16, float16 or float32; got {dtype}"
    keys = scores.shape[-1]
    longest = SHARED_BYTES // _slot_bytes(1, dtype) // 512 * 512
    if keys % 512 or not 0 < keys <= longest:
        return f"keys must be a multiple of 512, at most {longest}; got {keys}"
    if scores.size == 0:
        return f"there must be a row; got shape {scores.shape}"
    return None


def _slot_bytes(keys: int, dtype) -> int:
    """Both scores, the weights or their gradients, `where`, and scratch of a row."""
    return keys * (3 * 4 + 1 + jnp.dtype(dtype).itemsize)


def spark_weights(
    scores: jax.Array,
    z: ArrayLike,
    where: jax.Array,
    *,
    scales: tuple[float, float],
    dtype,
    tiles: Tiles | None = None,
    grad_tiles: Tiles | None = None,
) -> jax.Array:
    """As the reference.

    Args:
      scores: see `unsupported_reason`.
      z: a scalar, or one value a row.
      where: sizes of axes but the last may be 1.
      scales: of the two scores.
      dtype: of the result.
      tiles: how the forward is cut; None for the default.
      grad_tiles: how the backward is cut; None for the default.

    Returns:
      `[*rows, keys]`.
    """
    *sizes, _, keys = scores.shape
    row = keys // COLUMNS, COLUMNS

    def of_rows(values):
        values = jnp.asarray(values, jnp.float32)
        return jnp.broadcast_to(values, (*sizes, 1)).reshape(-1)

    default = Tiles.default(_slot_bytes(keys, dtype), heavy=True)
    plan = _Plan(
        tuple(sizes),
        where.shape[:-1],
        scales,
        jnp.dtype(dtype),
        tiles or default,
        grad_tiles or default,
    )
    z, count = of_rows(z), of_rows(num_entries(where, where=where))
    scores = scores.reshape(-1, 2, *row)
    where = where.astype(jnp.int8).reshape(-1, *row)
    return jnp.reshape(_on_rows(plan, scores, z, count, where), (*sizes, keys))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known before the arrays: sizes of their rows, and how work is cut."""

    sizes: tuple[int, ...]
    where_sizes: tuple[int, ...]
    scales: tuple[float, float]
    dtype: jnp.dtype
    tiles: Tiles
    grad_tiles: Tiles

    def row_of_where(self, row):
        """The row of `where`, some of whose axes have size 1, for one of the scores."""
        found, stride = 0, 1
        both = zip(reversed(self.sizes), reversed(self.where_sizes), strict=True)
        for size, where_size in both:
            if where_size > 1:
                found += jax.lax.rem(row, size) * stride
                stride *= where_size
            row = jax.lax.div(row, size)
        return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_rows(plan, scores, z, count, where):
    return _forward(plan, scores, z, count, where, with_statistics=False)[0]


def _on_rows_fwd(plan, scores, z, count, where):
    scores, z = differentiated_once((scores, z))
    out, *statistics = _forward(plan, scores, z, count, where, with_statistics=True)
    return out, (scores, where, *statistics)


def _on_rows_bwd(plan, residuals, grad):
    grad = differentiated_once(grad)
    return _backward(plan, grad, *residuals), None, None, None


_on_rows.defvjp(_on_rows_fwd, _on_rows_bwd)


@functools.partial(jit_kernel, static_argnums=0, static_argnames="with_statistics")
def _forward(plan, scores, z, count, where, *, with_statistics):
    tiles, (num_rows, _, *row_shape) = plan.tiles, scores.shape
    chunks = _rows.chunks(row_shape[0], tiles.chunk)

    def body(z_gmem, count_gmem, scores_gmem, where_gmem, out_gmem, *refs):
        *statistics_gmem, ring, seen, out, full = refs

        def compute(row, slot):
            count = count_gmem[row]
            num = jnp.where(count == 0.0, 1.0, count)
            tops, sums = [], []
            for rows in chunks:
                visible = _load(seen, (slot, rows)) != 0
                predicted = _load(ring, (slot, 0, rows)) * plan.scales[0]
                sums.append(jnp.where(visible, predicted, 0.0))
                predicted = jnp.where(visible, predicted, -jnp.inf)
                tops.append(predicted)
                ring[slot, 0, rows] = predicted
            top = jnp.max(functools.reduce(jnp.maximum, tops))
            mean = _rows.total(sums) / num

            def squares(rows):
                predicted = _load(ring, (slot, 0, rows))
                square = _rows.squared(predicted - mean)
                return jnp.where(predicted == -jnp.inf, 0.0, square)

            std = _rows.std(_rows.total(map(squares, chunks)) / num)
            every, z = _rows.split_quantile(z_gmem[row])
            theta = jnp.where(every, -jnp.inf, mean + std * z)

            def powers(rows):
                power = _powers(_load(ring, (slot, 0, rows)), theta, top)
                ring[slot, 0, rows] = power
                return power

            total = _rows.total(map(powers, chunks))
            total = jnp.where(top == -jnp.inf, 1.0, total)
            scale = 1.0 / total
            for rows in chunks:
                power = _load(ring, (slot, 0, rows))
                rest = _load(ring, (slot, 1, rows)) * plan.scales[1]
                rest = jnp.where(power == 0.0, 0.0, rest)
                weights = power * scale * _softplus(rest)[0]
                out[slot, rows] = weights.astype(plan.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out.at[slot], out_gmem.at[row])
            if with_statistics:
                statistics = theta, top, scale
                for gmem, value in zip(statistics_gmem, statistics, strict=True):
                    gmem[row] = value

        def copies(row, slot):
            yield scores_gmem.at[row], ring.at[slot]
            yield where_gmem.at[plan.row_of_where(row)], seen.at[slot]

        _rows.walk(num_rows, tiles, full, copies, compute)

    per_row = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    result = jax.ShapeDtypeStruct((num_rows, *row_shape), plan.dtype)
    return _rows.kernel(
        body,
        num_rows,
        tiles,
        out_type=(result, per_row, per_row, per_row) if with_statistics else (result,),
        scratch_types=(
            plgpu.SMEM((tiles.slots, 2, *row_shape), jnp.float32),
            plgpu.SMEM((tiles.slots, *row_shape), jnp.int8),
            plgpu.SMEM((tiles.slots, *row_shape), plan.dtype),
        ),
        loads=2,
    )(z, count, scores, where)


@functools.partial(jit_kernel, static_argnums=0)
def _backward(plan, grad, scores, where, theta, top, scale):
    tiles, (num_rows, _, *row_shape) = plan.grad_tiles, scores.shape
    chunks = _rows.chunks(row_shape[0], tiles.chunk)

    def body(theta_gmem, top_gmem, scale_gmem, scores_gmem, where_gmem, *refs):
        grad_gmem, dscores_gmem, ring, seen, grads, shares, full = refs

        def compute(row, slot):
            theta, top, scale = theta_gmem[row], top_gmem[row], scale_gmem[row]

            def first(rows):
                visible = _load(seen, (slot, rows)) != 0
                predicted = _load(ring, (slot, 0, rows)) * plan.scales[0]
                predicted = jnp.where(visible, predicted, -jnp.inf)
                share = _powers(predicted, theta, top) * scale
                kept = share != 0.0
                rest = _load(ring, (slot, 1, rows)) * plan.scales[1]
                rest = jnp.where(kept, rest, 0.0)
                grad = _load(grads, (slot, rows)).astype(jnp.float32)
                passed = share * jnp.where(kept, grad, 0.0)
                softplus, slope = _softplus(rest)
                ring[slot, 1, rows] = passed * slope * plan.scales[1]
                ring[slot, 0, rows] = passed * softplus
                shares[rows] = share
                return passed * softplus

            total = _rows.total(map(first, chunks))
            for rows in chunks:
                passed = _load(ring, (slot, 0, rows)) - _load(shares, (rows,)) * total
                ring[slot, 0, rows] = passed * plan.scales[0]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ring.at[slot], dscores_gmem.at[row])

        def copies(row, slot):
            yield scores_gmem.at[row], ring.at[slot]
            yield grad_gmem.at[row], grads.at[slot]
            yield where_gmem.at[plan.row_of_where(row)], seen.at[slot]

        _rows.walk(num_rows, tiles, full, copies, compute)

    return _rows.kernel(
        body,
        num_rows,
        tiles,
        out_type=(jax.ShapeDtypeStruct(scores.shape, scores.dtype),),
        scratch_types=(
            plgpu.SMEM((tiles.slots, 2, *row_shape), jnp.float32),
            plgpu.SMEM((tiles.slots, *row_shape), jnp.int8),
            plgpu.SMEM((tiles.slots, *row_shape), grad.dtype),
            plgpu.SMEM(tuple(row_shape), jnp.float32),
        ),
        loads=3,
    )(theta, top, scale, scores, where, grad)[0]


def _load(ref, index) -> jax.Array:
    """Part of a row, spread over the threads alike for every dtype."""
    ref = ref.at[index]
    layout = plgpu.Layout.WG_STRIDED(ref.shape, vec_size=4)
    return _compat.mosaic_gpu_load(plgpu, ref, layout)


def _powers(predicted, theta, top) -> jax.Array:
    """`exp(predicted - top)` of what is selected, else 0; what is not seen is -inf."""
    kept = (predicted > theta) | (predicted == top)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    return jnp.where(kept, jnp.exp(predicted - shift), 0.0)


def _softplus(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`log(1 + exp(x))` and its slope, to the last digits also where they are small.

    With e = exp(-abs(x)) it is `max(x, 0) + log(1 + e)`, of which the latter is
    `2 atanh(e / (2 + e))`: a series of odd powers of at most 1/3.
    """
    e = jnp.exp(-jnp.abs(x))
    s = e / (2.0 + e)
    square, series = s * s, 0.0
    for i in reversed(range(_TERMS)):
        series = series * square + 1 / (2 * i + 1)
    slope = jnp.where(x >= 0.0, 1.0, e) / (1.0 + e)
    return jnp.maximum(x, 0.0) + 2.0 * s * series, slope

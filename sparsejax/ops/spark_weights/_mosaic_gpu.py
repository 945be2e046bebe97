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
from sparsejax.ops._rows import COLUMNS, SHARED_BYTES, Tiles
from sparsejax.ops.gaussian_topk import num_entries

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_TERMS = 8  # of the series in `_softplus`: the next is below 2**-28 of the sum


def unsupported_reason(
    predicted: jax.Array, rest: jax.Array, z: ArrayLike, where: jax.Array, *, dtype
) -> str | None:
    """Why this kernel cannot take these, by shape and dtype; None if it can."""
    del rest, z, where
    if predicted.dtype != jnp.float32:
        return f"scores must be float32; got {predicted.dtype}"
    if dtype not in _DTYPES:
        return f"`dtype` must be bfloat16, float16 or float32; got {dtype}"
    keys = predicted.shape[-1]
    longest = SHARED_BYTES // _slot_bytes(1, dtype) // 512 * 512
    if keys % 512 or not 0 < keys <= longest:
        return f"keys must be a multiple of 512, at most {longest}; got {keys}"
    if predicted.size == 0:
        return f"there must be a row; got shape {predicted.shape}"
    return None


def _slot_bytes(keys: int, dtype) -> int:
    """Two rows of scores, one of weights or their gradients, `where`, and scratch."""
    return keys * (3 * 4 + 1 + jnp.dtype(dtype).itemsize)


def spark_weights(
    predicted: jax.Array,
    rest: jax.Array,
    z: ArrayLike,
    where: jax.Array,
    *,
    dtype,
    tiles: Tiles | None = None,
    grad_tiles: Tiles | None = None,
) -> jax.Array:
    """As the reference.

    Args:
      predicted: see `unsupported_reason`.
      rest: as `predicted`.
      z: a scalar, or one value a row.
      where: sizes of axes but the last may be 1.
      dtype: of the result.
      tiles: how the forward is cut; None for the default.
      grad_tiles: how the backward is cut; None for the default.

    Returns:
      Of the shape of `predicted`.
    """
    shape, keys = predicted.shape, predicted.shape[-1]
    lead = (*shape[:-1], 1)

    def of_rows(values):
        values = jnp.asarray(values, jnp.float32)
        return jnp.broadcast_to(values, lead).reshape(-1)

    def cut(rows):
        return rows.reshape(-1, keys // COLUMNS, COLUMNS)

    default = Tiles.default(_slot_bytes(keys, dtype), heavy=True)
    plan = _Plan(
        shape[:-1],
        where.shape[:-1],
        jnp.dtype(dtype),
        tiles or default,
        grad_tiles or default,
    )
    z, count = of_rows(z), of_rows(num_entries(where, where=where))
    where = cut(where.astype(jnp.int8))
    scores = cut(predicted), cut(rest)
    return jnp.reshape(_on_rows(plan, *scores, z, count, where), shape)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known before the arrays: sizes of their rows, and how work is cut."""

    sizes: tuple[int, ...]
    where_sizes: tuple[int, ...]
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
def _on_rows(plan, predicted, rest, z, count, where):
    return _forward(plan, predicted, rest, z, count, where, with_statistics=False)[0]


def _on_rows_fwd(plan, predicted, rest, z, count, where):
    operands = predicted, rest, z, count, where
    out, *statistics = _forward(plan, *operands, with_statistics=True)
    return out, (predicted, rest, where, *statistics)


def _on_rows_bwd(plan, residuals, grad):
    return *_backward(plan, grad, *residuals), None, None, None


_on_rows.defvjp(_on_rows_fwd, _on_rows_bwd)


# jitted, as is the backward: layers of equal shapes share the lowered kernel
@functools.partial(jax.jit, static_argnums=0, static_argnames="with_statistics")
def _forward(plan, predicted, rest, z, count, where, *, with_statistics):
    tiles, (num_rows, *row_shape) = plan.tiles, predicted.shape
    chunks = _rows.chunks(row_shape[0], tiles.chunk)

    def body(
        z_gmem, count_gmem, predicted_gmem, rest_gmem, where_gmem, out_gmem, *refs
    ):
        *statistics_gmem, ring, seen, out, full = refs

        def compute(row, slot):
            count = count_gmem[row]
            num = jnp.where(count == 0.0, 1.0, count)
            tops, sums = [], []
            for rows in chunks:
                visible = _load(seen, (slot, rows)) != 0
                scores = _load(ring, (slot, 0, rows))
                sums.append(jnp.where(visible, scores, 0.0))
                scores = jnp.where(visible, scores, -jnp.inf)
                tops.append(scores)
                ring[slot, 0, rows] = scores
            top = jnp.max(functools.reduce(jnp.maximum, tops))
            mean = _rows.total(sums) / num

            def squares(rows):
                scores = _load(ring, (slot, 0, rows))
                return jnp.where(scores == -jnp.inf, 0.0, _rows.squared(scores - mean))

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
                rest = jnp.where(power == 0.0, 0.0, _load(ring, (slot, 1, rows)))
                weights = power * scale * _softplus(rest)[0]
                out[slot, rows] = weights.astype(plan.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out.at[slot], out_gmem.at[row])
            if with_statistics:
                for gmem, value in zip(
                    statistics_gmem, (theta, top, scale), strict=True
                ):
                    gmem[row] = value

        def copies(row, slot):
            yield predicted_gmem.at[row], ring.at[slot, 0]
            yield rest_gmem.at[row], ring.at[slot, 1]
            yield where_gmem.at[plan.row_of_where(row)], seen.at[slot]

        _rows.walk(num_rows, tiles, full, copies, compute)

    per_row = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    result = jax.ShapeDtypeStruct(predicted.shape, plan.dtype)
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
        loads=3,
    )(z, count, predicted, rest, where)


@functools.partial(jax.jit, static_argnums=0)
def _backward(plan, grad, predicted, rest, where, theta, top, scale):
    tiles, (num_rows, *row_shape) = plan.grad_tiles, predicted.shape
    chunks = _rows.chunks(row_shape[0], tiles.chunk)

    def body(
        theta_gmem, top_gmem, scale_gmem, predicted_gmem, rest_gmem, where_gmem, *refs
    ):
        grad_gmem, dpredicted_gmem, drest_gmem, ring, seen, grads, shares, full = refs

        def compute(row, slot):
            theta, top, scale = theta_gmem[row], top_gmem[row], scale_gmem[row]

            def first(rows):
                visible = _load(seen, (slot, rows)) != 0
                scores = jnp.where(visible, _load(ring, (slot, 0, rows)), -jnp.inf)
                share = _powers(scores, theta, top) * scale
                kept = share != 0.0
                rest = jnp.where(kept, _load(ring, (slot, 1, rows)), 0.0)
                grad = _load(grads, (slot, rows)).astype(jnp.float32)
                passed = share * jnp.where(kept, grad, 0.0)
                softplus, slope = _softplus(rest)
                ring[slot, 1, rows] = passed * slope
                ring[slot, 0, rows] = passed * softplus
                shares[rows] = share
                return passed * softplus

            total = _rows.total(map(first, chunks))
            for rows in chunks:
                own = _load(ring, (slot, 0, rows))
                ring[slot, 0, rows] = own - _load(shares, (rows,)) * total
            plgpu.commit_smem()
            for i, gmem in enumerate((dpredicted_gmem, drest_gmem)):
                plgpu.copy_smem_to_gmem(
                    ring.at[slot, i], gmem.at[row], commit_group=False
                )
            plgpu.commit_smem_to_gmem_group()

        def copies(row, slot):
            yield predicted_gmem.at[row], ring.at[slot, 0]
            yield rest_gmem.at[row], ring.at[slot, 1]
            yield grad_gmem.at[row], grads.at[slot]
            yield where_gmem.at[plan.row_of_where(row)], seen.at[slot]

        _rows.walk(num_rows, tiles, full, copies, compute)

    like_scores = jax.ShapeDtypeStruct(predicted.shape, predicted.dtype)
    return _rows.kernel(
        body,
        num_rows,
        tiles,
        out_type=(like_scores, like_scores),
        scratch_types=(
            plgpu.SMEM((tiles.slots, 2, *row_shape), jnp.float32),
            plgpu.SMEM((tiles.slots, *row_shape), jnp.int8),
            plgpu.SMEM((tiles.slots, *row_shape), grad.dtype),
            plgpu.SMEM(tuple(row_shape), jnp.float32),
        ),
        loads=4,
    )(theta, top, scale, predicted, rest, where, grad)


def _load(ref, index) -> jax.Array:
    """Part of a row, spread over the threads alike for every dtype."""
    ref = ref.at[index]
    layout = plgpu.Layout.WG_STRIDED(ref.shape, vec_size=4)
    return _compat.mosaic_gpu_load(plgpu, ref, layout)


def _powers(scores, theta, top) -> jax.Array:
    """`exp(scores - top)` of what is selected, else 0; invisible scores are -inf."""
    kept = (scores > theta) | (scores == top)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    return jnp.where(kept, jnp.exp(scores - shift), 0.0)


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

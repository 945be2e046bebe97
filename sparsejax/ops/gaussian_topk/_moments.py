"""Mean and std of rows, float32 (float64 for float64).

In two passes: the mean, then the mean of squared distances to it. Of few rows on a GPU
in one, as a decode step has them: there each pass is a program that waits for the one
before, two programs for a long row. Parts of a row are merged then by their counts,
means and squared distances (Chan, Golub, LeVeque, 1979).
"""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax._promotion import common_dtype

AxisName = Hashable | tuple[Hashable, ...] | None
"""Mesh axis or axes over which rows are sharded, in `shard_map`; None for none."""

_FEW_ROWS = 1024  # the heads of some sequences, of one query each
_LONGEST = 2**24  # up to here float32 counts exactly


def mean_and_std(
    x: Float[Array, "*batch d"],
    *,
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """Mean and population std of each row, at least float32; the last axis kept as 1.

    Args:
      x: rows along the last axis.
      where: True = counts, broadcastable to `x`.
      axis_name: mesh axis or axes over which the last axis is sharded.

    Returns:
      The mean and the std; both 0 in a row without entries, NaN in one with a NaN or an
      infinite entry. The derivative of the std at 0 is 0.
    """
    x = x.astype(common_dtype(x.dtype, jnp.float32))
    if where is not None:
        where = jnp.broadcast_to(where, x.shape)
        x = jnp.where(where, x, 0)
    few = x.size <= _FEW_ROWS * x.shape[-1] and 0 < x.shape[-1] < _LONGEST
    # a row that is cut is reduced by sums, part by part
    whole = axis_name is None and jax.typeof(x).sharding.spec[-1] is None
    if few and whole:
        mean, var = _of_few_rows(x, where)
    else:
        mean, var = _two_passes(x, where, axis_name)
    # sqrt has an infinite slope at 0, which would make the gradient NaN
    std = jnp.where(var == 0, 0, jnp.sqrt(jnp.where(var == 0, 1, var)))
    return mean, std


def num_entries(
    x: Float[Array, "*batch d"],
    *,
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName = None,
) -> int | jax.Array:
    """How many entries a row has.

    Args:
      x: rows along the last axis, of any dtype; its shape is read.
      where: True = counts, broadcastable to `x`; None counts every entry.
      axis_name: mesh axis or axes over which the last axis is sharded, in `shard_map`;
        the entries of all shards are counted.

    Returns:
      An int, the same for all rows; under `where` int32 `[*batch, 1]`.

    Example:
      >>> x = jnp.ones((2, 3))
      >>> num_entries(x)
      3
      >>> print(num_entries(x, where=jnp.array([[True], [False]])))
      [[3]
       [0]]
    """
    if where is None:
        shards = 1 if axis_name is None else jax.lax.psum(1, axis_name)
        return x.shape[-1] * shards
    where = jnp.broadcast_to(where, x.shape)
    count = jnp.sum(where, axis=-1, keepdims=True, dtype=jnp.int32)
    return count if axis_name is None else jax.lax.psum(count, axis_name)


def _two_passes(x, where, axis_name=None) -> tuple[jax.Array, jax.Array]:
    """Mean and variance; `x` is 0 where it does not count."""
    count = jnp.maximum(num_entries(x, where=where, axis_name=axis_name), 1)
    count = jnp.asarray(count, x.dtype)

    def mean_of(values):
        total = jnp.sum(values, axis=-1, keepdims=True)
        return (total if axis_name is None else jax.lax.psum(total, axis_name)) / count

    mean = mean_of(x)
    centered = x - mean
    if where is not None:
        centered = jnp.where(where, centered, 0)
    return mean, mean_of(jnp.square(centered))


@jax.custom_jvp  # one for both, which holds nothing for the one that is not taken
def _of_few_rows(x, where) -> tuple[jax.Array, jax.Array]:
    """Mean and variance; `x` is 0 where it does not count."""
    return jax.lax.platform_dependent(x, where, cuda=_one_pass, default=_two_passes)


@_of_few_rows.defjvp
def _of_few_rows_jvp(primals, tangents):
    x, where = primals
    dx = tangents[0]
    mean, var = _of_few_rows(x, where)
    weight = 1 / jnp.maximum(num_entries(x, where=where), 1)
    if where is not None:
        weight = jnp.where(where, weight, 0)

    def mean_of(values):
        return jnp.sum(weight * values, axis=-1, keepdims=True)

    return (mean, var), (mean_of(dx), 2 * mean_of((x - mean) * dx))


def _one_pass(x, where) -> tuple[jax.Array, jax.Array]:
    """As `_two_passes`."""
    if where is None:
        # a mean far from 0 would cost digits of the distances between means
        shift, count = x[..., :1], jnp.ones_like(x)
    else:  # an entry that counts would take a search
        shift, count = jnp.zeros((), x.dtype), where.astype(x.dtype)
    parts = count, x - shift, jnp.zeros_like(x)
    nothing = (jnp.zeros((), x.dtype),) * 3
    count, mean, squares = (
        a[..., None] for a in jax.lax.reduce(parts, nothing, _merged, (x.ndim - 1,))
    )
    return mean + shift, squares / jnp.maximum(count, 1)


def _merged(a, b):
    """Of two parts together: count, mean, sum of squared distances to it."""
    (count, mean, squares), (other_count, other_mean, other_squares) = a, b
    total = count + other_count
    step = (other_mean - mean) * (other_count / jnp.maximum(total, 1))
    squares = squares + other_squares + step * (other_mean - mean) * count
    return total, mean + step, squares

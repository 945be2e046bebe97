"""The statistical top-k: about k entries of a row survive, without a sort."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparsejax import ops
from sparsejax.activations import _arguments


def statistical_topk(
    x: Float[Array, "*shape"],
    k: ArrayLike,
    *,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
    ddof: int = 0,
    huber_delta: float = 0.0,
    axis_name: ops.AxisName = None,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "*shape"]:
    """Keeps about the `k` highest entries of each row: `max(x - theta, 0)`.

    theta is `statistical_threshold(x, k)`: mean + std * Q(1 - k / d) over `axis`, Q the
    quantile of the standard normal. Gaussian rows keep k entries within about
    `sqrt(d)` of it; other rows keep another number, and one can keep none (a row of
    two values half and half) or, with an outlier, few. Survivors are shifted down by
    theta. Mean and std are differentiated through, so that entries which do not survive
    get a gradient too. For a Gemma 3n layer `k` is `0.05 * d_ff`.

    Args:
      x: any floating dtype; statistics are float32 (float64 for float64), in which the
        squares of a row must not overflow: entries stay below about 1e16.
      k: expected number of survivors of a row, at least 1; a Python number, or a traced
        scalar, whose value is not checked. From the number of entries on, the row is
        returned unchanged (the limit from below is another).
      axis: the axis that a row lies along.
      where: True = counts, broadcastable to `x`. Statistics and d are those of the True
        entries of a row; False entries give 0, are never read and get no gradient. A
        row of at most `k` True entries keeps them all, unchanged.
      ddof: 0 for the population std, 1 for the sample std.
      huber_delta: above 0, u = x - theta gives `u**2 / (2 * huber_delta)` up to that u
        and `u - huber_delta / 2` beyond, which is continuously differentiable.
      axis_name: mesh axis or axes over which `axis` is sharded, within `shard_map`.
        Under plain jit a sharded axis needs nothing.
      implementation: "reference", "pallas_tpu", "mosaic_gpu", or None for the fastest
        that serves; kernels take neither `where` nor `axis_name`, and are
        differentiable once, in reverse mode: `jax.jvp` and second derivatives need
        "reference".

    Returns:
      As `x`; at least 0, except in rows that are returned unchanged. A row with a NaN
      or an infinite entry is NaN (where `where` is True).

    Raises:
      TypeError: if `x` is not floating, `where` is not bool, `k` is not a real number,
        or `axis` is not an int.
      ValueError: if `k` is less than 1 or NaN, or `axis`, `where`, `ddof` or
        `huber_delta` is out of range.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> survivors = statistical_topk(jnp.arange(8.0), 2)
      >>> print(np.asarray(survivors[-3:]).round(3))
      [0.    0.955 1.955]

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3; Gemma 3n (Google,
      2025) for the population std and the gradient through it. Departures: float32
      statistics; the Huber form, of which the paper gives no formula here, is ours.
    """
    x, z, where = _rows(x, k, axis, where, ddof, axis_name)
    out = ops.gaussian_topk(
        x,
        z,
        huber_delta=huber_delta,
        where=where,
        axis_name=axis_name,
        implementation=implementation,
    )
    return jnp.moveaxis(out, -1, axis)


def statistical_glu(
    x: Float[Array, "*shape"],
    up: Float[Array, "*shape"],
    k: ArrayLike,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
    ddof: int = 0,
    huber_delta: float = 0.0,
    axis_name: ops.AxisName = None,
    implementation: ops.Implementation | None = None,
) -> Float[Array, "*shape"]:
    """A gated linear unit of survivors: `activation(statistical_topk(x, k)) * up`.

    It is all that a Spark FFN does between its products, in one pass over the operands
    forward and one backward where a kernel serves. All is computed in float32 (float64
    for float64) and rounded once: in a dtype of 16 bits the formula, written out,
    rounds the survivors and their activation too. Kernels save `x`, `up` and two
    float32 numbers a row for the backward.

    Args:
      x: what the gate gives before its activation; any floating dtype.
      up: of the shape and dtype of `x`.
      k: expected number of survivors of a row of `x`, as in `statistical_topk`; from
        the number of entries on, all survive unchanged.
      activation: elementwise; GELU in its tanh form, as in Gemma. Which ones kernels
        take is in `sj.ops.Activation`.
      axis: the axis that a row lies along.
      where: True = counts, broadcastable to `x`; False entries give 0, are never
        read and get no gradient.
      ddof: 0 for the population std, 1 for the sample std.
      huber_delta: as in `statistical_topk`.
      axis_name: mesh axis or axes over which `axis` is sharded, within `shard_map`.
      implementation: as in `statistical_topk`.

    Returns:
      As `x`.

    Raises:
      TypeError: if `x` is not floating, `where` is not bool, `k` is not a real number,
        or `axis` is not an int.
      ValueError: if `up` is not like `x`, `k` is less than 1 or NaN, or `axis`,
        `where`, `ddof` or `huber_delta` is out of range.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> hidden = statistical_glu(jnp.arange(8.0), jnp.full(8, 2.0), 2)
      >>> print(np.asarray(hidden[-3:]).round(3))
      [0.    1.584 3.81 ]

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3.
    """
    x, up = jnp.asarray(x), jnp.asarray(up)
    if (up.shape, up.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"`up` must be like `x`, {jax.typeof(x)}; got {jax.typeof(up)}. Cast it or "
            "broadcast it."
        )
    x, z, where = _rows(x, k, axis, where, ddof, axis_name)
    out = ops.gaussian_topk(
        x,
        z,
        jnp.moveaxis(up, axis, -1),
        activation=activation,
        huber_delta=huber_delta,
        where=where,
        axis_name=axis_name,
        implementation=implementation,
    )
    return jnp.moveaxis(out, -1, axis)


def statistical_threshold(
    x: Float[Array, "*shape"],
    k: ArrayLike,
    *,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
    ddof: int = 0,
    axis_name: ops.AxisName = None,
) -> Float[Array, "*rows"]:
    """The value that about `k` entries of each row exceed, if the row is Gaussian.

    Args:
      x: any floating dtype; statistics are float32 (float64 for float64).
      k: expected number of survivors of a row, at least 1; a Python number, or a traced
        scalar, whose value is not checked.
      axis: the axis that a row lies along.
      where: True = counts, broadcastable to `x`, as in `statistical_topk`.
      ddof: 0 for the population std, 1 for the sample std.
      axis_name: mesh axis or axes over which `axis` is sharded, within `shard_map`.

    Returns:
      theta in `x.dtype`, `axis` kept as 1; -inf for a row of at most `k` entries. For
      fewer, `statistical_topk(x, k) == relu(x - theta)` bit for bit, under False of
      `where` aside.

    Raises:
      TypeError: if `x` is not floating, `where` is not bool, `k` is not a real number,
        or `axis` is not an int.
      ValueError: if `k` is less than 1 or NaN, or `axis`, `where` or `ddof` is out of
        range.

    Example:
      >>> statistical_threshold(jnp.arange(8.0), 2).round(3)
      Array([5.045], dtype=float32)

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3.
    """
    x, z, where = _rows(x, k, axis, where, ddof, axis_name)
    theta = ops.gaussian_threshold(x, z, where=where, axis_name=axis_name)
    return jnp.moveaxis(theta, -1, axis)


def _rows(
    x, k, axis, where, ddof, axis_name
) -> tuple[jax.Array, float | ArrayLike, jax.Array | None]:
    """`x` and `where`, checked, with rows along the last axis, and the z for `k`."""
    x = _arguments.check_values(x, axis)
    _arguments.check_ddof(ddof)
    k, where = _arguments.check_k(k), _arguments.check_where(where, x)
    x = jnp.moveaxis(x, axis, -1)
    where = None if where is None else jnp.moveaxis(where, axis, -1)
    num = ops.num_entries(x, where=where, axis_name=axis_name)
    return x, _arguments.quantile(k, num, ddof, dtype=x.dtype), where

"""The Gaussian threshold and what exceeds it, in plain jnp: the definition.

Its gradients are autodiff's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparsejax._promotion import to_rank
from sparsejax.ops._activations import Activation
from sparsejax.ops.gaussian_topk._moments import AxisName, mean_and_std


def gaussian_threshold(
    x: Float[Array, "*batch d"],
    z: ArrayLike,
    *,
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch 1"]:
    """`mean + std * z` of each row, in `x.dtype`.

    Args:
      x: rows along the last axis, any floating dtype.
      z: a scalar, or one value a row: broadcastable to `[*batch, 1]`; -inf for a
        threshold of -inf.
      where: True = counts, broadcastable to `x`; None counts every entry. Values under
        False are never read. A row without True has mean and std 0.
      axis_name: mesh axis or axes over which the last axis is sharded, in `shard_map`.

    Returns:
      The threshold, the last axis kept as 1. The population std of a constant row is
      0, and so is its derivative.

    Raises:
      TypeError: if `x` is not floating.

    Example:
      >>> gaussian_threshold(jnp.arange(8.0), 0.6744898).round(3)
      Array([5.045], dtype=float32)
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating; got {jax.typeof(x)}. Convert it.")
    unchanged = jnp.asarray(z) == -jnp.inf
    x, z = _without(unchanged, x, z)
    theta = _threshold(x, z, where, axis_name)
    return jnp.where(unchanged, -jnp.inf, theta).astype(x.dtype)


def gaussian_topk(
    x: Float[Array, "*batch d"],
    z: ArrayLike,
    up: Float[Array, "*batch d"] | None = None,
    *,
    activation: Activation | None = None,
    huber_delta: float = 0.0,
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch d"]:
    """`activation(max(x - theta, 0)) * up` with theta = `gaussian_threshold(x, z)`.

    Args:
      x: rows along the last axis, any floating dtype.
      z: a scalar, or one value a row: broadcastable to `[*batch, 1]`; a row with -inf
        survives unchanged.
      up: as `x`, or None for no product.
      activation: elementwise, of what survives; None for none.
      huber_delta: width of the quadratic part; 0 for none.
      where: True = counts, broadcastable to `x`; False entries give 0.
      axis_name: mesh axis or axes over which the last axis is sharded, in `shard_map`.

    Returns:
      As `x`. All is computed in float32 and rounded once.
    """
    if where is not None:  # what is under False may be NaN
        x = jnp.where(where, x, 0)
        up = None if up is None else jnp.where(where, up, 0)
    # The forward uses theta as rounded to `x.dtype`, but its gradient, a sum over the
    # row, is not rounded.
    unchanged = jnp.asarray(z) == -jnp.inf
    finite, z = _without(unchanged, x, z)
    theta = _rounded(_threshold(finite, z, where, axis_name), x.dtype)
    out = soft_threshold(finite.astype(theta.dtype) - theta, huber_delta)
    out = jnp.where(unchanged, x.astype(theta.dtype), out)
    out = glu(out, up, activation).astype(x.dtype)
    return out if where is None else jnp.where(where, out, 0)


def glu(s: jax.Array, up: jax.Array | None, activation: Activation | None) -> jax.Array:
    """`activation(s) * up` in the dtype of `s`, without what is None."""
    s = s if activation is None else activation(s)
    return s if up is None else s * up.astype(s.dtype)


def _without(unchanged, x, z) -> tuple[jax.Array, jax.Array]:
    """`x` and `z` with 0 where a row is unchanged: else infinities reach gradients."""
    return jnp.where(unchanged, 0, x), jnp.where(unchanged, 0, z)


def soft_threshold(excess: jax.Array, huber_delta: float) -> jax.Array:
    """`max(u, 0)`, or its Huber form: quadratic up to delta, then `u - delta / 2`."""
    if huber_delta == 0:
        return jax.nn.relu(excess)
    excess = jax.nn.relu(excess)
    clipped = jnp.minimum(excess, huber_delta)
    return clipped * (excess - clipped / 2) / huber_delta


def _threshold(x, z, where, axis_name) -> jax.Array:
    mean, std = mean_and_std(x, where=where, axis_name=axis_name)
    return mean + std * to_rank(jnp.asarray(z, std.dtype), std.ndim)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(value: jax.Array, dtype) -> jax.Array:
    """`value` rounded to `dtype` but not cast; its derivative is not rounded."""
    return value.astype(dtype).astype(value.dtype)


@_rounded.defjvp
def _rounded_jvp(dtype, primals, tangents):
    return _rounded(*primals, dtype), tangents[0]

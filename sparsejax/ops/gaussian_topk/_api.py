"""`gaussian_topk`: checks, then the reference or a kernel."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparsejax.ops._activations import Activation, unsupported_activation
from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops._shapes import broadcasts
from sparsejax.ops.gaussian_topk import _reference
from sparsejax.ops.gaussian_topk._moments import AxisName

# A row is one multiprocessor's. One row of 24576 took 1 us longer on an H200 than the
# five programs that XLA makes of the reference, one of 49152 10 us.
_FEWEST_ROWS = 16


def gaussian_topk(
    x: Float[Array, "*batch d"],
    z: ArrayLike,
    up: Float[Array, "*batch d"] | None = None,
    *,
    activation: Activation | None = None,
    huber_delta: float = 0.0,
    where: Bool[Array, "..."] | None = None,
    axis_name: AxisName = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d"]:
    """What exceeds `mean + z * std` of its row, activated: `f(max(x - theta, 0)) * up`.

    Rows lie along the last axis. Mean and population std are float32; theta is cast to
    `x.dtype`; all that follows is float32, and the result is rounded once. Gradients
    run through mean, std and z: with h the derivative of the output with respect to
    `x - theta` and G the sum of `g * h` over the row,
    `dx = g * h - G * (1 / d + z * (x - mean) / (d * std))` and `dz = -G * std`.

    Args:
      x: any floating dtype, at least one axis.
      z: standard normal quantile of the share that is dropped; a Python float, a
        (traced) scalar, or one value a row, broadcastable to `[*batch, 1]`. A row with
        -inf survives unchanged. A `ddof` other than 0 is a factor of z.
      up: of the shape and dtype of `x`; multiplies the result. None for no product.
      activation: f, elementwise, of what survives; None for none. Which ones kernels
        take is in `sj.ops.Activation`.
      huber_delta: 0 for `max(u, 0)` of u = x - theta; above 0 the result is
        `u**2 / (2 * huber_delta)` up to that u and `u - huber_delta / 2` beyond, which
        is continuously differentiable.
      where: True = counts, broadcastable to `x`; False entries give 0 and get no
        gradient. Only the reference takes it.
      axis_name: mesh axis or axes over which the last axis is sharded, in `shard_map`;
        the sums then run over all shards. Only the reference takes it.
      implementation: "reference", "pallas_tpu", "mosaic_gpu", or None for the fastest
        that serves, on a GPU the reference for few rows. Kernels read x and `up` once
        and write the result once; in the backward they read the gradient too, and write
        theirs once.

    Returns:
      As `x`. A kernel is differentiable in reverse mode, once; the reference is without
      limit.

    Raises:
      TypeError: if `x` is not floating, or `where` is not bool.
      ValueError: if `x` has no axis, `huber_delta` is negative or not finite, `z` or
        `where` does not broadcast, `up` is not like `x`, or the implementation is
        unknown.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> survivors = gaussian_topk(jnp.arange(8.0), 0.6744898)
      >>> print(np.asarray(survivors[-3:]).round(3))
      [0.    0.955 1.955]

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3 (statistical top-k).
      The form of the Huber variant is ours.
    """
    x = jnp.asarray(x)
    up, where = (None if a is None else jnp.asarray(a) for a in (up, where))
    _check(x, z, up, huber_delta, where)
    elementwise = {"activation": activation, "huber_delta": huber_delta}
    reference = functools.partial(
        _reference.gaussian_topk, where=where, axis_name=axis_name, **elementwise
    )
    kernels = {
        name: functools.partial(get, elementwise, where, axis_name)
        for name, get in {"pallas_tpu": _tpu, "mosaic_gpu": _gpu}.items()
    }
    if implementation is None and math.prod(x.shape[:-1]) < _FEWEST_ROWS:
        del kernels["mosaic_gpu"]
    return dispatch((x, z, up), implementation, reference=reference, kernels=kernels)


def _tpu(elementwise, where, axis_name) -> Kernel:
    from sparsejax.ops.gaussian_topk import _pallas_tpu

    return _kernel(_pallas_tpu, elementwise, where, axis_name)


def _gpu(elementwise, where, axis_name) -> Kernel:
    from sparsejax.ops.gaussian_topk import _mosaic_gpu

    return _kernel(_mosaic_gpu, elementwise, where, axis_name)


def _kernel(module, elementwise, where, axis_name) -> Kernel:
    def unsupported_reason(x, z, up):
        if where is not None:
            return "only the reference takes `where`"
        if axis_name is not None:
            return "only the reference takes `axis_name`; a kernel sees whole rows"
        unsupported = unsupported_activation(elementwise["activation"])
        return unsupported or module.unsupported_reason(x, z, up)

    run = functools.partial(module.gaussian_topk, **elementwise)
    return Kernel(run, unsupported_reason)


def _check(x, z, up, huber_delta, where) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating; got {jax.typeof(x)}. Convert it.")
    if not x.ndim:
        raise ValueError("`x` must have at least one axis; got a scalar.")
    if not (huber_delta >= 0 and math.isfinite(huber_delta)):
        raise ValueError(
            f"`huber_delta` must be at least 0 and finite; got {huber_delta}."
        )
    rows = (*x.shape[:-1], 1)
    if not broadcasts(jnp.shape(z), rows):
        raise ValueError(
            f"`z` must be a scalar or broadcast to {rows}, one value a row of `x`; got "
            f"shape {jnp.shape(z)}."
        )
    if up is not None and (up.shape, up.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"`up` must be like `x`, {jax.typeof(x)}; got {jax.typeof(up)}. Cast it or "
            "broadcast it."
        )
    if where is None:
        return
    if where.dtype != jnp.bool_:
        raise TypeError(f"`where` must be bool; got {jax.typeof(where)}.")
    if not broadcasts(where.shape, x.shape):
        raise ValueError(
            f"`where` must broadcast to the shape of `x`, {x.shape}; got {where.shape}."
        )

"""`spark_weights`: checks, then the reference or a kernel."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops._shapes import broadcasts
from sparsejax.ops.spark_weights import _reference

# With the 32 rows of a decode step, of 512 or 4096 keys, the kernel's first form took a
# layer 4 us longer on an H200 than the eight programs that XLA makes of the reference.
_FEWEST_ROWS = 1024


def spark_weights(
    scores: Float[Array, "*rows 2 keys"],
    z: ArrayLike,
    where: Bool[Array, "*#rows keys"],
    *,
    scales: tuple[float, float] = (1.0, 1.0),
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*rows keys"]:
    """What Spark attention multiplies values by: `softmax(predicted) * softplus(rest)`.

    A row has two scores of each key, predicted and rest, and the softmax runs over the
    keys that it selects: those whose predicted score exceeds mean + std * z of the
    scores under `where`, and always the highest, with all that equal it. All other keys
    get 0. No gradient passes through the selection.

    Args:
      scores: predicted and rest, floating, side by side as one product gives them.
      z: standard normal quantile of the share that is dropped; a scalar, or one value a
        row, broadcastable to `[*rows, 1]`; may be traced. -inf selects all.
      where: True where the row may see the key; each axis but the last may be 1. False
        entries are never read. A row without True gives zeros; one with a NaN of its
        predicted scores under True gives NaN.
      scales: Python numbers that multiply predicted and rest before all else.
      dtype: of the result; that of `scores` by default. All is computed in the latter.
      implementation: "reference", "mosaic_gpu", or None for the fastest that serves;
        with fewer than 1024 rows that is the reference. The kernel reads each row once
        and writes it once, forward and backward; it saves three float32 numbers a row.

    Returns:
      The weights, which are not normalised after the softplus. A kernel is
      differentiable in reverse mode, once; the reference is without limit.

    Raises:
      TypeError: if `scores` is not floating or `where` not bool.
      ValueError: if `scores` has no two rows side by side, or `z` or `where` does not
        broadcast.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> predicted = jnp.array([0.0, 0.1, 5.0, 0.2, 9.0])
      >>> scores = jnp.stack([predicted, jnp.zeros(5)])
      >>> sj.ops.spark_weights(scores, 1.0, predicted < 9).round(3)
      Array([0.   , 0.   , 0.693, 0.   , 0.   ], dtype=float32)

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3. That the highest is
      always selected is our addition.
    """
    scores, where = jnp.asarray(scores), jnp.asarray(where)
    _check(scores, z, where)
    dtype = jnp.dtype(scores.dtype if dtype is None else dtype)
    settings = {"scales": tuple(scales), "dtype": dtype}
    num_rows = math.prod(scores.shape[:-2])
    few = implementation is None and num_rows < _FEWEST_ROWS
    return dispatch(
        (scores, z, where),
        implementation,
        reference=functools.partial(_reference.spark_weights, **settings),
        kernels={} if few else {"mosaic_gpu": functools.partial(_gpu, settings)},
    )


def _gpu(settings) -> Kernel:
    from sparsejax.ops.spark_weights import _mosaic_gpu

    return Kernel(
        functools.partial(_mosaic_gpu.spark_weights, **settings),
        functools.partial(_mosaic_gpu.unsupported_reason, dtype=settings["dtype"]),
    )


def _check(scores, z, where) -> None:
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(
            f"`scores` must be floating; got {jax.typeof(scores)}. Convert it."
        )
    if scores.ndim < 2 or scores.shape[-2] != 2:
        raise ValueError(
            "`scores` must have shape `[*rows, 2, keys]`; got "
            f"{jax.typeof(scores)}. Stack predicted and rest along axis -2."
        )
    if where.dtype != jnp.bool_:
        raise TypeError(f"`where` must be bool; got {jax.typeof(where)}.")
    *sizes, _, keys = scores.shape
    whole = (*sizes, keys)
    is_like = where.ndim == len(whole) and where.shape[-1] == keys
    if not is_like or not broadcasts(where.shape, whole):
        raise ValueError(
            f"`where` must have the shape {whole}, each axis but the last "
            f"maybe of size 1; got {where.shape}."
        )
    if not broadcasts(jnp.shape(z), (*sizes, 1)):
        raise ValueError(
            f"`z` must be a scalar or broadcast to {(*sizes, 1)}, one value a row; got "
            f"shape {jnp.shape(z)}."
        )

"""`spark_weights`: checks, then the reference or a kernel."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops.spark_weights import _reference


def spark_weights(
    predicted: Float[Array, "*rows keys"],
    rest: Float[Array, "*rows keys"],
    z: ArrayLike,
    where: Bool[Array, "*#rows keys"],
    *,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*rows keys"]:
    """What Spark attention multiplies values by: `softmax(predicted) * softplus(rest)`.

    The softmax runs over the keys that a row selects: those whose predicted score
    exceeds mean + std * z of the scores under `where`, and always the highest, with all
    that equal it. All others give 0. No gradient passes through the selection.

    Args:
      predicted: scores, floating; computed in float32 at least.
      rest: of the shape and dtype of `predicted`.
      z: standard normal quantile of the share that is dropped; a scalar, or one value a
        row, broadcastable to `[*rows, 1]`; may be traced. -inf selects all.
      where: True where the row may see the key, with as many axes as `predicted`, each
        of its size or 1, the last of its size. False entries are never read. A row
        without True gives zeros; one with a NaN under True gives NaN.
      dtype: of the result; that of `predicted` by default.
      implementation: "reference", "mosaic_gpu", or None for the fastest that serves.
        The kernel reads each row once and writes it once, forward and backward; it
        saves three float32 numbers a row.

    Returns:
      The weights, which are not normalised after the softplus.

    Raises:
      TypeError: if `predicted` is not floating or `where` not bool.
      ValueError: if `rest` is not like `predicted`, or `z` or `where` does not
        broadcast.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> scores, seen = jnp.array([0.0, 0.1, 5.0, 0.2, 9.0]), jnp.arange(5) < 4
      >>> sj.ops.spark_weights(scores, jnp.zeros(5), 1.0, seen).round(3)
      Array([0.   , 0.   , 0.693, 0.   , 0.   ], dtype=float32)

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3. That the highest is
      always selected is our addition.
    """
    predicted, rest, where = map(jnp.asarray, (predicted, rest, where))
    _check(predicted, rest, z, where)
    dtype = jnp.dtype(predicted.dtype if dtype is None else dtype)
    return dispatch(
        (predicted, rest, z, where),
        implementation,
        reference=functools.partial(_reference.spark_weights, dtype=dtype),
        kernels={"mosaic_gpu": functools.partial(_gpu, dtype)},
    )


def _gpu(dtype) -> Kernel:
    from sparsejax.ops.spark_weights import _mosaic_gpu

    return Kernel(
        functools.partial(_mosaic_gpu.spark_weights, dtype=dtype),
        functools.partial(_mosaic_gpu.unsupported_reason, dtype=dtype),
    )


def _check(predicted, rest, z, where) -> None:
    if not jnp.issubdtype(predicted.dtype, jnp.floating):
        raise TypeError(
            f"`predicted` must be floating; got {jax.typeof(predicted)}. Convert it."
        )
    if (rest.shape, rest.dtype) != (predicted.shape, predicted.dtype):
        raise ValueError(
            f"`rest` must be like `predicted`, {jax.typeof(predicted)}; got "
            f"{jax.typeof(rest)}."
        )
    if where.dtype != jnp.bool_:
        raise TypeError(f"`where` must be bool; got {jax.typeof(where)}.")
    rows = predicted.shape[:-1]
    fits = where.ndim == predicted.ndim > 0 and all(
        given in (1, size) for given, size in zip(where.shape, rows, strict=False)
    )
    if not fits or where.shape[-1] != predicted.shape[-1]:
        raise ValueError(
            "`where` must have the axes of `predicted`, of its sizes or 1, the last of "
            f"its size; got {where.shape} for {predicted.shape}."
        )
    try:
        fits = jnp.broadcast_shapes(jnp.shape(z), (*rows, 1)) == (*rows, 1)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`z` must be a scalar or broadcast to {(*rows, 1)}, one value a row; got "
            f"shape {jnp.shape(z)}."
        )

"""`keep_highest`: checks, then the reference or a kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax._ints import check_int
from sparsejax._pairs import are_few
from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops._shapes import broadcasts
from sparsejax.ops.keep_highest import _reference


def keep_highest(
    x: Float[Array, "*rows d"],
    num_kept: Any,
    *,
    implementation: Implementation | None = None,
) -> Bool[Array, "*rows d"]:
    """Keeps the `num_kept` highest entries of each row.

    Exactly so many, also under ties: of equal entries those further left are kept. NaN
    ranks below every number; subnormal numbers may count as 0.

    Args:
      x: rows along the last axis, at least one entry.
      num_kept: at least 0; all are kept from `d` on. A Python int of at least 1, or
        int32 that broadcasts to the rows and may be traced.
      implementation: "reference", "mosaic_gpu" (rows of at most 256 entries, each read
        once), or None for the fastest that serves.

    Returns:
      True where kept. No gradient.

    Raises:
      TypeError: if `x` is not floating or `num_kept` not of integers.
      ValueError: if rows have no entries, or an int is below 1.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> print(sj.ops.keep_highest(jnp.array([0.5, 2.0, 3.0, 2.0]), 2))
      [False  True  True False]
    """
    x = jax.lax.stop_gradient(jnp.asarray(x))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating; got {jax.typeof(x)}. Convert it.")
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"`x` must have rows with entries; got shape {x.shape}.")
    if isinstance(num_kept, int):
        check_int("num_kept", num_kept, least=1)
    elif not jnp.issubdtype(jnp.asarray(num_kept).dtype, jnp.integer):
        raise TypeError(
            f"`num_kept` must be of integers; got {jax.typeof(jnp.asarray(num_kept))}."
        )
    elif not broadcasts(jnp.shape(num_kept), x.shape[:-1]):
        raise ValueError(
            f"`num_kept` must broadcast to the rows, {x.shape[:-1]}; got shape "
            f"{jnp.shape(num_kept)}."
        )

    # an int stays one, which spares the reference a sort
    static = {"num_kept": num_kept} if isinstance(num_kept, int) else {}
    operands = (x,) if static else (x, jnp.asarray(num_kept, jnp.int32))
    counted = implementation is None and are_few(_reference.num_comparisons(x))
    return dispatch(
        operands,
        implementation,
        reference=functools.partial(_reference.keep_highest, **static),
        kernels={} if counted else {"mosaic_gpu": functools.partial(_gpu, static)},
    )


def _gpu(static: dict[str, int]) -> Kernel:
    from sparsejax.ops.keep_highest import _mosaic_gpu

    run = functools.partial(_mosaic_gpu.keep_highest, **static)
    return Kernel(run, lambda x, num_kept=None: _mosaic_gpu.unsupported_reason(x))

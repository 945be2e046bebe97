"""What the selectors check, and the quantile that a number of survivors asks for."""

import math
import numbers
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from sparsejax import ops
from sparsejax._ints import check_int
from sparsejax._promotion import common_dtype


def check_floating(x: Any) -> jax.Array:
    """`x` as a floating array, or an error that says what it is."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating; got {jax.typeof(x)}. Convert it.")
    return x


def check_values(x: Any, axis: int) -> jax.Array:
    """`x` as a floating array that has `axis`, or an error that says what it is."""
    x = check_floating(x)
    if not -x.ndim <= check_int("axis", axis) < x.ndim:
        raise ValueError(f"`axis` must be an axis of `x`, {jax.typeof(x)}; got {axis}.")
    return x


def check_where(where: Any, x: jax.Array) -> jax.Array | None:
    """`where` with the axes of `x`, sizes 1 kept; None stays None."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"`where` must be bool; got {jax.typeof(where)}.")
    check_broadcasts("where", where, x)
    return where.reshape((1,) * (x.ndim - where.ndim) + where.shape)


def check_broadcasts(name: str, value: jax.Array, x: jax.Array) -> None:
    """Raises a ValueError unless `value` broadcasts to the shape that `x` has."""
    if not ops.broadcasts(value.shape, x.shape):
        raise ValueError(
            f"`{name}` must broadcast to the shape of `x`, {x.shape}; got "
            f"{value.shape}."
        )


def check_k(k: Any, *, at_least: float = 1) -> Any:
    """`k` as a Python number if its value is known, else the traced scalar.

    Raises:
      TypeError: if it is no real number, or no scalar.
      ValueError: if a known value is NaN or less than `at_least`.
    """
    if isinstance(k, Tracer | jax.Array | np.ndarray):
        if k.ndim or k.dtype == jnp.bool_ or not jnp.isrealobj(k):
            raise TypeError(f"`k` must be a real scalar; got {jax.typeof(k)}.")
        if isinstance(k, Tracer):
            return k
        k = k.item()
    if isinstance(k, bool | np.bool_) or not isinstance(k, numbers.Real):
        raise TypeError(f"`k` must be a number or a traced scalar; got {k!r}.")
    if not k >= at_least:  # pyright: ignore[reportOperatorIssue] - a real number
        raise ValueError(f"`k` must be at least {at_least}; got k={k}.")
    return k


def check_ddof(ddof: int) -> None:
    """Raises unless the std divides by n or by n - 1."""
    if ddof not in (0, 1) or isinstance(ddof, bool):
        raise ValueError(f"`ddof` must be 0 or 1; got {ddof!r}.")


def quantile(
    k: Any, num: Any, ddof: int, *, dtype: DTypeLike = jnp.float32
) -> float | ArrayLike:
    """The z for which `mean + z * std` is exceeded by `k` of `num` Gaussian entries.

    It is `Q(1 - k / num)` by the symmetry `-Q(k / num)`, which loses no digits, times
    `sqrt(num / (num - ddof))`, which turns the population std into that of `ddof`.

    Args:
      k: from `check_k`.
      num: number of entries, an int or int32[..., 1].
      ddof: 0 or 1.
      dtype: of the values whose quantile it is; what is computed has it at least, and
        float32 at least.

    Returns:
      A Python float if `k` and `num` are Python numbers, else an array; -inf where all
      entries survive.

    Example:
      >>> round(quantile(2, 8, 0), 5)
      0.67449
    """
    if not isinstance(k, jax.Array) and not isinstance(num, jax.Array):
        if k >= num:
            return -math.inf
        spread = math.sqrt(num / (num - ddof))
        return -statistics.NormalDist().inv_cdf(k / num) * spread
    dtype = common_dtype(dtype, jnp.float32, jnp.result_type(k))
    whole = jnp.issubdtype(jnp.result_type(k), jnp.integer)
    every = k >= (num if whole else jnp.asarray(num, dtype))
    # all survive where num <= 1 <= k, so num > ddof elsewhere
    num = jnp.where(every, 2, num).astype(dtype)
    share = jnp.where(every, 0.5, jnp.asarray(k, dtype) / num)
    z = -jax.scipy.special.ndtri(share) * jnp.sqrt(num / (num - ddof))
    return jnp.where(every, -jnp.inf, z)

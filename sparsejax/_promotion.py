"""Promotion of dtypes and ranks by name, where JAX may be told to do none by itself.

Under `jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` it
forbids what nobody asked for.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def common_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The dtype that values of these promote to.

    Args:
      *dtypes: one or more.

    Returns:
      That of `jnp.promote_types`; of an 8-bit float and another dtype, which JAX
      promotes to none, as of bfloat16, which holds its values.

    Example:
      >>> with jax.numpy_dtype_promotion("strict"):
      ...     print(common_dtype(jnp.bfloat16, jnp.float32))
      float32
    """
    found = {jnp.dtype(dtype) for dtype in dtypes}
    if len(found) > 1:
        found = {
            jnp.dtype(jnp.bfloat16)
            if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1
            else dtype
            for dtype in found
        }
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*found)


def to_rank(x: jax.Array, ndim: int) -> jax.Array:
    """Gives an array axes of one in front, as broadcasting does.

    Args:
      x: an array of at most `ndim` axes.
      ndim: how many axes it is to have.

    Returns:
      `x` with that many.

    Example:
      >>> to_rank(jnp.arange(3), 2).shape
      (1, 3)
    """
    return jnp.expand_dims(x, range(ndim - x.ndim))


def along_last(num: int, ndim: int, dtype: DTypeLike | None = None) -> jax.Array:
    """Gives 0 to `num - 1` along the last of `ndim` axes, as `jnp.arange` does of one.

    Example:
      >>> along_last(3, 2)
      Array([[0, 1, 2]], dtype=int32)
    """
    return to_rank(jnp.arange(num, dtype=dtype), ndim)

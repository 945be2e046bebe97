"""What the kernels for TPU share: products, and what their results are."""

from typing import Any

import jax
import jax.numpy as jnp

_SETTING = "jax_default_matmul_precision"
# its values that round float32 operands to bfloat16
_ROUNDED = (None, "default", "bfloat16", "BF16_BF16_F32")


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product over one axis of each, in float32.

    Of 16-bit operands it is exact but for the sums, whatever the precision that is
    asked for by `jax.default_matmul_precision`. Float32 operands are rounded to
    bfloat16 by default and where that is asked for, as in `jnp.dot` on a TPU; with
    every other precision they are not, also where XLA has one between.

    Args:
      a: a matrix.
      b: a matrix of its dtype.
      axes: of `a` and of `b`.

    Example:
      >>> print(dot(jnp.ones((2, 3)), jnp.ones((2, 3)), (1, 1)))
      [[3. 3.]
       [3. 3.]]
    """
    rounded = getattr(jax.config, _SETTING) in _ROUNDED
    exact = a.dtype == jnp.float32 and not rounded
    return jax.lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def result(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """A result of a kernel, which inside of `jax.shard_map` varies as an operand does.

    Args:
      shape: of the result.
      dtype: of the result.
      like: an operand; `dispatch` makes all of them vary alike.

    Example:
      >>> result((2, 3), jnp.int32, jnp.ones(1)).dtype.name
      'int32'
    """
    over = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=over)

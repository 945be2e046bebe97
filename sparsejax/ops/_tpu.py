"""What the kernels for TPU share: products as the matrix unit takes them."""

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

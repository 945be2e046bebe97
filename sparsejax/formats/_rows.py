"""Writing into each row by position."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def put_in_rows(slots: jax.Array, values: ArrayLike, width: int) -> jax.Array:
    """Zeros, but for values at some slots of each row.

    Args:
      slots: int32 `[..., num]`, without repetition; from `width` on they are dropped.
      values: one, or `[num]`, the same in all rows.
      width: of a row.

    Returns:
      `[..., width]`, of the dtype of `values`.

    Example:
      >>> print(put_in_rows(jnp.array([[2, 0], [1, 3]]), jnp.array([5, 7]), 3))
      [[7 0 5]
       [0 5 0]]
    """
    values = jnp.asarray(values)

    def of_row(slots):
        return jnp.zeros(width, values.dtype).at[slots].set(values, mode="drop")

    # mapped, not flat: of that a mesh of explicit axes knows how it is cut
    for _ in range(slots.ndim - 1):
        of_row = jax.vmap(of_row)
    return of_row(slots)

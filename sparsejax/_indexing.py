"""Reading and writing by position, in each row or each sequence.

Every room may import this module; it imports none of them.
"""

from collections.abc import Callable

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


def map_rows(
    fn: Callable[..., jax.Array], rows: jax.Array, *others: jax.Array
) -> jax.Array:
    """`jax.vmap(fn)(rows, *others)`, of a function that indexes.

    A mesh of explicit axes knows how what is mapped is cut, as long as all of it is cut
    alike: here as `rows`. On a GPU it is one gather or scatter, as unmapped.

    Args:
      fn: of a row, and of what belongs to it.
      rows: `[num, ...]`.
      others: likewise.

    Example:
      >>> rows, at = jnp.array([[1, 2], [3, 4]]), jnp.array([1, 0])
      >>> map_rows(lambda row, at: row[at], rows, at)
      Array([2, 3], dtype=int32)
    """
    like = jax.typeof(rows).sharding

    def cut(x):
        own = jax.typeof(x).sharding
        if own.spec[0] == like.spec[0]:
            return x
        mesh = own.mesh if like.mesh.empty else like.mesh
        spec = jax.sharding.PartitionSpec(like.spec[0], *own.spec[1:])
        return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, spec))

    return jax.vmap(fn)(rows, *map(cut, others))

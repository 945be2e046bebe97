"""Writing what belongs to the next token into an array with a slot for each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from sparsejax._indexing import map_rows


def change_slots(
    array: Shaped[Array, "batch slots ..."],
    at: Int[Array, " batch"],
    change: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Changes one slot of each sequence.

    On a GPU one sequence takes one program, in place where `array` is donated or the
    carry of a loop; a scatter would check the slot in another.

    Args:
      array: a cache.
      at: the slot of each sequence; where it lies behind the last, nothing changes.
      change: from what the slots hold, `[batch, 1, ...]`, to what they shall.

    Example:
      >>> change_slots(jnp.zeros((1, 3)), jnp.array([1]), lambda old: old + 5)
      Array([[0., 5., 0.]], dtype=float32)
    """
    if len(at) == 1:
        old = jax.lax.dynamic_slice_in_dim(array, at[0], 1, axis=1)
        new = change(old).astype(array.dtype)
        new = jnp.where(at[0] < array.shape[1], new, old)
        return jax.lax.dynamic_update_slice_in_dim(array, new, at[0], axis=1)
    old = map_rows(lambda row, at: row.at[at].get(mode="clip"), array, at)
    new = change(old[:, None])[:, 0].astype(array.dtype)

    def put(row, at, new):
        return row.at[at].set(new, mode="drop")

    return map_rows(put, array, at, new)

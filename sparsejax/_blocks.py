"""Arrays cut into blocks: for masks of weights and for the formats of kernels alike.

Every room may import this module; it imports none of them.
"""

from typing import Any

import jax
import jax.numpy as jnp


def reduce_blocks(reduce: Any, x: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """Reduces each block of an array to one entry.

    Args:
      reduce: such as `jnp.sum`; called with the cut array and `axis=`.
      x: any array.
      counts: the number of blocks along each axis, which it must divide.

    Returns:
      An array of shape `counts`.

    Example:
      >>> reduce_blocks(jnp.sum, jnp.arange(8).reshape(2, 4), (1, 2))
      Array([[10, 18]], dtype=int32)
    """
    inner: list[int] = []
    for axis, (size, count) in enumerate(zip(x.shape, counts, strict=True)):
        if size == count:
            continue
        # one axis at a time: explicit meshes refuse to split several at once
        at = axis + len(inner)
        lead, rest = x.shape[:at], x.shape[at + 1 :]
        x = x.reshape(*lead, count, size // count, *rest)
        inner.append(at + 1)
    return reduce(x, axis=tuple(inner))


def kept_blocks(mask: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """Which blocks of an elementwise mask are kept: those that hold a True.

    Args:
      mask: bool, True = kept.
      counts: the number of blocks along each axis, which it must divide.

    Returns:
      A bool array of shape `counts`.

    Example:
      >>> print(kept_blocks(jnp.eye(4, dtype=bool), (2, 2)))
      [[ True False]
       [False  True]]
    """
    return reduce_blocks(jnp.any, mask, counts)

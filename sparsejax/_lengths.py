"""How many tokens of each sequence count, where a batch has some of unlike lengths.

Every room may import this module; it imports none of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Int


def of_sequences(
    name: str, numbers: ArrayLike, batch: int, least: int, most: int
) -> Int[Array, " batch"]:
    """Gives one integer for each sequence, of one for all or one for each.

    Args:
      name: of the argument, for messages.
      numbers: integers, scalar or `[batch]`.
      batch: how many sequences there are.
      least: the lowest that a number may be.
      most: the highest. Traced numbers are taken as they are, and so are those that
        lie on other hosts.

    Returns:
      int32 `[batch]`.

    Raises:
      ValueError: if they are not integers, do not fit the batch, or a known one is out
        of its range.

    Example:
      >>> of_sequences("lengths", 3, 2, 1, 8)
      Array([3, 3], dtype=int32)
    """
    # before they become an array: that is traced in a trace
    is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(numbers))
    array = jnp.asarray(numbers)
    fits = array.shape in ((), (batch,))
    if not fits or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"`{name}` must be one integer, or one for each of {batch} sequences; got "
            f"{jax.typeof(array)}."
        )
    if not is_traced and getattr(numbers, "is_fully_addressable", True):
        known = np.broadcast_to(np.asarray(numbers), (batch,))
        wrong = np.flatnonzero((known < least) | (known > most))
        if len(wrong):
            raise ValueError(
                f"`{name}` must be in [{least}, {most}]; got {known[wrong[0]]} for "
                f"sequence {wrong[0]}. Give how many of its tokens count, from the "
                "first on."
            )
    return jnp.broadcast_to(array.astype(jnp.int32), (batch,))

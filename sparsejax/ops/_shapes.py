"""What several operations ask of shapes."""

import jax.numpy as jnp


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to exactly the other.

    Args:
      shape: of the array.
      to: the other, which must not grow.

    Returns:
      False too where the two broadcast to a third.

    Example:
      >>> broadcasts((2, 1), (2, 3)), broadcasts((2, 3), (2, 1))
      (True, False)
    """
    try:
        return jnp.broadcast_shapes(shape, to) == tuple(to)
    except ValueError:
        return False

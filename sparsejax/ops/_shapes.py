"""What several operations ask of shapes."""

import jax
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


def zeros_beside(like: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Float32 zeros, cut as `like`, that vary over a mesh where any of the arrays does.

    What a loop begins with must be cut, and in `jax.shard_map` vary, as what it adds.

    Example:
      >>> print(zeros_beside(jnp.ones(2, jnp.bfloat16), jnp.ones((3, 3))))
      [0. 0.]
    """
    nothing = (jnp.sum(a[:0], dtype=jnp.float32) for a in arrays)  # even of NaN
    return sum(nothing, jnp.zeros_like(like, jnp.float32))

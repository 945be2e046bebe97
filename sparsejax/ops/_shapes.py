"""What several operations ask of shapes."""

import jax
import jax.numpy as jnp


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to exactly the other."""
    try:
        return jnp.broadcast_shapes(shape, to) == tuple(to)
    except ValueError:
        return False


def zeros_beside(shape: tuple[int, ...], *arrays: jax.Array) -> jax.Array:
    """Float32 zeros that vary over a mesh wherever one of some arrays does.

    In `jax.shard_map` what a loop begins with must vary as what it adds.

    Example:
      >>> print(zeros_beside((2,), jnp.ones((3, 3))))
      [0. 0.]
    """
    nothing = (jnp.sum(a[:0], dtype=jnp.float32) for a in arrays)  # even of NaN
    return sum(nothing, jnp.zeros(shape, jnp.float32))

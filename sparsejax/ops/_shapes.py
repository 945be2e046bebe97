"""What several operations ask of shapes."""

import jax.numpy as jnp


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to exactly the other."""
    try:
        return jnp.broadcast_shapes(shape, to) == tuple(to)
    except ValueError:
        return False

"""Reshaping what a mesh cuts.

Every room may import this module; it imports none of them.
"""

import math

import jax


def reshape_stepwise(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x.reshape(shape)`, merging and splitting one stretch of axes at a time.

    Meshes of explicit axes refuse to do several at once; compiled it is the same.

    Args:
      x: any array.
      shape: of the result, in words.

    Returns:
      `x`, reshaped.

    Example:
      >>> reshape_stepwise(jnp.ones((2, 8, 6)), (2, 4, 2, 3, 2)).shape
      (2, 4, 2, 3, 2)
    """
    if not x.size:
        return x.reshape(shape)  # any number of stretches would fit
    done: tuple[int, ...] = ()
    left, wanted = x.shape, shape
    while left or wanted:
        old, new = _stretch(left, wanted)
        left, wanted = left[len(old) :], wanted[len(new) :]
        if old != new:
            x = x.reshape(*done, math.prod(old), *left)
            x = x.reshape(*done, *new, *left)
        done += new
    return x


def _stretch(left, wanted) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The fewest first axes of both that hold equally much, and at least one."""
    i, j = min(1, len(left)), min(1, len(wanted))
    while (a := math.prod(left[:i])) != (b := math.prod(wanted[:j])):
        i, j = (i + 1, j) if a < b else (i, j + 1)
    return left[:i], wanted[:j]

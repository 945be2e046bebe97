"""What says that a kernel has no second derivative, where JAX would not."""

from typing import TypeVar

import jax

T = TypeVar("T")


@jax.custom_jvp
def differentiated_once(operands: T) -> T:
    """What a kernel that has a backward, or that backward, computes from.

    Args:
      operands: a tree of arrays.

    Returns:
      The same.

    Raises:
      NotImplementedError: where a derivative is taken of what comes of it.

    Example:
      >>> float(differentiated_once(jnp.float32(2.0)))
      2.0
      >>> jax.grad(differentiated_once)(2.0)
      Traceback (most recent call last):
      NotImplementedError: a kernel is differentiable once, in reverse mode; ...
    """
    return operands


@differentiated_once.defjvp
def _differentiated_twice(operands, tangents):
    del operands, tangents
    raise NotImplementedError(
        "a kernel is differentiable once, in reverse mode; a second derivative was "
        'taken. Pass implementation="reference" to the operation or layer.'
    )

"""What says that a kernel has no second derivative, where JAX would not."""

from typing import Any

import jax


def differentiated_once(operands: Any) -> Any:
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
    return _identity(operands)


@jax.custom_jvp
def _identity(operands):
    return operands


@_identity.defjvp
def _identity_jvp(operands, tangents):
    del operands, tangents
    raise NotImplementedError(
        "a kernel is differentiable once, in reverse mode; a second derivative was "
        'taken. Pass implementation="reference" to the operation or layer.'
    )

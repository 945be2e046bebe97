"""Over which axes of a mesh arrays vary, inside of `jax.shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp


def axes_of(tree: Any) -> tuple[str, ...]:
    """The axes of a mesh over which any array varies, inside of `jax.shard_map`.

    None are known there with `check_vma=False`.

    Args:
      tree: of arrays, shapes and what is neither.

    Example:
      >>> axes_of((jnp.ones(2), 1.0))
      ()
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    found = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    return tuple(sorted(set().union(*found)))


def varying(tree: Any, axes: tuple[str, ...]) -> Any:
    """The same arrays, of which each varies over these axes.

    What varies and what does not then meets in no kernel, and each result varies as all
    operands do. The gradient of what did not vary is summed over the axes.

    Args:
      tree: of arrays and Python numbers.
      axes: of a mesh.
    """

    def of_one(leaf):
        missing = set(axes) - jax.typeof(leaf).manual_axis_type.varying
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying")

    return jax.tree.map(of_one, tree) if axes else tree


def zeros_beside(like: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Float32 zeros, cut as `like`, that vary over a mesh where any of the arrays does.

    What a loop begins with must be cut, and in `jax.shard_map` vary, as what it adds.

    Example:
      >>> print(zeros_beside(jnp.ones(2, jnp.bfloat16), jnp.ones((3, 3))))
      [0. 0.]
    """
    return varying(jnp.zeros_like(like, jnp.float32), axes_of((like, arrays)))

"""From weights to the units of a pattern and back."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from sparsejax.patterns import NM, Block, Channel, Leaf, Unstructured


def pool(scores: jax.Array, leaf: Leaf) -> jax.Array:
    """The score of each unit: the float32 sum over its weights.

    Args:
      scores: float, of the leaf's shape.
      leaf: its pattern and stacked axes.

    Returns:
      Scores of `leaf.unit_shape`.
    """
    match leaf.pattern:
        case Unstructured() | NM():
            return scores
        case Block():
            tiled = scores
            for axis, (size, blocks) in enumerate(_sizes(leaf)):
                # one axis at a time: explicit meshes refuse to split several at once
                lead, rest = tiled.shape[: 2 * axis], tiled.shape[2 * axis + 1 :]
                tiled = tiled.reshape(*lead, blocks, size // max(blocks, 1), *rest)
            inner = tuple(range(1, tiled.ndim, 2))
            return jnp.sum(tiled, axis=inner, dtype=jnp.float32)
        case Channel():
            axes = [
                i for i, size in enumerate(leaf.unit_shape) if size != leaf.shape[i]
            ]
            return jnp.sum(scores, axis=axes, dtype=jnp.float32, keepdims=True)


def expand(units: jax.Array, leaf: Leaf, like: jax.Array) -> jax.Array:
    """Spreads one bool a unit over its weights: the inverse shape of `pool`.

    Args:
      units: bool, of `leaf.unit_shape`.
      leaf: its pattern and stacked axes.
      like: any array of the leaf's shape; the result is sharded as it is.

    Returns:
      A mask of the leaf's shape.
    """
    match leaf.pattern:
        case Unstructured() | NM():
            return units
        case Block():
            mask = units
            for axis, (size, blocks) in enumerate(_sizes(leaf)):
                lead, rest = mask.shape[:axis], mask.shape[axis + 1 :]
                mask = jnp.broadcast_to(
                    jnp.expand_dims(mask, axis + 1),
                    (*lead, blocks, size // max(blocks, 1), *rest),
                ).reshape(*lead, size, *rest)
            return mask
        case Channel():
            # a broadcast alone would lie whole on every device
            return units | jnp.zeros_like(like, jnp.bool_)


def kept_units(mask: jax.Array, leaf: Leaf) -> jax.Array:
    """Which units of an elementwise mask are kept: those with any True."""
    if isinstance(leaf.pattern, Unstructured | NM):
        return mask
    return pool(mask.astype(jnp.float32), leaf) > 0


def _sizes(leaf: Leaf) -> Iterator[tuple[int, int]]:
    """The weights and the blocks along each axis."""
    return zip(leaf.shape, leaf.unit_shape, strict=True)

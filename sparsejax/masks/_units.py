"""From weights to the units of a pattern and back."""

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
        case Block(shape):
            tiled, inner = _tiled(leaf, len(shape))
            return jnp.sum(scores.reshape(tiled), axis=inner, dtype=jnp.float32)
        case Channel():
            axes = [
                i for i, size in enumerate(leaf.unit_shape) if size != leaf.shape[i]
            ]
            return jnp.sum(scores, axis=axes, dtype=jnp.float32, keepdims=True)


def expand(units: jax.Array, leaf: Leaf) -> jax.Array:
    """Spreads one value a unit over its weights: the inverse shape of `pool`."""
    match leaf.pattern:
        case Unstructured() | NM():
            return units
        case Block(shape):
            tiled, inner = _tiled(leaf, len(shape))
            return jnp.broadcast_to(jnp.expand_dims(units, inner), tiled).reshape(
                leaf.shape
            )
        case Channel():
            return jnp.broadcast_to(units, leaf.shape)


def kept_units(mask: jax.Array, leaf: Leaf) -> jax.Array:
    """Which units of an elementwise mask are kept: those with any True."""
    if isinstance(leaf.pattern, Unstructured | NM):
        return mask
    return pool(mask.astype(jnp.float32), leaf) > 0


def _tiled(leaf: Leaf, tiled_axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape with each tiled axis split in (blocks, block), and the block axes."""
    split = len(leaf.shape) - tiled_axes
    shape = list(leaf.shape[:split])
    inner = []
    for size, blocks in zip(leaf.shape[split:], leaf.unit_shape[split:], strict=True):
        shape += [blocks, size // max(blocks, 1)]
        inner.append(len(shape) - 1)
    return tuple(shape), tuple(inner)

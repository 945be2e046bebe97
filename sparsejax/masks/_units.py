"""From weights to the units of a pattern and back."""

import functools

import jax
import jax.numpy as jnp

from sparsejax._blocks import kept_blocks, reduce_blocks
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
            total = functools.partial(jnp.sum, dtype=jnp.float32)
            return reduce_blocks(total, scores, leaf.unit_shape)
        case Channel():
            axes = _pooled_axes(leaf)
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
            sizes = zip(leaf.shape, leaf.unit_shape, strict=True)
            for axis, (size, blocks) in enumerate(sizes):
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
    match leaf.pattern:
        case Unstructured() | NM():
            return mask
        case Block():
            return kept_blocks(mask, leaf.unit_shape)
        case Channel():
            return jnp.any(mask, axis=_pooled_axes(leaf), keepdims=True)


def _pooled_axes(leaf: Leaf) -> tuple[int, ...]:
    """The axes along which a channel lies."""
    sizes = enumerate(zip(leaf.shape, leaf.unit_shape, strict=True))
    return tuple(i for i, (size, units) in sizes if size != units)

"""The block mask: whole blocks of an array are kept or dropped."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparsejax.masks._check import check_floating, check_scores
from sparsejax.masks._topk import topk_mask
from sparsejax.masks._units import expand, pool
from sparsejax.patterns import Block, Leaf


def block_mask(
    scores: Float[Array, "*shape"], shape: tuple[int, ...], num_kept: ArrayLike
) -> Bool[Array, "*shape"]:
    """Keeps the `num_kept` blocks of highest score.

    Args:
      scores: importance of each weight, any float dtype. The score of a block is the
        float32 sum over its weights; under jit a block with a NaN ranks lowest.
      shape: weights in a block along each of the last axes; must divide them.
      num_kept: number of blocks to keep; a traced value is allowed.

    Returns:
      An elementwise mask of `scores.shape`. Of equal blocks the one with the lower
      index in row-major order wins.

    Raises:
      ValueError: if a block does not divide its axis, `num_kept` is out of range, or a
        concrete score is NaN.
      TypeError: if the scores are not floating, or `num_kept` is no whole number.

    Example:
      >>> block_mask(jnp.array([[1.0, 1.0, 9.0, 0.0]]), (1, 2), 1)
      Array([[False, False,  True,  True]], dtype=bool)
    """
    scores = jnp.asarray(scores)
    check_floating(scores)
    check_scores(scores)
    leaf = Leaf("scores", scores.shape, Block(shape), stacked=0)
    return expand(topk_mask(pool(scores, leaf), num_kept), leaf, scores)

"""The selection and the weights of Spark attention in plain jnp: the definition.

Gradients are autodiff's; none passes through the selection.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

from sparsejax._promotion import to_rank
from sparsejax.ops.gaussian_topk import gaussian_threshold


def spark_weights(
    scores: Float[Array, "*rows 2 keys"],
    z: ArrayLike,
    where: Bool[Array, "*#rows keys"],
    *,
    scales: tuple[float, float],
    dtype: DTypeLike,
) -> Float[Array, "*rows keys"]:
    """See the public function."""
    predicted, rest = (scores[..., i, :] * scales[i] for i in range(2))
    kept = spark_kept(predicted, z, where=where)
    top = highest(predicted, where=where)
    return kept_weights(predicted, rest, kept, top).astype(dtype)


def spark_kept(
    predicted: Float[Array, "*rows keys"],
    z: ArrayLike,
    *,
    where: Bool[Array, "*#rows keys"],
) -> Bool[Array, "*rows keys"]:
    """The keys of each row above its Gaussian threshold, and always the highest.

    Args:
      predicted: scores, float32. A NaN under True leaves its row none.
      z: as in `gaussian_topk`, over the True entries; -inf keeps all of them.
      where: False entries are never read, and not kept.

    Returns:
      True where kept. No gradient.

    Raises:
      TypeError: if `predicted` is not floating.

    Example:
      >>> scores = jnp.array([0.0, 0.1, 5.0, 0.2, 9.0])
      >>> print(spark_kept(scores, 1.5, where=scores < 9))
      [False False  True False False]
    """
    predicted = jax.lax.stop_gradient(predicted)
    where = to_rank(where, predicted.ndim)
    threshold = gaussian_threshold(predicted, z, where=where)
    top = highest(predicted, where=where)
    return where & ((predicted > threshold) | (predicted == top))


def highest(
    scores: Float[Array, "*rows keys"], *, where: Bool[Array, "*#rows keys"]
) -> Float[Array, "*rows 1"]:
    """The highest score of each row under True: -inf where none is, NaN where one is.

    It has no gradient.

    Args:
      scores: any floating dtype.
      where: False entries are never read.

    Returns:
      The last axis kept as 1.

    Example:
      >>> highest(jnp.array([1.0, 3.0, 2.0]), where=jnp.array([True, False, True]))
      Array([2.], dtype=float32)
    """
    where = to_rank(where, scores.ndim)
    scores = jnp.where(where, jax.lax.stop_gradient(scores), -jnp.inf)
    # XLA's own maximum loses NaN in some programs for CPU
    nan = jnp.any(jnp.isnan(scores), axis=-1, keepdims=True)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    return jnp.where(nan, jnp.nan, top)


def kept_weights(
    predicted: Float[Array, "*rows keys"],
    rest: Float[Array, "*rows keys"],
    kept: Bool[Array, "*rows keys"],
    top: Float[Array, "*rows 1"],
) -> Float[Array, "*rows keys"]:
    """Softmax over the kept of `predicted`, times the softplus of `rest`.

    Args:
      predicted: scores, floating.
      rest: likewise.
      kept: False entries are never read, and give 0.
      top: the highest kept of each row of `predicted`: -inf where none is, which gives
        zeros; a row where it is NaN is NaN.

    Returns:
      As `predicted`.

    Example:
      >>> scores, kept = jnp.zeros(4), jnp.array([True, True, False, False])
      >>> kept_weights(scores, scores, kept, jnp.zeros(1)).round(3)
      Array([0.347, 0.347, 0.   , 0.   ], dtype=float32)
    """
    nonempty = top != -jnp.inf
    scores = jnp.where(kept, predicted, -jnp.inf)
    powers = jnp.exp(scores - jnp.where(nonempty, top, 0))
    shares = powers / jnp.where(nonempty, jnp.sum(powers, axis=-1, keepdims=True), 1)
    return shares * jax.nn.softplus(jnp.where(kept, rest, 0))

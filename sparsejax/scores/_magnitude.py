"""Magnitude: the size of a weight, or of its gradient."""

import jax
import jax.numpy as jnp

from sparsejax.typing import Params, ScoreTree


def magnitude(params: Params) -> ScoreTree:
    """Scores each weight by its absolute value.

    Given gradients instead of params it is the growth score of RigL.

    Args:
      params: floating arrays of any shape; None stays None.

    Returns:
      Absolute values, of the same shapes and dtypes. NaN stays NaN: it ranks lowest.

    Example:
      >>> magnitude({"kernel": jnp.array([-2.0, 1.0])})
      {'kernel': Array([2., 1.], dtype=float32)}

    References:
      Han et al., 2015, https://arxiv.org/abs/1506.02626, section 3.
    """
    return jax.tree.map(jnp.abs, params)

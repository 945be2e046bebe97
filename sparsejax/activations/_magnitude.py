"""Keeps the entries whose magnitude exceeds a threshold that was calibrated before."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparsejax.activations import _arguments


def magnitude_threshold(
    x: Float[Array, "*shape"], threshold: ArrayLike
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """Keeps the entries with `|x| > threshold` and zeroes the others.

    Args:
      x: any floating dtype.
      threshold: at least 0, broadcastable to `x`: a Python number, or an array with one
        a layer or channel, whose values are not checked.

    Returns:
      The values, `x` where kept and 0 elsewhere, and the mask, True = kept. The
      gradient goes to survivors only. NaN is not kept.

    Raises:
      TypeError: if `x` is not floating.
      ValueError: if `threshold` does not broadcast to the shape of `x`, or is a number
        below 0 or NaN.

    Example:
      >>> magnitude_threshold(jnp.array([0.5, -2.0, 1.0]), 1.0)[0]
      Array([ 0., -2.,  0.], dtype=float32)

    References:
      Lee et al., 2024 (CATS), https://arxiv.org/abs/2404.08763; Liu et al.,
      2024 (TEAL), https://arxiv.org/abs/2408.14690.
    """
    x = _arguments.check_floating(x)
    if isinstance(threshold, int | float | np.number) and not threshold >= 0:
        raise ValueError(f"`threshold` must be at least 0; got {threshold}.")
    threshold = jnp.asarray(threshold)
    _arguments.check_broadcasts("threshold", threshold, x)
    mask = jnp.abs(x) > threshold
    return jnp.where(mask, x, 0), mask

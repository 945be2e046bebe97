"""Gate values from scores, as the reference and the kernel of `gated_ffn` have them."""

import jax
import jax.numpy as jnp

from sparsejax._promotion import common_dtype
from sparsejax.ops._activations import Activation


def gate_values(
    scores: jax.Array, threshold: jax.Array | None, activation: Activation | None
) -> jax.Array:
    """`activation(max(scores - threshold, 0))`.

    Both steps are float32 (float64 for float64), and both results are rounded.

    Args:
      scores: floating.
      threshold: of their dtype, broadcastable to them; where it is -inf, they stay as
        they are. None for no threshold.
      activation: elementwise; None for none.

    Returns:
      As `scores`.

    Example:
      >>> print(gate_values(jnp.arange(4.0), jnp.float32(1), jnp.square))
      [0. 0. 1. 4.]
    """
    dtype = scores.dtype
    values = scores.astype(common_dtype(dtype, jnp.float32))
    if threshold is not None:
        threshold = threshold.astype(values.dtype)
        excess = jnp.maximum(values - threshold, 0.0)
        values = jnp.where(threshold == -jnp.inf, values, excess)
        values = values.astype(dtype).astype(values.dtype)
    if activation is not None:
        values = activation(values)
    return values.astype(dtype)

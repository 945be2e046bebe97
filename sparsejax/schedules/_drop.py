"""The share of kept weights that dynamic sparse training replaces."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def cosine_drop(
    drop_fraction: float, stop_step: int
) -> Callable[[ArrayLike], jax.Array]:
    """Anneals the drop fraction to 0: `drop_fraction / 2 * (1 + cos(pi t / stop))`.

    Args:
      drop_fraction: share replaced at step 0, in [0, 1].
      stop_step: the step at which it reaches 0, at least 1; 0 afterwards.

    Returns:
      A schedule from the step to a fraction.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> [round(float(cosine_drop(0.3, 100)(t)), 6) for t in (0, 25, 50, 75)]
      [0.3, 0.256066, 0.15, 0.043934]

    References:
      Evci et al., 2020, https://arxiv.org/abs/1911.11134, section 3 (2).
    """
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"`drop_fraction` must be in [0, 1]; got {drop_fraction}.")
    if stop_step < 1:
        raise ValueError(f"`stop_step` must be at least 1; got {stop_step}.")

    def schedule(step: ArrayLike) -> jax.Array:
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / stop_step, 0, 1)
        # the half-angle form: accurate in float32 near 0, and exactly 0 at the end
        return drop_fraction * jnp.sin(jnp.pi / 2 * (1 - progress)) ** 2

    return schedule

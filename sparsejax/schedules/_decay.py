"""The factor of pruned weights: 1 leaves them whole, 0 prunes them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def linear_decay(
    rate: float, *, begin: int = 0, hard_after: int | None = None
) -> Callable[[ArrayLike], jax.Array]:
    """`max(0, 1 - rate * (step - begin))`; 1 before `begin`.

    Args:
      rate: fall per optimizer step, positive.
      begin: steps of dense training before.
      hard_after: exactly 0 from this step on; None for never.

    Returns:
      A schedule from the step to a factor in [0, 1].

    Raises:
      ValueError: unless `rate` is positive.

    Example:
      >>> [float(linear_decay(8e-4)(t)) for t in (0, 625, 1250)]
      [1.0, 0.5, 0.0]

    References:
      Bambhaniya et al., 2024, https://arxiv.org/abs/2402.04744, MdGf-Linear.
    """
    _check_rate(rate)
    return _phased(lambda u: jnp.maximum(0, 1 - rate * u), begin, hard_after)


def exponential_decay(
    rate: float, *, begin: int = 0, hard_after: int | None = None
) -> Callable[[ArrayLike], jax.Array]:
    """`exp(-rate * (step - begin))`; 1 before `begin`.

    It never reaches 0 by itself: without `hard_after` the pruned model differs from
    the trained one. `rate = 4.6 / (0.6 * total_steps)` reaches 1 % at 60 % of the run.

    Args:
      rate: decay per optimizer step, positive.
      begin: steps of dense training before.
      hard_after: exactly 0 from this step on; None for never.

    Returns:
      A schedule from the step to a factor in [0, 1].

    Raises:
      ValueError: unless `rate` is positive.

    Example:
      >>> round(float(exponential_decay(1e-4)(6931.47)), 4)
      0.5

    References:
      Bambhaniya et al., 2024, https://arxiv.org/abs/2402.04744, MdGf-Exponential.
    """
    _check_rate(rate)
    return _phased(lambda u: jnp.exp(-rate * u), begin, hard_after)


def _phased(factor, begin: int, hard_after: int | None):
    def schedule(step: ArrayLike) -> jax.Array:
        elapsed = jnp.maximum(0, jnp.asarray(step, jnp.float32) - begin)
        value = factor(elapsed)
        if hard_after is not None:
            value = jnp.where(jnp.asarray(step) >= hard_after, 0, value)
        return value

    return schedule


def _check_rate(rate: float) -> None:
    if not rate > 0:
        raise ValueError(f"`rate` must be positive; got {rate}.")

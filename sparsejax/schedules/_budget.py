"""How far AdamS can move a weight."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def decay_budget(
    learning_rate: float | Callable,
    total_steps: int,
    alpha_schedule: Callable | None = None,
) -> float:
    """How far the pull of `sj.adams` moves a losing weight in a run, at least.

    The sum of `learning_rate * alpha`. It must exceed the losing weights, of which 2:4
    has half of all: compare it with their quantiles before the run, as what has not
    come to zero is cut off by the hard prune. A longer run or a higher rate raises it,
    a stronger pull does not; that must be well above the gradients for this to hold.

    Args:
      learning_rate: a number or an optax schedule, as `sj.adams` takes it.
      total_steps: length of the run, updates.
      alpha_schedule: step -> alpha; None for `step / total_steps`.

    Returns:
      Units of the weights.

    Raises:
      ValueError: if `total_steps` is below 1.

    Example:
      >>> round(decay_budget(2e-5, 7500), 4)
      0.075

    References:
      Huang et al., 2025 (CAST), https://arxiv.org/abs/2509.25996; the sum is not in it.
    """
    if total_steps < 1:
        raise ValueError(f"`total_steps` must be at least 1; got {total_steps}.")

    def reach(step):
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        alpha = alpha_schedule(step) if alpha_schedule else step / total_steps
        return jnp.asarray(rate * jnp.clip(alpha, 0, 1), jnp.float32)

    each = np.asarray(jax.vmap(reach)(jnp.arange(total_steps)))
    return float(each.sum(dtype=np.float64))

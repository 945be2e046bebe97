"""Ways to train N:M from the first step: their programs, grids and training FLOPs.

Those of the paper on progressive gradient flow and of SR-STE, which it compares with.
Every way has six settings to be tuned over, around the rate of 8e-4, which was near the
best of most ways in a trial on both tasks. SR-STE's own decay of 2e-4 drowns under
Adam, where a stronger one does not: so there are both. The gradients of mask decay and
structure decay are masked, as the paper words it; straight-through ones, as the
released code has them, were worse in `progressive_gradient_flow`, all and everywhere.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from benchmarks.parts import lm_methods
from benchmarks.parts.lm_tuning import grid
from sparsejax import metrics

SR_STE, TUNED_DECAY = "SR-STE 2e-4", "SR-STE, tuned decay"
RIVALS = (SR_STE, TUNED_DECAY)

RATES = (2e-4, 3.2e-4, 5e-4, 8e-4, 1.3e-3, 2e-3)
FEW_RATES = (4e-4, 8e-4, 1.6e-3)
DENSE_GRID = grid(lr=RATES)

Density = Callable[[sj.NM, Mapping[str, float], int], float]


class Way(NamedTuple):
    """One of them."""

    make: Callable  # (losses, plan, *, rule) -> Method
    grid: Sequence[Mapping[str, float]]
    density: Density  # (pattern, setting, steps) -> of the forward, mean over a run
    cost: metrics.Cost = metrics.sparse_cost  # of a step, linear in the density


def at_target(pattern: sj.NM, setting: Mapping[str, float], num_steps: int) -> float:
    del setting, num_steps
    return pattern.n / pattern.m


def decaying(
    pattern: sj.NM, setting: Mapping[str, float], num_steps: int, *, exponential: bool
) -> float:
    """Dense until the factor is exactly 0."""
    share = jnp.arange(num_steps) / num_steps
    factor = lm_methods.mask_factor(share, setting["ramp"], exponential=exponential)
    return float(jnp.where(factor > 0, 1, pattern.n / pattern.m).mean())


def framed(
    pattern: sj.NM, setting: Mapping[str, float], num_steps: int, *, frames: Callable
) -> float:
    densities = np.array([frame.n / frame.m for frame in frames(pattern)])
    starts = lm_methods.frame_starts(len(densities), num_steps, setting["ramp"])
    frame = np.searchsorted(np.asarray(starts), np.arange(num_steps), "right") - 1
    return float(densities[frame].mean())


def _mask_decay(exponential: bool) -> Way:
    option = {"exponential": exponential}
    return Way(
        functools.partial(lm_methods.mask_decay, **option),
        grid(ramp=(0.3, 0.6), lr=FEW_RATES),
        functools.partial(decaying, **option),
    )


def _structure_decay(frames: Callable[[sj.NM], Sequence[sj.NM]]) -> Way:
    return Way(
        functools.partial(lm_methods.structure_decay, frames=frames),
        grid(ramp=(0.4, 0.8), lr=FEW_RATES),
        functools.partial(framed, frames=frames),
    )


def _sr_ste(**values: Sequence[float]) -> Way:
    cost = metrics.dense_gradient_cost
    return Way(lm_methods.sr_ste, grid(**values), at_target, cost)


WAYS: dict[str, Way] = {
    SR_STE: _sr_ste(pull=(2e-4,), lr=RATES),
    TUNED_DECAY: _sr_ste(pull=(2e-3, 2e-2), lr=FEW_RATES),
    "mask decay, linear": _mask_decay(exponential=False),
    "mask decay, exponential": _mask_decay(exponential=True),
    "structure decay, stepwise": _structure_decay(sj.patterns.stepwise_frames),
    "structure decay, geometric": _structure_decay(sj.patterns.geometric_frames),
}
PROGRESSIVE = tuple(name for name in WAYS if name not in RIVALS)


def flops_to_dense(
    specs: Sequence[metrics.LayerSpec],
    name: str,
    pattern: sj.NM,
    setting: Mapping[str, float],
    num_steps: int,
) -> float:
    """The training FLOPs of a run over those of a dense one of as many steps.

    Args:
      specs: the products of the model; those named `ffn` are sparse.
      name: of the way.
      pattern: of the FFN kernels.
      setting: of the run.
      num_steps: of the run.
    """
    way = WAYS[name]
    density = way.density(pattern, setting, num_steps)
    densities = [density if "ffn" in spec.name else 1.0 for spec in specs]
    sparse = metrics.training_flops(specs, densities, cost=way.cost)
    return sparse / metrics.training_flops(specs)


def equal_steps(
    specs: Sequence[metrics.LayerSpec],
    name: str,
    pattern: sj.NM,
    setting: Mapping[str, float],
    *,
    steps: int,
    multiple: int,
) -> int:
    """As many steps as take no more FLOPs than so many of SR-STE; a whole multiple."""
    of_way, of_rival = (
        flops_to_dense(specs, way, pattern, setting, steps) for way in (name, SR_STE)
    )
    return max(int(steps * of_rival / of_way / multiple), 1) * multiple

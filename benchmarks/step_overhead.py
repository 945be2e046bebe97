"""What does a method add to a step of its optimizer, in time and in state?

One jitted `update` and `apply_updates` with donated params and state, on random params
and gradients, against plain `optax.adamw`. `refresh` rows are the step that recomputes
the masks; AdamS is the mean over its whole period, refresh included.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsejax as sj
from benchmarks import common
from sparsejax.transforms import SparseState

KEY = jax.random.key(0)
PERIOD = 10  # steps between refreshes; the timed steps between lie inside one period


@dataclasses.dataclass(frozen=True)
class Case:
    """One method around AdamW."""

    method: str
    make: Callable[[bool], optax.GradientTransformation]
    every_step: bool = False  # refreshes on each step: no step is without


def _inner() -> optax.GradientTransformation:
    return optax.adamw(1e-4)


CASES = [
    Case(
        "static_sparse",
        lambda p: sj.static_sparse(_inner(), 0.9, key=KEY, pack_masks=p),
    ),
    Case(
        "magnitude_prune",
        lambda p: sj.magnitude_prune(_inner(), 0.9, update_every=PERIOD, pack_masks=p),
    ),
    Case(
        "sparse_evolution",
        lambda p: sj.sparse_evolution(
            _inner(), 0.9, update_every=PERIOD, stop_step=10**6, key=KEY, pack_masks=p
        ),
    ),
    Case(
        "rigl",
        lambda p: sj.rigl(
            _inner(), 0.9, update_every=PERIOD, stop_step=10**6, key=KEY, pack_masks=p
        ),
    ),
    Case(
        "sr_ste 2:4",
        lambda p: sj.sr_ste(_inner(), pattern=sj.NM(2, 4), pack_masks=p),
        every_step=True,
    ),
    Case(
        "adams 2:4",
        lambda p: sj.adams(
            1e-4, 10**6, 1e-3, pattern=sj.NM(2, 4), mask_period=PERIOD, pack_masks=p
        ),
    ),
]


def make_params(leaves: int, width: int) -> dict:
    """Random float32 matrices."""

    @jax.jit
    def make():
        keys = jax.random.split(jax.random.key(1), leaves)
        return {
            f"layer{i}": {"kernel": jax.random.normal(key, (width, width))}
            for i, key in enumerate(keys)
        }

    return make()


def time_steps(
    tx: optax.GradientTransformation, leaves: int, width: int, periods: int
) -> tuple[np.ndarray, int]:
    """Times every step of several periods, each awaited; and the bytes of the state.

    Returns:
      ms `[periods, PERIOD]`, whose first column holds the refreshes, and the bytes of
      the masks in the state.
    """
    params, grads = make_params(leaves, width), make_params(leaves, width)
    state = jax.jit(tx.init)(params)
    ours = lambda node: isinstance(node, SparseState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=ours) if ours(node)]
    sizes = jax.tree.leaves([node.masks for node in found])
    mask_bytes = sum(leaf.nbytes for leaf in sizes)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    for _ in range(PERIOD):  # warm-up: one period
        params, state = step(params, state, grads)
    jax.block_until_ready(params)
    times = []
    for _ in range(periods * PERIOD):
        begin = time.perf_counter()
        params, state = step(params, state, grads)
        jax.block_until_ready((params, state))
        times.append((time.perf_counter() - begin) * 1e3)
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    assert finite, "the step made non-finite params"
    return np.reshape(times, (periods, PERIOD)), mask_bytes


def run(leaves: int, width: int, periods: int) -> list[dict]:
    """All methods, packed and not, beside the plain optimizer."""
    weights = leaves * width * width
    plain, _ = time_steps(_inner(), leaves, width, periods)
    base_ms = float(np.median(plain[:, 1:]))
    rows = [
        {
            "method": "optax.adamw",
            "packed": None,
            "weights": weights,
            "step_ms": base_ms,
            "step_iqr_ms": float(np.subtract(*np.percentile(plain, [75, 25]))),
            "times_adamw": 1.0,
        }
    ]
    for case in CASES:
        for packed in (False, True):
            ms, mask_bytes = time_steps(case.make(packed), leaves, width, periods)
            between = ms if case.every_step else ms[:, 1:]
            step_ms, period_ms = (
                float(np.median(between)),
                float(np.median(ms, 0).mean()),
            )
            rows.append(
                {
                    "method": case.method,
                    "packed": packed,
                    "weights": weights,
                    "step_ms": step_ms,
                    "step_iqr_ms": float(
                        np.subtract(*np.percentile(between, [75, 25]))
                    ),
                    "times_adamw": step_ms / base_ms,
                    "refresh_ms": float(np.median(ms[:, 0])),
                    "period_mean_times_adamw": period_ms / base_ms,
                    "mask_bits_per_weight": 8 * mask_bytes / weights,
                }
            )
    return rows


def main() -> None:
    """Runs one size: what fits the device."""
    args = common.parse_args(__doc__)
    if args.quick:
        leaves, width = 2, 64
    elif jax.default_backend() == "gpu":
        leaves, width = 8, 8192  # 537M weights
    else:
        leaves, width = 8, 1024  # 8.4M weights
    rows = run(leaves, width, periods=args.repeats // 3 or 1)
    common.print_table(rows)
    common.write_json(
        args.json, common.environment(period=PERIOD, inner="optax.adamw(1e-4)"), rows
    )


if __name__ == "__main__":
    main()

"""What does a method add to a step of its optimizer, in time and in state?

One jitted `update` and `apply_updates` with donated params and state, on random params
and gradients, against plain `optax.adamw`, period by period in turn. `step` is one
between refreshes of the masks, `refresh` one that chooses them anew, and the mean over
a period holds both.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator

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


class Run:
    """A training run of an optimizer on random gradients, one step at a time."""

    def __init__(self, tx: optax.GradientTransformation, leaves: int, width: int):
        self.grads = make_params(leaves, width)
        params = make_params(leaves, width)
        state = jax.jit(tx.init)(params)
        ours = lambda node: isinstance(node, SparseState)  # noqa: E731
        found = [node for node in jax.tree.leaves(state, is_leaf=ours) if ours(node)]
        sizes = jax.tree.leaves([node.masks for node in found])
        self.mask_bytes = sum(leaf.nbytes for leaf in sizes)

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.step = jitted.lower(params, state, self.grads).compile()
        self.now = params, state

    def period_ms(self) -> list[float]:
        """The times of the steps of one period, each awaited; a refresh is first."""
        times = []
        for _ in range(PERIOD):
            begin = time.perf_counter()
            self.now = self.step(*self.now, self.grads)
            jax.block_until_ready(self.now)
            times.append((time.perf_counter() - begin) * 1e3)
        return times

    def check(self) -> None:
        """No step may have made the params infinite."""
        finite = all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(self.now[0]))
        assert finite, "a step made non-finite params"


def run(leaves: int, width: int, periods: int) -> Iterator[dict]:
    """All methods, packed and not, each in turn with the plain optimizer.

    They take periods by turns, so that a busy or a hot machine slows both alike.
    """
    weights, plain = leaves * width * width, Run(_inner(), leaves, width)
    for case in CASES:
        for packed in (False, True):
            pair = plain, Run(case.make(packed), leaves, width)
            for one in pair:
                one.period_ms()  # warms up
            ms = np.array([[r.period_ms() for r in pair] for _ in range(periods)])
            for one in pair:
                one.check()
            adamw_ms, method_ms = ms[:, 0], ms[:, 1]
            between = method_ms if case.every_step else method_ms[:, 1:]
            base_ms, step_ms = float(np.median(adamw_ms)), float(np.median(between))
            yield {
                "method": case.method,
                "packed": packed,
                "weights": weights,
                "adamw_ms": base_ms,
                "adamw_iqr_ms": _iqr(adamw_ms),
                "step_ms": step_ms,
                "step_iqr_ms": _iqr(between),
                "times_adamw": step_ms / base_ms,
                "refresh_ms": float(np.median(method_ms[:, 0])),
                "period_mean_times_adamw": float(np.median(method_ms, 0).mean())
                / base_ms,
                "mask_bits_per_weight": 8 * pair[1].mask_bytes / weights,
            }


def _iqr(values: np.ndarray) -> float:
    return float(np.subtract(*np.percentile(values, [75, 25])))


def main() -> None:
    """Runs one size: what fits the device."""
    args = common.parse_args(__doc__, repeats=15)
    if args.quick:
        leaves, width = 2, 64
    elif jax.default_backend() == "gpu":
        leaves, width = 8, 8192  # 537M weights
    else:
        leaves, width = 8, 1024  # 8.4M weights
    env = common.environment(period=PERIOD, inner="optax.adamw(1e-4)")
    common.report(args.json, env, run(leaves, width, periods=args.repeats))


if __name__ == "__main__":
    main()

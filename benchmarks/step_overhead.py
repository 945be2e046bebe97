"""What does a method add to a step of its optimizer, in time and in state?

One jitted `update` and `apply_updates` with donated params and state, on random params
and gradients, against plain `optax.adamw`, period by period in turn. `refresh` is a
step that chooses the masks anew; `step` is one of those between, which are taken in a
row and awaited together, as a training loop takes them; the mean over a period holds
both.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsejax as sj
from benchmarks.parts import common, timing
from sparsejax.transforms import SparseState

KEY = jax.random.key(0)
PERIOD = 10  # steps between refreshes


@dataclasses.dataclass(frozen=True)
class Case:
    """One method around AdamW."""

    method: str
    make: Callable[[bool], optax.GradientTransformation]


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


class Programs:
    """What a run of an optimizer needs, compiled from shapes alone."""

    def __init__(self, tx: optax.GradientTransformation, leaves: int, width: int):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.make_params = functools.partial(make_params, leaves, width)
        params = jax.eval_shape(self.make_params)
        state = jax.eval_shape(tx.init, params)
        self.init = timing.compile_alone(jax.jit(tx.init).lower(params))
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.step = timing.compile_alone(jitted.lower(params, state, params))


class Run:
    """A training run of an optimizer on random gradients, one step at a time."""

    def __init__(self, programs: Programs):
        self.step, self.grads = programs.step, programs.make_params()
        params = programs.make_params()
        state = programs.init(params)
        ours = lambda node: isinstance(node, SparseState)  # noqa: E731
        found = [node for node in jax.tree.leaves(state, is_leaf=ours) if ours(node)]
        sizes = jax.tree.leaves([node.masks for node in found])
        self.mask_bytes = sum(leaf.nbytes for leaf in sizes)
        self.now = params, state

    def period_ms(self) -> tuple[float, float]:
        """The times of a period's first step, the refresh, and of one after it."""
        return self._steps_ms(1), self._steps_ms(PERIOD - 1) / (PERIOD - 1)

    def _steps_ms(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            self.now = self.step(*self.now, self.grads)
        jax.block_until_ready(self.now)
        return (time.perf_counter() - begin) * 1e3

    def check(self) -> None:
        """No step may have made the params infinite."""
        finite = all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(self.now[0]))
        assert finite, "a step made non-finite params"


def run(leaves: int, width: int, periods: int) -> Iterator[dict]:
    """All methods, packed and not, each in turn with the plain optimizer.

    They take periods by turns, so that a busy or a hot machine slows both alike.
    """
    methods = {
        (case.method, packed): case.make(packed)
        for case in CASES
        for packed in (False, True)
    }
    make = functools.partial(Programs, leaves=leaves, width=width)
    plain, *compiled = timing.side_by_side(make, (_inner(), *methods.values()))
    weights, plain = leaves * width * width, Run(plain)
    for (method, packed), programs in zip(methods, compiled, strict=True):
        pair = plain, Run(programs)
        for one in pair:
            one.period_ms()  # warms up
        ms = np.array([[r.period_ms() for r in pair] for _ in range(periods)])
        for one in pair:
            one.check()
        adamw, (refresh, between) = ms[:, 0, 1], ms[:, 1].T
        period = (refresh + (PERIOD - 1) * between) / PERIOD
        base_ms, step_ms = float(np.median(adamw)), float(np.median(between))
        yield {
            "method": method,
            "packed": packed,
            "weights": weights,
            "adamw_ms": base_ms,
            "adamw_iqr_ms": _iqr(adamw),
            "step_ms": step_ms,
            "step_iqr_ms": _iqr(between),
            "times_adamw": step_ms / base_ms,
            "refresh_ms": float(np.median(refresh)),
            "period_mean_times_adamw": float(np.median(period)) / base_ms,
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

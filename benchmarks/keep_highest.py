"""Is finding the highest entries of short rows faster by the kernel than by a sort?

Rows are scores of blocks: a row for each head and each block of queries. The rivals are
the reference, `jax.lax.top_k` and what follows from its last value, and `jax.lax.top_k`
alone, which gives indices in falling order. Many ties are a second case: the kernel
takes as long for them. Several inputs make one program, so that what Python takes for a
call does not count.

Then the whole way from scores to a mask: with its lists by row alone, which is what a
forward reads and so all that is compiled for one, and by column too, for a backward.
Each is built in a loop.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import chex
import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks.parts import common, kernel_times, timing
from sparsejax import ops

TOGETHER = 8  # inputs of a program
MASKS = 31  # built after the first, in a program
BLOCK = (128, 128)


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows, the entries of each, and how many are kept."""

    rows: int
    columns: int
    num_kept: int
    ties: bool = False


CASES = [
    Case(8192, 256, 13),
    Case(8192, 256, 13, ties=True),
    Case(8192, 256, 128),
    Case(4096, 128, 13),
    Case(65536, 256, 13),
]
QUICK = [Case(64, 32, 4)]
MASK, QUICK_MASK = Case(16 * 256, 256, 25), Case(64, 32, 4)  # 16 heads, 32768 tokens


def run(case: Case, repeats: int) -> dict:
    """One row of the table."""
    x = jax.random.normal(jax.random.key(0), (TOGETHER, case.rows, case.columns))
    x = list(jnp.round(x) if case.ties else x)
    keep = functools.partial(ops.keep_highest, num_kept=case.num_kept)
    kernel = common.KERNELS.get(jax.default_backend())
    implementation = kernel if kernel == "mosaic_gpu" else None
    fns = {
        "fast": functools.partial(keep, implementation=implementation),
        "reference": functools.partial(keep, implementation="reference"),
        "top_k": lambda x: jax.lax.top_k(x, case.num_kept),
    }
    fns = {name: timing.for_each(fn) for name, fn in fns.items()}
    assert jnp.array_equal(fns["fast"](x)[0], fns["reference"](x)[0]), case
    calls = {name: functools.partial(fn, x) for name, fn in fns.items()}
    times = timing.time_in_turn(calls, repeats=repeats, units=TOGETHER)
    return dataclasses.asdict(case) | {
        "fast_ms": times["fast"].ms,
        "fast_iqr_ms": times["fast"].iqr_ms,
        "reference_ms": times["reference"].ms,
        "top_k_ms": times["top_k"].ms,
        "speedup": times["top_k"].ms / times["fast"].ms,
    }


def run_mask(case: Case, repeats: int) -> Iterator[dict]:
    """What a mask of square blocks takes from its scores."""
    shape = (-1, case.columns, case.columns)
    scores = jax.random.normal(jax.random.key(1), (case.rows, case.columns))
    scores = scores.reshape(shape)

    def whole(never, scores):
        scores = jnp.where(never, -scores, scores)
        kept = ops.keep_highest(scores, case.num_kept)
        return sj.BlockMask.from_blocks(kept, BLOCK, capacity=case.num_kept)

    def by_row(never, scores):
        mask = whole(never, scores)
        return mask.num, mask.indices

    builds = {"by row": by_row, "by row and column": whole}
    want = sj.BlockMask.from_scores(scores, BLOCK, case.num_kept)
    calls = {
        name: functools.partial(timing.built_in_a_loop(build, times=MASKS), scores)
        for name, build in builds.items()
    }
    chex.assert_trees_all_equal(calls["by row and column"](), want)
    chex.assert_trees_all_equal(calls["by row"](), (want.num, want.indices))
    times = timing.time_in_turn(calls, repeats=repeats, units=MASKS + 1)
    for name, time in times.items():
        if told := kernel_times.longest(calls[name], units=MASKS + 1):
            print(f"  lists {name}: {told}")
        yield dataclasses.asdict(case) | {
            "lists": name,
            "fast_ms": time.ms,
            "fast_iqr_ms": time.iqr_ms,
        }


def run_all(cases: Sequence[Case], mask: Case, repeats: int) -> Iterator[dict]:
    for case in cases:
        yield run(case, repeats)
    yield from run_mask(mask, repeats)


def main(argv: list[str] | None = None) -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, repeats=9, quick_repeats=2, argv=argv)
    cases = (QUICK, QUICK_MASK) if args.quick else (CASES, MASK)
    notes = ["speedup: over `jax.lax.top_k`, which finds no mask."]
    env = common.environment(repeats=args.repeats)
    common.report(args.json, env, run_all(*cases, args.repeats), notes)


if __name__ == "__main__":
    main()

"""Is finding the highest entries of short rows faster by the kernel than by a sort?

Rows are scores of blocks: a row for each head and each block of queries. The rivals are
the reference, `jax.lax.top_k` and what follows from its last value, and `jax.lax.top_k`
alone, which gives indices in falling order. Many ties are a second case: the kernel
takes as long for them. Several inputs make one program, so that what Python takes for a
call does not count.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks.parts import common, timing
from sparsejax import ops

TOGETHER = 8  # inputs of a program


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


def main(argv: list[str] | None = None) -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, repeats=9, quick_repeats=2, argv=argv)
    rows = (run(case, args.repeats) for case in (QUICK if args.quick else CASES))
    notes = ["speedup: over `jax.lax.top_k`, which finds no mask."]
    common.report(args.json, common.environment(repeats=args.repeats), rows, notes)


if __name__ == "__main__":
    main()

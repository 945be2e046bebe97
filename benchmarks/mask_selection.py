"""How fast are N:M and top-k masks against sorting, and against a plain copy?

The textbook forms sort: two argsorts rank the members of an N:M group, one argsort (or
`lax.top_k`) finds the k largest weights. Ours compare inside groups and bisect the bits
of the scores. Every mask is checked against the sorted one before it is timed. On a GPU
some arrays make one program, so that what Python takes for a call does not count.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks.parts import common, timing


@dataclasses.dataclass(frozen=True)
class Case:
    """One mask of a square matrix of scores."""

    size: int  # rows and columns
    pattern: str
    n: int = 0
    m: int = 0
    sparsity: float = 0.0
    ties: bool = False  # scores rounded, so that many are equal
    dtype: str = "float32"


TOGETHER = {"gpu": 4}  # arrays in a program, else 1: sorting on a CPU takes seconds
CASES = [
    *(Case(2048, f"{n}:{m}", n, m) for n, m in [(2, 4), (4, 8), (1, 16), (8, 16)]),
    *(Case(2048, f"{n}:{m}", n, m) for n, m in [(1, 32), (8, 64)]),
    Case(2048, "2:4", 2, 4, dtype="bfloat16"),
    *(Case(2048, "top-k", sparsity=s) for s in (0.0, 0.5, 0.9)),
    Case(2048, "top-k", sparsity=0.9, ties=True),
    Case(2048, "top-k", sparsity=0.9, dtype="bfloat16"),
]
QUICK = [Case(64, "2:4", 2, 4), Case(64, "top-k", sparsity=0.9, ties=True)]


def run(case: Case, repeats: int) -> dict:
    """Checks, then times one case."""
    together = TOGETHER.get(jax.default_backend(), 1)
    shape = (together, case.size, case.size)
    scores = jnp.abs(jax.random.normal(jax.random.key(0), shape))
    if case.ties:
        scores = jnp.round(8 * scores) / 8
    scores = list(scores.astype(case.dtype))
    num_kept = sj.masks.num_kept(case.sparsity, scores[0].size)

    @timing.for_each
    def copy(x):
        return jax.lax.optimization_barrier(x) + 0

    @timing.for_each
    def argsort_nm(x):
        groups = x.reshape(-1, case.m, case.size)
        ranks = jnp.argsort(jnp.argsort(-groups, axis=1, stable=True), axis=1)
        return (ranks < case.n).reshape(x.shape)

    @timing.for_each
    def argsort_topk(x):
        order = jnp.argsort(-x.reshape(-1), stable=True)
        ranks = jnp.zeros(x.size, jnp.int32).at[order].set(jnp.arange(x.size))
        return (ranks < num_kept).reshape(x.shape)

    @timing.for_each
    def argsort_only(x):  # the cheapest sort that could serve: no ranks, no mask
        return jnp.sort(x.reshape(-1))

    @timing.for_each
    def lax_topk(x):  # threshold only: cheaper than a mask with exact ties
        return jax.lax.top_k(x.reshape(-1), num_kept)[0][-1]

    if case.m:
        ours = timing.for_each(lambda x: sj.nm_mask(x, case.n, case.m))
        sorted_form, others = argsort_nm, {}
    else:
        # the count is traced: one compilation serves a whole schedule
        topk = timing.for_each(sj.topk_mask)
        count = jnp.asarray(num_kept, jnp.int32)
        ours = lambda x: topk(x, count)  # noqa: E731
        sorted_form, others = argsort_topk, {"sort": argsort_only}
        if case.sparsity > 0:
            others["lax top k"] = lax_topk
    pairs = zip(ours(scores), sorted_form(scores), strict=True)
    different = sum(int(jnp.sum(a != b)) for a, b in pairs)
    assert different == 0, f"{different} entries differ at {case}"

    fns = {"copy": copy, "ours": ours, "argsort form": sorted_form, **others}
    calls = {name: functools.partial(fn, scores) for name, fn in fns.items()}
    times = timing.time_in_turn(calls, repeats=repeats, units=together)
    ms = {f"{name.replace(' ', '_')}_ms": time.ms for name, time in times.items()}
    best_other = min(ms[f"{name.replace(' ', '_')}_ms"] for name in list(fns)[2:])
    return dataclasses.asdict(case) | {
        **ms,
        "ours_iqr_ms": times["ours"].iqr_ms,
        "times_copy": ms["ours_ms"] / ms["copy_ms"],
        "speedup_vs_argsort_form": ms["argsort_form_ms"] / ms["ours_ms"],
        "speedup_vs_best_other": best_other / ms["ours_ms"],
    }


def main() -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, repeats=9)
    rows = (run(case, args.repeats) for case in (QUICK if args.quick else CASES))
    common.report(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

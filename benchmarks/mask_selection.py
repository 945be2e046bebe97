"""How fast are N:M and top-k masks against sorting, and against a plain copy?

The textbook forms sort: two argsorts rank the members of an N:M group, one argsort (or
`lax.top_k`) finds the k largest weights. Ours compare inside groups and bisect the bits
of the scores. Every mask is checked against the sorted one before it is timed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks import common


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


CASES = [
    *(Case(2048, f"{n}:{m}", n, m) for n, m in [(2, 4), (4, 8), (1, 16), (8, 16)]),
    *(Case(2048, f"{n}:{m}", n, m) for n, m in [(1, 32), (8, 64)]),
    Case(2048, "2:4", 2, 4, dtype="bfloat16"),
    *(Case(2048, "top-k", sparsity=s) for s in (0.0, 0.5, 0.9)),
    Case(2048, "top-k", sparsity=0.9, ties=True),
    Case(2048, "top-k", sparsity=0.9, dtype="bfloat16"),
]
QUICK = [Case(64, "2:4", 2, 4), Case(64, "top-k", sparsity=0.9, ties=True)]


def one_reduction_a_pass(x: jax.Array, count: jax.Array, bits: int) -> jax.Array:
    """Another way to the top-k of positive float32: `2**bits - 1` counts in one reduce.

    Our form compares along a new axis and sums over the others; here one variadic
    reduction reads each weight once for all counts. Ties are all kept, which is fewer
    passes than the exact mask needs.
    """
    keys = jax.lax.bitcast_convert_type(x.reshape(-1), jnp.uint32)
    threshold = jnp.uint32(0)
    passes = -(-32 // bits)
    for i in range(passes):
        shift = bits * (passes - 1 - i)
        digits = range(1, min(2**bits, 2 ** (32 - shift)))
        candidates = [threshold | jnp.uint32(digit << shift) for digit in digits]
        counts = jax.lax.reduce(
            tuple((keys >= c).astype(jnp.int32) for c in candidates),
            (jnp.int32(0),) * len(candidates),
            lambda a, b: tuple(map(jnp.add, a, b)),
            (0,),
        )
        digit = sum((n >= count).astype(jnp.uint32) for n in counts)
        threshold |= digit << shift
    return (keys >= threshold).reshape(x.shape)


def run(case: Case, repeats: int) -> dict:
    """Checks, then times one case."""
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (case.size, case.size)))
    if case.ties:
        scores = jnp.round(8 * scores) / 8
    scores = scores.astype(case.dtype)
    num_kept = sj.masks.num_kept(case.sparsity, scores.size)

    @jax.jit
    def copy(x):
        return jax.lax.optimization_barrier(x) + 0

    @jax.jit
    def argsort_nm(x):
        groups = x.reshape(-1, case.m, case.size)
        ranks = jnp.argsort(jnp.argsort(-groups, axis=1, stable=True), axis=1)
        return (ranks < case.n).reshape(x.shape)

    @jax.jit
    def argsort_topk(x):
        order = jnp.argsort(-x.reshape(-1), stable=True)
        ranks = jnp.zeros(x.size, jnp.int32).at[order].set(jnp.arange(x.size))
        return (ranks < num_kept).reshape(x.shape)

    @jax.jit
    def argsort_only(x):  # the cheapest sort that could serve: no ranks, no mask
        return jnp.sort(x.reshape(-1))

    @jax.jit
    def lax_topk(x):  # threshold only: cheaper than a mask with exact ties
        return jax.lax.top_k(x.reshape(-1), num_kept)[0][-1]

    if case.m:
        ours = jax.jit(lambda x: sj.nm_mask(x, case.n, case.m))
        sorted_form, others = argsort_nm, {}
    else:
        # the count is traced: one compilation serves a whole schedule
        topk = jax.jit(sj.topk_mask)
        count = jnp.asarray(num_kept, jnp.int32)
        ours = lambda x: topk(x, count)  # noqa: E731
        sorted_form, others = argsort_topk, {"sort_ms": argsort_only}
        if case.sparsity > 0:
            others["lax_top_k_ms"] = lax_topk
        if case.dtype == "float32" and jax.default_backend() == "gpu":
            for bits in (3, 4, 5):
                fn = jax.jit(functools.partial(one_reduction_a_pass, bits=bits))
                others[f"one_reduction_{bits}_bits_ms"] = functools.partial(
                    fn, count=count
                )
    different = int(jnp.sum(ours(scores) != sorted_form(scores)))
    assert different == 0, f"{different} entries differ at {case}"

    few = max(3, repeats // 5)  # sorting is slow
    copy_ms, _ = common.time_ms(copy, scores, repeats=repeats)
    ours_ms, ours_iqr_ms = common.time_ms(ours, scores, repeats=repeats)
    sort_form_ms, _ = common.time_ms(sorted_form, scores, repeats=few)
    other_ms = {
        name: common.time_ms(fn, scores, repeats=few)[0] for name, fn in others.items()
    }
    library = [ms for name, ms in other_ms.items() if "one_reduction" not in name]
    best_other = min([sort_form_ms, *library])
    return dataclasses.asdict(case) | {
        "copy_ms": copy_ms,
        "ours_ms": ours_ms,
        "ours_iqr_ms": ours_iqr_ms,
        "argsort_form_ms": sort_form_ms,
        **other_ms,
        "times_copy": ours_ms / copy_ms,
        "speedup_vs_argsort_form": sort_form_ms / ours_ms,
        "speedup_vs_best_other": best_other / ours_ms,
    }


def main() -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__)
    rows = [run(case, args.repeats) for case in (QUICK if args.quick else CASES)]
    common.print_table(rows)
    common.write_json(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

"""At which density is a block-sparse product faster than the dense one?

y = x W, dx = dy W^T and dW = x^T dy with random blocks of W kept, each against the same
product with all of W, by XLA or by PyTorch where torch is there, whichever is faster;
and y against PyTorch's BSR product. TFLOP/s count kept blocks only. `dw` is as large as
W, with zeros; `dw compact` has the kept blocks alone. Some products of different inputs
make one program, so that what Python takes for a call does not count. Of a few rows:
`block_stream`.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator

# torch needs room on the same device
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from benchmarks.parts import common, timing

TOGETHER = 4  # products in a program


@dataclasses.dataclass(frozen=True)
class Shape:
    """One product; masks of one shape share what is compiled."""

    rows: int
    d_in: int
    d_out: int
    block: int
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Case:
    """One mask: random blocks, or one row and one column whole and random others."""

    density: float
    skewed: bool = False


SQUARE = Shape(8192, 8192, 8192, 128)
CASES = [
    (SQUARE, [Case(d) for d in (1, 0.8, 0.5, 0.25, 0.1, 0.05)] + [Case(0.1, True)]),
    (dataclasses.replace(SQUARE, block=64), [Case(d) for d in (0.5, 0.25, 0.1)]),
    (Shape(8192, 2048, 8192, 128), [Case(d) for d in (0.5, 0.25, 0.1)]),
    (Shape(8192, 8192, 2048, 128), [Case(d) for d in (0.5, 0.25, 0.1)]),
]
QUICK_CASES = [
    (Shape(64, 256, 384, 64, "float32"), [Case(1), Case(0.5), Case(0.5, True)])
]


def make_mask(shape: Shape, case: Case, seed: int = 0) -> sj.BlockMask:
    """Random blocks, exactly as many as the density says."""
    grid = (shape.d_in // shape.block, shape.d_out // shape.block)
    kept = np.zeros(grid, bool)
    if case.skewed:
        kept[grid[0] // 3, :] = kept[:, grid[1] // 3] = True
    missing = max(0, round(case.density * kept.size) - int(kept.sum()))
    free = np.flatnonzero(~kept)
    rng = np.random.default_rng(seed)
    kept.reshape(-1)[rng.choice(free, missing, replace=False)] = True
    return sj.BlockMask.from_blocks(jnp.asarray(kept), (shape.block, shape.block))


def normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


COMPACT = "dw compact"  # of kept blocks alone, whose number is a shape: compiled anew


def products(implementation: str | None) -> dict[str, Callable]:
    """y, dx, dw, compact dw of `(pairs of x and dy, w or values, mask)`, lists."""
    call = functools.partial(sj.ops.block_matmul, implementation=implementation)

    def dx(x, dy, w, mask):
        return jax.vjp(lambda x: call(x, w, mask), x)[1](dy)[0]

    def dw(x, dy, w, mask):
        return jax.vjp(lambda w: call(x, w, mask), w)[1](dy)[0]

    def dw_compact(x, dy, values, mask):
        of_values = lambda values: call(x, sj.BlockSparse(values, mask))  # noqa: E731
        return jax.vjp(of_values, values)[1](dy)[0]

    y = lambda x, dy, w, mask: call(x, w, mask)  # noqa: E731
    found = {"y": y, "dx": dx, "dw": dw, COMPACT: dw_compact}
    return {name: timing.for_each(fn) for name, fn in found.items()}


DENSE = {
    "y": lambda x, dy, w: x @ w,
    "dx": lambda x, dy, w: dy @ w.T,
    "dw": lambda x, dy, w: x.T @ dy,
}


def dense_products() -> dict[str, Callable]:
    """The same by XLA, with all of w.

    Results are asked for in the dtype of the operands: a float32 result that is then
    rounded keeps XLA from the fastest products.
    """
    return {
        name: timing.for_each(lambda x, dy, w, mask, fn=fn: fn(x, dy, w))
        for name, fn in DENSE.items()
    }


def torch_products(
    pairs: list[tuple[jax.Array, jax.Array]], w: jax.Array, mask: sj.BlockMask
) -> dict[str, Callable]:
    """The dense products by torch, and y^T = W^T x^T ("bsr") with W^T in its format.

    Each is checked first. None without torch and its GPU.
    """
    if jax.default_backend() != "gpu":
        return {}
    try:
        import torch
    except ImportError:
        return {}

    own = torch.from_dlpack
    kept = jnp.where(mask.to_dense(), w, 0)
    sparse = own(kept).T.contiguous().to_sparse_bsr(mask.block_shape[::-1])
    weight, operands = own(w), [(own(x), own(dy)) for x, dy in pairs]
    calls = {name: functools.partial(fn, w=weight) for name, fn in DENSE.items()}
    calls["bsr"] = lambda x, dy: (sparse @ x.T).T
    (x, dy), *_ = pairs
    wanted = {name: fn(x, dy, w) for name, fn in DENSE.items()} | {"bsr": x @ kept}
    for name, fn in calls.items():
        got = jnp.from_dlpack(fn(*operands[0]).contiguous())
        error = common.relative_error(got, wanted[name])
        assert error < 0.02, (name, error)

    def for_each(fn):
        def call():
            for x, dy in operands:
                fn(x, dy)
            torch.cuda.synchronize()

        return call

    return {name: for_each(fn) for name, fn in calls.items()}


def run_shape(shape: Shape, cases: list[Case], repeats: int) -> Iterator[dict]:
    """Checks, then times the three products under each mask; one row for each."""
    w = normal(1, (shape.d_in, shape.d_out), shape.dtype) / math.sqrt(shape.d_in)
    xs, dys = (
        [normal(seed + i, (shape.rows, d), shape.dtype) for i in range(TOGETHER)]
        for seed, d in ((10, shape.d_in), (20, shape.d_out))
    )
    ours = products(common.KERNELS.get(jax.default_backend()))
    reference, dense = products("reference"), dense_products()
    pairs = list(zip(xs, dys, strict=True))
    masks = [make_mask(shape, case) for case in cases]
    weights = [
        dict.fromkeys(ours, w) | {COMPACT: sj.BlockSparse.from_dense(w, mask).values}
        for mask in masks
    ]

    def error_of(index: int, name: str) -> float:
        given = weights[index][name], masks[index]
        got = ours[name](pairs, *given)[0]
        return common.relative_error(got, reference[name](pairs[:1], *given)[0])

    # the first case and each compact product are compiled, the other cases share that
    checks = [(i, name) for i in range(len(cases)) for name in ours]
    fresh = [(i, name) for i, name in checks if i == 0 or name == COMPACT]
    errors = {}
    for part in (fresh, [check for check in checks if check not in fresh]):
        found = timing.side_by_side(lambda check: error_of(*check), part)
        errors |= dict(zip(part, found, strict=True))
    for check, error in errors.items():
        assert error < 0.01, (shape, cases[check[0]], check[1], error)

    for index, (case, mask) in enumerate(zip(cases, masks, strict=True)):
        density = float(mask.density())
        flops = 2 * shape.rows * shape.d_in * shape.d_out * density
        fns = {
            f"{kind} {name}": functools.partial(fn, pairs, weights[index][name], mask)
            for kind, found in (("ours", ours), ("dense", dense))
            for name, fn in found.items()
        }
        by_torch = torch_products(pairs, w, mask)
        fns |= {f"torch {name}": call for name, call in by_torch.items()}
        times = timing.time_in_turn(fns, repeats=repeats, units=TOGETHER)
        for name in ours:
            time = times[f"ours {name}"]
            whole = name.removesuffix(" compact")
            dense_by = {"xla": times[f"dense {whole}"].ms}
            if by_torch:
                dense_by["torch"] = times[f"torch {whole}"].ms
            dense_ms = min(dense_by.values())
            row = dataclasses.asdict(shape) | dataclasses.asdict(case)
            row |= {
                "product": name,
                "ms": time.ms,
                "iqr_ms": time.iqr_ms,
                "tflops": flops / time.ms / 1e9,
                **{f"dense_{by}_ms": ms for by, ms in dense_by.items()},
                "dense_ms": dense_ms,
                "dense_tflops": flops / density / dense_ms / 1e9,
                "speedup": dense_ms / time.ms,
                "error": errors[index, name],
            }
            if name == "y" and by_torch:
                torch_ms = times["torch bsr"].ms
                row |= {
                    "torch_bsr_ms": torch_ms,
                    "torch_bsr_tflops": flops / torch_ms / 1e9,
                }
            yield row


def main(argv: list[str] | None = None) -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, argv=argv)
    cases = QUICK_CASES if args.quick else CASES
    rows = (row for of_shape in cases for row in run_shape(*of_shape, args.repeats))
    common.report(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

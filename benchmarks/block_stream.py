"""At which rate does a small batch read the kept blocks of a matrix?

One product after the other, as in a loop of decoding, with random blocks of each W
kept, against the same by XLA with all of W. Such a product is bound by reading W: so
the bytes of kept blocks a second are given, beside those that a copy of a large array
moves. And how long the lists of a block mask take, from one bool a block and from an
elementwise mask.
"""

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks.block_matmul import Case, Shape, make_mask, normal
from benchmarks.parts import common, kernel_times, timing

TOKENS = 4  # through all layers, in a program
STREAMED_BYTES = 200e6  # of kept blocks in distinct matrices: more than any cache holds
MASKS = 31  # built after the first, in a program

SIDE = 8192
CASES = [
    (Shape(rows, SIDE, SIDE, 128), Case(density))
    for rows, density in itertools.product((1, 8, 64), (0.5, 0.25, 0.1))
]
QUICK = [(Shape(2, 256, 256, 64, "float32"), Case(0.5))]


def run_stream(shape: Shape, case: Case, repeats: int) -> dict:
    """A few rows through one matrix after the other, as a loop of decoding takes them.

    Each is added to what it gets: one more small program a layer, for dense ones too.
    """
    itemsize = jnp.dtype(shape.dtype).itemsize
    kept_bytes = case.density * shape.d_in * shape.d_out * itemsize
    layers = 2 if shape.dtype == "float32" else math.ceil(STREAMED_BYTES / kept_bytes)
    x = normal(0, (shape.rows, shape.d_in), shape.dtype)
    masks = [make_mask(shape, case, seed) for seed in range(layers)]
    make = jax.jit(
        lambda i: normal(i, (shape.d_in, shape.d_out), shape.dtype), static_argnums=0
    )
    ws = [make(i) / math.sqrt(shape.d_in) for i in range(layers)]
    kernel = common.KERNELS.get(jax.default_backend())
    product = functools.partial(sj.ops.block_matmul, implementation=kernel)
    masked = functools.partial(sj.ops.block_matmul, implementation="reference")

    def loop(product, variance=1.0, tokens=TOKENS):
        def layer(x, *has):
            y = product(x, *has).astype(jnp.float32) * variance**-0.5
            return ((x + y) * 0.5**0.5).astype(x.dtype)

        return timing.in_a_loop(layer, tokens=tokens)

    kept = list(zip(ws, masks, strict=True))
    got, want = (loop(fn, case.density, tokens=1)(x, kept) for fn in (product, masked))
    error = common.relative_error(got, want)
    assert error < 0.03, (shape, case, error)
    sparse = functools.partial(loop(product, case.density), x, kept)
    large = jnp.concatenate([w.reshape(-1) for w in ws])
    copy = jax.jit(lambda x: jax.lax.optimization_barrier(x) + 0)
    times = timing.time_in_turn(
        {
            "ours": sparse,
            "dense": functools.partial(loop(jnp.dot), x, [(w,) for w in ws]),
            "copy": functools.partial(copy, large),
        },
        repeats=repeats,
    )
    if told := kernel_times.longest(sparse, units=TOKENS):
        print(f"  ours, a token: {told}")
    ours, dense = (times[name].ms / TOKENS / layers for name in ("ours", "dense"))
    mean_density = sum(float(mask.density()) for mask in masks) / layers
    num_bytes = mean_density * shape.d_in * shape.d_out * itemsize
    return (
        dataclasses.asdict(shape)
        | dataclasses.asdict(case)
        | {
            "product": "y",
            "layers": layers,
            "ms": ours,
            "iqr_ms": times["ours"].iqr_ms / TOKENS / layers,
            "gb_per_s": num_bytes / ours / 1e6,
            "copy_gb_per_s": 2 * large.nbytes / times["copy"].ms / 1e6,
            "dense_ms": dense,
            "speedup": dense / ours,
            "error": error,
        }
    )


def run_building(shape: Shape, repeats: int) -> list[dict]:
    """The lists of a mask, from bools of blocks and from an elementwise mask."""
    mask = make_mask(shape, Case(0.1), seed=0)
    block = (shape.block, shape.block)
    sources = {
        "mask from blocks": (sj.BlockMask.from_blocks, mask.to_blocks()),
        "mask from dense": (sj.BlockMask.from_dense, mask.to_dense()),
    }
    fns = {
        name: functools.partial(
            timing.built_in_a_loop(
                lambda never, kept, make=make: make(kept ^ never, block), times=MASKS
            ),
            kept,
        )
        for name, (make, kept) in sources.items()
    }
    for fn in fns.values():
        chex.assert_trees_all_equal(fn(), mask)
    times = timing.time_in_turn(fns, repeats=repeats, units=MASKS + 1)
    for name, fn in fns.items():
        if told := kernel_times.longest(fn, units=MASKS + 1):
            print(f"  {name}: {told}")
    return [
        dataclasses.asdict(shape)
        | {"product": name, "ms": time.ms, "iqr_ms": time.iqr_ms}
        for name, time in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, repeats=15, argv=argv)
    cases = QUICK if args.quick else CASES
    rows = itertools.chain(
        (run_stream(shape, case, args.repeats) for shape, case in cases),
        run_building(cases[0][0], args.repeats),
    )
    common.report(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

"""Which tiles make the block-sparse product fastest on a Hopper GPU?

Every way to cut the work of y, dx and dW that is listed here, at several densities, in
TFLOP/s of kept blocks. The defaults of the kernels come from this table.
"""

import dataclasses
import functools
import importlib
import math

import jax

from benchmarks import block_matmul
from benchmarks.block_matmul import Case, Shape
from benchmarks.parts import common, timing

DENSITIES = (0.5, 0.1, 0.05)
WIDE = [
    {},
    {"together": False},
    {"parts": 8, "room": 4},
    {"stages": 3, "parts": 4, "room": 4},
    {"rows": 128, "stages": 6},
]
NARROW = [
    {},
    {"together": False},
    {"rows": 256, "stages": 2},
    {"rows": 64, "stages": 6},
]
WEIGHTS = [{}, {"stages": 4}, *({"cut": cut} for cut in (False, True))]


def run(shape: Shape, repeats: int) -> list[dict]:
    """Checks each against the default, then times all in turn."""
    # by name: the function hides the package of that name
    mosaic_gpu, mosaic_gpu_dw = (
        importlib.import_module(f"sparsejax.ops.block_matmul.{name}")
        for name in ("_mosaic_gpu", "_mosaic_gpu_dw")
    )
    x = block_matmul.normal(0, (shape.rows, shape.d_in), shape.dtype)
    w = block_matmul.normal(1, (shape.d_in, shape.d_out), shape.dtype)
    w /= math.sqrt(shape.d_in)
    dy = block_matmul.normal(2, (shape.rows, shape.d_out), shape.dtype)
    default = mosaic_gpu.Tiles.default(shape.rows, shape.block, shape.d_out)
    # arrays are arguments: what a jitted function holds is compiled into it
    products = {
        "dw": (
            lambda t, m, x, w, dy: mosaic_gpu_dw.grad_w(x, dy, m, w, tiles=t),
            mosaic_gpu_dw.Tiles(),
        ),
        "y": (
            lambda t, m, x, w, dy: mosaic_gpu.forward(x, w, m, None, None, tiles=t),
            default,
        ),
        "dx": (lambda t, m, x, w, dy: mosaic_gpu.grad_x(dy, w, m, tiles=t), default),
    }
    changes = {"y": WIDE if default.columns == 128 else NARROW, "dw": WEIGHTS}
    rows = []
    for product, (fn, tiles) in products.items():
        jitted = {}
        for change in changes[product if product == "dw" else "y"]:
            chosen = dataclasses.replace(tiles, **change)
            jitted[str(change)] = jax.jit(functools.partial(fn, chosen))
        masks = {d: block_matmul.make_mask(shape, Case(d)) for d in DENSITIES}
        print(product, flush=True)
        found = timing.time_variants(
            jitted,
            {density: (mask, x, w, dy) for density, mask in masks.items()},
            repeats=repeats,
            tolerance=1e-3,
        )
        for density, times in found.items():
            mask = masks[density]
            flops = 2 * shape.rows * shape.d_in * shape.d_out * float(mask.density())
            of_case = [
                dataclasses.asdict(shape)
                | {"product": product, "density": density, "tiles": name}
                | {"ms": time.ms, "iqr_ms": time.iqr_ms}
                | {"tflops": flops / time.ms / 1e9}
                for name, time in times.items()
            ]
            common.print_table(of_case)
            rows += of_case
    return rows


def main(argv: list[str] | None = None) -> None:
    """Runs both block sizes, and a narrow matrix."""
    args = common.parse_args(__doc__, repeats=9, argv=argv)
    if jax.default_backend() != "gpu":
        raise SystemExit("this needs a Hopper GPU: it times ways to run its kernels")
    square = block_matmul.SQUARE
    rows = run(square, args.repeats)
    if not args.quick:
        rows += run(dataclasses.replace(square, block=64), args.repeats)
        # few tiles of dw, each of many rows
        rows += run(Shape(16384, 1024, 4096, 128), args.repeats)
    common.write_json(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

"""Which tiles make the block-sparse product fastest on a Hopper GPU?

Every way to cut the work of y, dx and dW that is listed here, at several densities, in
TFLOP/s of kept blocks. The defaults of the kernels come from this table.
"""

import dataclasses
import functools
import importlib
import math

import jax

from benchmarks import block_matmul, common
from benchmarks.block_matmul import Case, Shape

DENSITIES = (0.5, 0.1, 0.05)
WIDE = [
    {},
    *({"window": n} for n in (2, 8, 16)),
    {"parts": 8},
    {"stages": 3},
    {"rows": 128, "stages": 6},
    {"columns": 64, "rows": 128},
]
NARROW = [
    {},
    *({"window": n} for n in (2, 8)),
    {"rows": 256, "stages": 2},
    {"rows": 64, "stages": 6},
]
WEIGHTS = [{"stages": n} for n in (5, 4, 3)]


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
    products = {
        "y": (lambda t, m: mosaic_gpu.forward(x, w, m, None, None, tiles=t), default),
        "dx": (lambda t, m: mosaic_gpu.grad_x(dy, w, m, tiles=t), default),
        "dw": (
            lambda t, m: mosaic_gpu_dw.grad_w(x, dy, m, w, tiles=t),
            mosaic_gpu_dw.Tiles(),
        ),
    }
    changes = {"y": WIDE if default.columns == 128 else NARROW, "dw": WEIGHTS}
    rows = []
    for product, (fn, tiles) in products.items():
        jitted = {}
        for change in changes[product if product == "dw" else "y"]:
            chosen = dataclasses.replace(tiles, **change)
            jitted[str(change)] = jax.jit(functools.partial(fn, chosen))
        masks = [block_matmul.make_mask(shape, Case(d)) for d in DENSITIES]
        # the tiles may not fit into shared memory
        refused = (ValueError, jax.errors.JaxRuntimeError)
        print(product, flush=True)
        compiled = common.compile_side_by_side(jitted, masks[0], refused=refused)
        for density, mask in zip(DENSITIES, masks, strict=True):
            want, fns = None, {}
            for name, call in compiled.items():
                got = call(mask)
                want = got if want is None else want
                error = block_matmul.relative_error(got, want)
                assert error < 1e-3, (product, name, error)
                fns[name] = functools.partial(call, mask)
            times = common.time_in_turn(fns, repeats=repeats)
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
    """Runs both block sizes."""
    args = common.parse_args(__doc__, repeats=9, argv=argv)
    if jax.default_backend() != "gpu":
        raise SystemExit("this needs a Hopper GPU: it times ways to run its kernels")
    square = block_matmul.SQUARE
    rows = run(square, args.repeats)
    if not args.quick:
        rows += run(dataclasses.replace(square, block=64), args.repeats)
    common.write_json(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

"""Which tiles make block-sparse attention fastest on a Hopper GPU?

Every way to cut the work of the forward, of dq and of dk with dv that is listed here,
in TFLOP/s of kept blocks; dq executes three products a block, dk with dv four. The
defaults of the kernels come from this table.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks import block_attention
from benchmarks.block_attention import BLOCK, Shape
from benchmarks.parts import common, timing

DENSITIES = (0.5, 0.1)
SHAPES = [Shape(32768), Shape(32768, heads=32, kv_heads=32, head_dim=64)]
FORWARD = [
    {"columns": columns, "stages": stages, "take_turns": turns}
    for columns, stages in ((128, 2), (64, 2), (64, 3), (64, 4))
    for turns in (True, False)
]
BACKWARD = [{"columns": c, "stages": s} for c, s in ((64, 2), (64, 3), (128, 2))]
PRODUCTS = {"forward": 2, "dq": 3, "dk and dv": 4}  # executed for a block


def kernels(shape: Shape):
    """Functions of the tiles and the operands, by name."""
    # by name: the function hides the package of that name
    forward, backward, gradients, rules = (
        importlib.import_module(f"sparsejax.ops.block_attention.{name}")
        for name in ("_mosaic_gpu", "_mosaic_gpu_backward", "_gradients", "_rules")
    )
    scale = shape.head_dim**-0.5
    free = rules.Rules(None, None, None, None, None, shape.seq)

    def lists(mask):
        return gradients.Lists(*rules.split(mask, free), free, None)

    def named(operands):
        return dict(zip(("q", "k", "v", "do", "lse", "delta"), operands, strict=True))

    def run_forward(tiles, operands, mask):
        return forward.forward(*operands[:3], lists(mask), scale, tiles=tiles)

    def run_dq(tiles, operands, mask):
        return backward._grad_q(named(operands), lists(mask), scale, tiles)

    def run_dkv(tiles, operands, mask):
        return backward._grad_kv(named(operands), lists(mask), scale, tiles)

    return {"forward": run_forward, "dq": run_dq, "dk and dv": run_dkv}


def run(shape: Shape, repeats: int) -> list[dict]:
    """Checks each against the first, then times all in turn."""
    from sparsejax.ops.block_attention._walk import Tiles

    *qkv, do = block_attention.operands(shape)
    # of scores that are nearly 0: any numbers of their size do for a timing
    per_query = jnp.full((1, shape.heads, shape.seq), 12.0, jnp.float32)
    operands = [*qkv, do, per_query, jnp.zeros_like(per_query)]
    masks = {
        d: sj.BlockMask.from_blocks(
            jnp.asarray(block_attention.make_kept(shape, d)), (BLOCK, BLOCK)
        )
        for d in DENSITIES
    }
    rows = []
    for name, fn in kernels(shape).items():
        print(name, flush=True)
        jitted = {
            str(change): jax.jit(functools.partial(fn, Tiles(**change)))
            for change in (FORWARD if name == "forward" else BACKWARD)
        }
        found = timing.time_variants(
            jitted,
            {density: (operands, mask) for density, mask in masks.items()},
            repeats=repeats,
            tolerance=0.02,
        )
        for density, times in found.items():
            mask = masks[density]
            pairs = float(mask.density().mean()) * shape.seq**2 * shape.heads
            flops = PRODUCTS[name] * 2 * shape.head_dim * pairs
            of_case = [
                {"head_dim": shape.head_dim, "kernel": name, "density": density}
                | {"tiles": tiles, "ms": time.ms, "iqr_ms": time.iqr_ms}
                | {"tflops": flops / time.ms / 1e9}
                for tiles, time in times.items()
            ]
            common.print_table(of_case)
            rows += of_case
    return rows


def main(argv: list[str] | None = None) -> None:
    """Runs both head sizes."""
    args = common.parse_args(__doc__, repeats=7, argv=argv)
    if jax.default_backend() != "gpu":
        raise SystemExit("this needs a Hopper GPU: it times ways to run its kernels")
    rows = []
    for shape in SHAPES[:1] if args.quick else SHAPES:
        rows += run(shape, args.repeats)
    common.write_json(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

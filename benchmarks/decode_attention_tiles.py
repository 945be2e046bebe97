"""Which tiles make attention to listed keys fastest on a Hopper GPU?

Every way to cut the work that is listed here, for a sixteenth of a cache; milliseconds
of a layer. The defaults of the kernel come from this table.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from benchmarks.decode_attention import Case, make_layers, make_lists
from benchmarks.parts import common, timing

CASES = [Case(65536, 0.0625), Case(65536, 0.0625, batch=4, layers=4)]
# programs of a list on the whole device, warpgroups of each, keys of a tile, slots
TILES = [
    (parts, *of_program)
    for parts in (16, 8, 4)
    for of_program in (
        (2, 64, 2),
        (2, 64, 1),
        (2, 128, 1),
        (1, 64, 4),
        (1, 64, 3),
        (1, 128, 2),
        (3, 64, 1),
    )
]


def run(case: Case, repeats: int) -> list[dict]:
    """Checks each against the first, then times all in turn."""
    # by name: the function hides the package of that name
    kernel = importlib.import_module("sparsejax.ops.block_attention._mosaic_gpu_listed")
    layers, lists = make_layers(case), make_lists(case)
    length = jnp.full((case.batch,), case.length, jnp.int32)

    def attend(tiles, q, k, v, lists, length):
        scale = case.head_dim**-0.5
        return kernel.listed_attention(q, k, v, lists, length, scale=scale, tiles=tiles)

    jitted = {
        str(cut): timing.for_each(functools.partial(attend, kernel.Tiles(*cut)))
        for cut in TILES
        if cut[0] * case.batch * case.kv_heads <= 2 * 132  # near the multiprocessors
    }
    found = timing.time_variants(
        jitted, {case: (layers, lists, length)}, repeats=repeats, tolerance=0.01
    )
    names = ("parts", "warpgroups", "columns", "stages")
    rows = [
        {"batch": case.batch, "kept": case.kept}
        | dict(zip(names, map(int, cut.strip("()").split(",")), strict=True))
        | {"ms": time.ms / case.layers, "iqr_ms": time.iqr_ms / case.layers}
        for cut, time in found[case].items()
    ]
    common.print_table(rows)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Runs one sequence, and four."""
    args = common.parse_args(__doc__, repeats=7, argv=argv)
    if jax.default_backend() != "gpu":
        raise SystemExit("this needs a Hopper GPU: it times ways to run its kernels")
    rows = []
    for case in CASES[:1] if args.quick else CASES:
        rows += run(case, args.repeats)
    common.write_json(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

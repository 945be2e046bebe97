"""Which tiles make the kernel of the active neurons fastest on a Hopper GPU?

The up and the down projection of `ffn_decode`, its active neurons listed, in every way
to cut the work that is listed here. The defaults of the kernel come from this table.
"""

import dataclasses

import jax

from benchmarks import ffn_decode
from benchmarks.parts import common, ffn_layers
from benchmarks.parts.ffn_layers import Case, Size

CASES = [Case(batch, 0.08) for batch in (1, 2, 4, 8)]
CHANGES = [
    {},
    *({"blocks_per_sm": 1, "slots": n} for n in (4, 8)),
    *({"blocks_per_sm": 2, "slots": n} for n in (2, 3, 4)),
    *({"blocks_per_sm": n, "slots": 2} for n in (3, 4, 6)),
    {"blocks_per_sm": 3, "slots": 3},
    *({"parts": n} for n in (1, 2, 4)),
    *({"chunk": n} for n in (512, 2048, 4096)),
]
SHARED_BYTES = 220 * 1024  # of a multiprocessor, for rings and rows of `x`


def run(layers, size: Size, case: Case, repeats: int) -> list[dict]:
    """A row for each way."""
    from sparsejax.ops.active_ffn import _mosaic_gpu

    default = _mosaic_gpu.Tiles.default(
        case.batch, size.d_model, size.d_model, itemsize=2
    )
    layers = ffn_layers.with_active(layers, size, case)
    h = jax.random.normal(jax.random.key(1), (case.batch, size.d_model), size.dtype)
    forms = {}
    for change in CHANGES:
        tiles = dataclasses.replace(default, **change)
        slot_bytes = 2 * (size.d_model + size.d_model // tiles.parts)
        used = tiles.slots * slot_bytes + 2 * case.batch * size.d_model
        if used * tiles.blocks_per_sm > SHARED_BYTES or tiles.slots < 2:
            continue

        def form(layer, h, tiles=tiles):
            gate, indices = layer[ffn_layers.room_of("mosaic_gpu")]
            operands = h, gate, indices, layer["num_active"]
            return _mosaic_gpu.active_ffn(
                *operands, layer["up"], layer["down"], tiles=tiles
            )

        forms[str(tiles)] = form
    times, _ = ffn_decode.measure([forms], layers, h, size.dtype, repeats)
    return [
        {**dataclasses.asdict(case), "tiles": tiles}
        | {"ms": found.ms, "iqr_ms": found.iqr_ms, "min_ms": found.min_ms}
        for tiles, found in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, repeats=9, argv=argv)
    if not ffn_layers.has_kernel():
        raise SystemExit("this needs a Hopper GPU: it times ways to run its kernels")
    size = ffn_decode.size_here(args.quick)
    weights = ffn_layers.given_weights(size)
    cases = CASES[:1] if args.quick else CASES
    rows = (row for case in cases for row in run(weights, size, case, args.repeats))
    env = common.environment(repeats=args.repeats, **dataclasses.asdict(size))
    common.report(args.json, env, rows)


if __name__ == "__main__":
    main()

"""How close does CAST to exact 2:4 come to the dense model, for the same tokens?

Runs `examples/train_lm.py` as it is, with another seed each time, and judges what its
table says: the loss after the hard prune should be within 2 % of that of the dense
model that trained on for as many tokens, and below that of pruning it in one shot.

    python -m benchmarks.main_job --json benchmarks/results/main_job_cpu.json

Paper: https://arxiv.org/abs/2509.25996.
"""

import json
import pathlib
import tempfile
import time
from collections.abc import Sequence

from benchmarks.parts import common
from examples import train_lm

QUICK = (
    *("--dense-steps", "20", "--steps", "20", "--evaluate-every", "20"),
    *("--d-model", "32", "--num-layers", "1", "--batch-size", "2", "--seq-len", "32"),
)
COLUMNS = {
    "dense at the fork": "fork",
    "dense, trained on": "dense",
    "... pruned in one shot": "one_shot",
    "cast, before the hard prune": "cast_before_prune",
    "cast, after the hard prune": "cast",
}


def run(seed: int, options: Sequence[str]) -> dict:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as runs:
        table = train_lm.main(["--runs", runs, "--seed", str(seed), *options])
        config = json.loads(
            (pathlib.Path(runs) / "train_lm" / "config.json").read_text()
        )
    seconds = time.perf_counter() - begin
    losses = {
        f"{COLUMNS[row['model']]}_bits_per_byte": row["bits per byte"] for row in table
    }
    dense, cast = losses["dense_bits_per_byte"], losses["cast_bits_per_byte"]
    return {
        "seed": seed,
        **losses,
        "cast_to_dense_percent": 100 * (cast / dense - 1),
        "cast_sparsity": table[-1]["sparsity"],
        "wall_s": seconds,
        "text_bytes": config["config"]["text"]["train_bytes"],
    }


def judge(rows: Sequence[dict]) -> list[str]:
    gap, error = common.mean_and_error([row["cast_to_dense_percent"] for row in rows])
    close = sum(row["cast_to_dense_percent"] < 2 for row in rows)
    better = sum(
        row["cast_bits_per_byte"] < row["one_shot_bits_per_byte"] for row in rows
    )
    return [
        f"CAST after the hard prune is {gap:+.2f} % ± {error:.2f} (standard error) "
        "from dense for the same tokens, in bits per byte of files never trained on",
        f"within 2 % of dense: {close} of {len(rows)} seeds",
        f"better than one-shot magnitude: {better} of {len(rows)} seeds",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse_args(__doc__, repeats=3, quick_repeats=2, argv=argv)
    options = QUICK if args.quick else ()
    rows = [run(seed, options) for seed in range(args.repeats)]
    notes = judge(rows)
    common.print_table(rows, notes)
    env = common.environment(repeats=args.repeats, options=list(options))
    common.write_json(args.json, env, rows, notes)


if __name__ == "__main__":
    main()

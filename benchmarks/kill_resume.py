"""Does a training job killed with -9 end with the bits of an uninterrupted one?

The main job, small, runs once undisturbed. Then it runs again and again under kills: at
random rows of its metrics plus a random delay, so in steps, evaluations, while a
checkpoint is written and between the phases. Each time `--resume` goes on. Compared at
the end of each such run: every array of every checkpoint that is left (weights,
optimizer state, masks), the sparse weights, the table, and the metrics but for speed.

    python -m benchmarks.kill_resume --json benchmarks/results/kill_resume_cpu.json
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks import common

ROOT = pathlib.Path(__file__).resolve().parent.parent
KILLS_A_RUN = 5
JOB = (
    *("--dense-steps", "40", "--steps", "40", "--checkpoint-every", "7"),
    *("--evaluate-every", "10", "--d-model", "64", "--num-layers", "2"),
)


def command(runs: pathlib.Path, name: str, options: Sequence[str]) -> list[str]:
    script = (sys.executable, "-m", "examples.train_lm")  # from ROOT, installed or not
    return [*script, "--runs", str(runs), "--name", name, "--resume", *options]


def finish(runs: pathlib.Path, name: str, options: Sequence[str]) -> None:
    """Runs the job to its end."""
    done = subprocess.run(
        command(runs, name, options), cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the job failed:\n{done.stdout}\n{done.stderr}")


def kill_at(
    row: int, delay: float, runs: pathlib.Path, name: str, options: Sequence[str]
) -> bool:
    """Starts the job, kills it `delay` seconds after `row` rows of metrics are there.

    Returns:
      False if it ended before.
    """
    with subprocess.Popen(
        command(runs, name, options),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as job:
        while num_rows(runs / name) < row and job.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        job.kill()
    return job.returncode == -signal.SIGKILL


def num_rows(run: pathlib.Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def differences(run: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Names what is not the same in two finished runs."""
    found = [
        name
        for name in ("sparse.safetensors", "table.json")
        if (run / name).read_bytes() != (other / name).read_bytes()
    ]
    if metrics(run) != metrics(other):
        found.append("metrics.jsonl")
    arrays, others = checkpoints(run), checkpoints(other)
    for name in sorted(arrays.keys() | others.keys()):
        if name not in arrays or name not in others:
            found.append(f"{name}, which only one has")
        elif arrays[name].tobytes() != others[name].tobytes():
            found.append(name)
    return found


def metrics(run: pathlib.Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def checkpoints(run: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of all checkpoints that are left, read without our own code."""
    arrays = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for folder in sorted((run / "checkpoints").glob("*/*/default")):
            tree = checkpointer.restore(folder.absolute())
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = f"{folder.relative_to(run)}{jax.tree_util.keystr(path)}"
                arrays[name] = np.asarray(leaf)
    return arrays


def study(
    runs: pathlib.Path, num_kills: int, options: Sequence[str], seed: int = 0
) -> list[dict]:
    """Kills the job `num_kills` times; returns a row for each run under kills."""
    rng = random.Random(seed)
    finish(runs, "undisturbed", options)
    last_row = num_rows(runs / "undisturbed")
    rows, kills = [], 0
    while kills < num_kills:
        name = f"killed-{len(rows)}"
        moments = sorted(
            (rng.uniform(0, last_row), rng.uniform(0, 0.3))
            for _ in range(min(KILLS_A_RUN, num_kills - kills))
        )
        killed_at = []
        for row, delay in moments:
            if kill_at(round(row), delay, runs, name, options):
                killed_at.append(num_rows(runs / name))
        finish(runs, name, options)
        differ = differences(runs / name, runs / "undisturbed")
        kills += len(killed_at)
        rows.append(
            {
                "run": name,
                "kills": len(killed_at),
                "killed_at_row": " ".join(map(str, killed_at)),
                "rows": last_row,
                "arrays_compared": len(checkpoints(runs / name)),
                "identical": not differ,
                "differences": "; ".join(differ),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH")
    parser.add_argument("job", nargs="*", help="options of train_lm, after --")
    args = parser.parse_args()
    options = args.job or JOB
    with tempfile.TemporaryDirectory() as folder:
        rows = study(pathlib.Path(folder), args.kills, options, args.seed)
    common.print_table(rows)
    env = common.environment(kills=args.kills, seed=args.seed, job=list(options))
    common.write_json(args.json, env, rows)
    if not all(row["identical"] for row in rows):
        raise SystemExit("some run differs")


if __name__ == "__main__":
    main()

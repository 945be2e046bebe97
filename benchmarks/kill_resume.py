"""Does a training job that is killed or whose disk fails end with the same bits?

The main job, small, runs once undisturbed. Then it runs again under kill -9, and each
time `--resume` goes on. Half of the kills come at random rows of the metrics plus a
random delay, so in steps, evaluations and between the phases; the others a random delay
after a checkpoint write began. Then come a full disk and damage to the newest
checkpoint: the job must say so and go on from the one before. Compared at the end of
each run: every array of every checkpoint that is left (weights, optimizer state,
masks), the sparse weights, the table, and the metrics but for speed.

    python -m benchmarks.kill_resume --json benchmarks/results/kill_resume_cpu.json

Compiled programs are kept between the starts; the undisturbed run fills that cache.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.parts import common

ROOT = pathlib.Path(__file__).resolve().parent.parent
KILLS_A_RUN = 10
JOB = (
    *("--dense-steps", "40", "--steps", "40", "--checkpoint-every", "7"),
    *("--evaluate-every", "10", "--d-model", "64", "--num-layers", "1"),
)
JOB_IS = ("-m", "examples.train_lm")  # from ROOT, installed or not
LIMITED_JOB = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("examples.train_lm", run_name="__main__")
"""
WRITE_SECONDS = 0.1  # what a write takes, about; kills are spread over it


def command(
    runs: pathlib.Path,
    name: str,
    options: Sequence[str],
    script: Sequence[str] = JOB_IS,
) -> list[str]:
    run = ("--runs", str(runs), "--name", name, "--resume")
    return [sys.executable, *script, *run, *options]


def environment(runs: pathlib.Path) -> dict[str, str]:
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(runs.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def attempt(
    runs: pathlib.Path,
    name: str,
    options: Sequence[str],
    script: Sequence[str] = JOB_IS,
) -> subprocess.CompletedProcess[str]:
    """Runs the job until it ends."""
    return subprocess.run(
        command(runs, name, options, script),
        cwd=ROOT,
        env=environment(runs),
        capture_output=True,
        text=True,
    )


def finish(runs: pathlib.Path, name: str, options: Sequence[str]) -> str:
    """Runs the job to its good end; returns what it said on stderr."""
    done = attempt(runs, name, options)
    if done.returncode:
        raise RuntimeError(f"the job failed:\n{done.stdout}\n{done.stderr}")
    return done.stderr


def kill_at(
    row: int,
    delay: float,
    runs: pathlib.Path,
    name: str,
    options: Sequence[str],
    *,
    in_write: bool = False,
) -> tuple[bool, bool]:
    """Starts the job, kills it `delay` seconds after `row` rows of metrics are there.

    With `in_write` after the next checkpoint write began.

    Returns:
      Whether it was killed, and not at its end before; and whether a checkpoint was
      half written then.
    """
    with subprocess.Popen(
        command(runs, name, options),
        cwd=ROOT,
        env=environment(runs),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as job:
        left = half_written(runs / name)  # by an earlier kill; the next write clears it
        while job.poll() is None:
            now = half_written(runs / name)
            left &= now
            if num_rows(runs / name) >= row and (now - left or not in_write):
                break
            time.sleep(0.0005)
        time.sleep(delay)
        job.kill()
    return job.returncode == -signal.SIGKILL, bool(half_written(runs / name) - left)


def half_written(run: pathlib.Path) -> set[pathlib.Path]:
    return set((run / "checkpoints").glob("*/*.orbax-checkpoint-tmp*"))


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
    """Phase by phase: one that lost its end is ended after what followed it."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["phase"])
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def checkpoints(run: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of all checkpoints that are left, read without our own code."""
    arrays = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for folder in sorted((run / "checkpoints").glob("*/[0-9]*/default")):
            tree = checkpointer.restore(folder.absolute())
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = f"{folder.relative_to(run)}{jax.tree_util.keystr(path)}"
                arrays[name] = np.asarray(leaf)
    return arrays


def undisturbed(runs: pathlib.Path, options: Sequence[str]) -> pathlib.Path:
    """The run that all others are compared with; made once."""
    if not (runs / "undisturbed").exists():
        finish(runs, "undisturbed", options)
    return runs / "undisturbed"


def report(what: str, run: pathlib.Path, other: pathlib.Path, **more) -> dict:
    differ = differences(run, other)
    row = {
        "what": what,
        **more,
        "arrays_compared": len(checkpoints(run)),
        "identical": not differ,
        "differences": "; ".join(differ),
    }
    print(row, flush=True)
    return row


def study_kills(
    runs: pathlib.Path, num_kills: int, options: Sequence[str], seed: int = 0
) -> list[dict]:
    """Kills the job `num_kills` times; returns a row for each run under kills."""
    rng, want = random.Random(seed), undisturbed(runs, options)
    last_row = num_rows(want)
    rows, kills = [], 0
    while kills < num_kills:
        name = f"killed-{len(rows)}"
        moments = sorted(
            (rng.uniform(0, last_row), rng.random(), turn % 2 == 1)
            for turn in range(min(KILLS_A_RUN, num_kills - kills))
        )
        killed_at, in_writes = [], 0
        for row, share, in_write in moments:
            delay = share * (WRITE_SECONDS if in_write else 0.3)
            killed, half = kill_at(
                round(row), delay, runs, name, options, in_write=in_write
            )
            if killed:
                killed_at.append(num_rows(runs / name))
                in_writes += half
        finish(runs, name, options)
        kills += len(killed_at)
        rows.append(
            report(
                "kill -9",
                runs / name,
                want,
                kills=len(killed_at),
                in_a_checkpoint_write=in_writes,
                killed_at_row=" ".join(map(str, killed_at)),
            )
        )
    return rows


def study_damage(
    runs: pathlib.Path, options: Sequence[str], seed: int = 0
) -> list[dict]:
    """Damages the newest checkpoint of a killed run in each of three ways."""
    rng, want = random.Random(seed), undisturbed(runs, options)
    last_row = num_rows(want)
    rows = []
    for what, damage in DAMAGES.items():
        name = what.replace(" ", "-")
        kill_at(last_row * 4 // 5, 0, runs, name, options)
        found = (runs / name / "checkpoints").glob("*/[0-9]*[0-9]")
        path = max(found, key=lambda path: path.stat().st_mtime)
        damage(rng, path)
        said = finish(runs, name, options)
        if f"{path} cannot be read and is now damaged-{path.name}; go" not in said:
            raise RuntimeError(f"nothing was said of {path}:\n{said}")
        rows.append(report(what, runs / name, want, kills=1))
    return rows


def largest(folder: pathlib.Path) -> pathlib.Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def cut_off(rng: random.Random, folder: pathlib.Path) -> None:
    path = largest(folder)
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip_a_bit(rng: random.Random, folder: pathlib.Path) -> None:
    path = largest(folder)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def remove_everything(rng: random.Random, folder: pathlib.Path) -> None:
    del rng
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "newest checkpoint cut off": cut_off,
    "newest checkpoint with a bit flipped": flip_a_bit,
    "newest checkpoint emptied": remove_everything,
}


def study_full_disk(runs: pathlib.Path, options: Sequence[str]) -> dict:
    """Lets no file grow beyond a quarter of a checkpoint's largest, then lifts that.

    The limit is one of the process, RLIMIT_FSIZE: the system refuses the write, as on a
    full disk, and no privilege is needed.
    """
    name, want = "full-disk", undisturbed(runs, options)
    kill_at(num_rows(want) // 2, 0, runs, name, options)
    before = sorted((runs / name / "checkpoints").glob("*/[0-9]*[0-9]"))
    limit = min(largest(path).stat().st_size for path in before) // 4
    done = attempt(runs, name, options, ("-c", LIMITED_JOB, str(limit)))
    said = [line for line in done.stderr.splitlines() if "cannot save step" in line]
    if not done.returncode or not said:
        raise RuntimeError(f"no clear error:\n{done.stderr}")
    if sorted((runs / name / "checkpoints").glob("*/[0-9]*[0-9]")) != before:
        raise RuntimeError("a checkpoint is lost")
    finish(runs, name, options)
    return report("disk full", runs / name, want, kills=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    common.add_json_option(parser)
    parser.add_argument("job", nargs="*", help="options of train_lm, after --")
    args = parser.parse_args()
    options = args.job or JOB
    with tempfile.TemporaryDirectory() as folder:
        runs = pathlib.Path(folder) / "runs"
        rows = [study_full_disk(runs, options)]
        rows += study_damage(runs, options, args.seed)
        rows += study_kills(runs, args.kills, options, args.seed)
    common.print_table(rows)
    env = common.environment(kills=args.kills, seed=args.seed, job=list(options))
    common.write_json(args.json, env, rows)
    if not all(row["identical"] for row in rows):
        raise SystemExit("some run differs")


if __name__ == "__main__":
    main()

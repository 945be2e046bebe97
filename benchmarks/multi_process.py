"""Do several processes train as one does, and go on from each other's checkpoints?

The FSDP example runs as one process, and as 2 and 4 that talk over Gloo. Each saves
half way; other numbers of processes go on from there. Compared: the restored state with
the one that was saved, bit for bit, and the losses with those of one undisturbed
process. Then one of two processes gets SIGTERM: both must stop after the same step, and
what they saved must lead to the losses of a run that was not stopped.

    python -m benchmarks.multi_process \
        --json benchmarks/results/multi_process_cpu.json
"""

import argparse
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.parts import common
from examples import train_fsdp
from sparsejax import training

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = "import sys; from benchmarks import multi_process as m; m.work(*sys.argv[1:])"
PAIRS = ((1, 2), (2, 1), (2, 4), (4, 1), (4, 2))  # saved by, restored by
JOB = (
    *("--text", "LICENSE", "--batch-size", "8"),
    *("--seq-len", "64", "--d-model", "64", "--num-layers", "1"),
    *("--update-every", "5", "--stop-step", "22", "--evaluate-every", "10"),
)
JOIN = "--coordinator"  # and what comes after it
HALF, END = 15, 30
TOLERANCE = 1e-5  # bits per byte


def work(dump: str, steps: str, more_steps: str, *options: str) -> None:
    """One process: trains, writes the whole of its state to `dump`, and trains on."""
    state = train_fsdp.main([*options, "--steps", steps])
    arrays = whole(state)
    if jax.process_index() == 0:
        np.savez(dump, **arrays)
    if int(more_steps):
        joined = options.index(JOIN) if JOIN in options else len(options)
        train_fsdp.main([*options[:joined], "--steps", more_steps])


def whole(state: training.TrainState) -> dict[str, np.ndarray]:
    """Every array of a state by name, put together from all processes."""

    def numbers(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    everywhere = NamedSharding(state.step.sharding.mesh, PartitionSpec())
    gather = jax.jit(
        lambda state: jax.tree.map(numbers, state), out_shardings=everywhere
    )
    leaves = jax.tree_util.tree_leaves_with_path(gather(state))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def launch(
    num_processes: int, code: str, *arguments: str
) -> list[subprocess.Popen[bytes]]:
    """Starts Python on `code` in each process, with the options that join them."""
    join = []
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        join = [JOIN, f"localhost:{port}"]
        join += ["--num-processes", str(num_processes), "--process-id"]
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "device_count" not in flag]  # a device each
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments, *join, *[str(i)][: len(join)]],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(num_processes)
    ]


def wait(processes: list[subprocess.Popen[bytes]], code: int = 0) -> str:
    """Waits for all; returns what they said.

    Raises:
      RuntimeError: one ended otherwise than with `code`.
    """
    said = [process.communicate()[0].decode() for process in processes]
    codes = [process.returncode for process in processes]
    if set(codes) != {code}:
        raise RuntimeError(f"exit codes {codes}:\n" + "\n".join(said))
    return "\n".join(said)


def losses(run: pathlib.Path) -> np.ndarray:
    rows = training.Run(run).rows()
    return np.array([row["bits_per_byte"] for row in rows if "bits_per_byte" in row])


def same_bits(one: pathlib.Path, other: pathlib.Path) -> tuple[int, bool]:
    """How many arrays there are, and whether all are equal bit for bit."""
    with np.load(one) as a, np.load(other) as b:
        equal = a.keys() == b.keys() and all(
            a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes()
            for name in a
        )
        return len(a.keys()), equal


def study(runs: pathlib.Path, job: Sequence[str] = JOB) -> list[common.Row]:
    """Trains, restores and stops; a row for each question."""

    def train(
        num_processes: int, name: str, steps: int, more_steps: int = 0
    ) -> pathlib.Path:
        dump = runs / f"{name}.npz"
        until = [str(steps), str(more_steps)]
        options = ["--runs", str(runs), "--name", name, "--resume", *job]
        wait(launch(num_processes, WORK, str(dump), *until, *options))
        return dump

    def row(what: str, saved_by: int, restored_by: int, name: str, **more):
        found = losses(runs / name)
        apart = np.abs(found - want[: len(found)]).max()
        return {
            "what": what,
            "saved_by": saved_by,
            "restored_by": restored_by,
            "steps": len(found),
            **more,
            "max_loss_difference": float(apart),
            "holds": bool(apart < TOLERANCE) and more.get("bits_equal", True),
        }

    train(1, "undisturbed", END)
    want = losses(runs / "undisturbed")
    rows = []
    for count in sorted({saved_by for saved_by, _ in PAIRS}):
        train(count, f"on-{count}", HALF)
        print(f"{count} processes: saved", flush=True)
    for saved_by, restored_by in PAIRS:
        name = f"on-{saved_by}-then-{restored_by}"
        shutil.copytree(runs / f"on-{saved_by}", runs / name)
        restored = train(restored_by, name, HALF, END)  # up to HALF it only reads
        arrays, equal = same_bits(restored, runs / f"on-{saved_by}.npz")
        more = {"arrays": arrays, "bits_equal": equal}
        rows.append(row("restore", saved_by, restored_by, name, **more))
        print(rows[-1], flush=True)

    stopped_at = stop_one_of_two(runs, job)
    train(2, "stopped", END)
    rows.append(row("SIGTERM to one of two", 2, 2, "stopped", stopped_at=stopped_at))
    return rows


def stop_one_of_two(runs: pathlib.Path, job: Sequence[str]) -> int:
    """Sends SIGTERM to the second of two processes; returns the step they stop at."""
    options = ["--runs", str(runs), "--name", "stopped", "--steps", str(END), *job]
    code = "from examples import train_fsdp; train_fsdp.main()"
    processes = launch(2, code, *options)
    while not (runs / "stopped" / "metrics.jsonl").exists() or (
        len(losses(runs / "stopped")) < 3
    ):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    said = wait(processes, 128 + signal.SIGTERM)
    (saved,) = (runs / "stopped" / "checkpoints" / "fsdp").iterdir()
    if f"stopped by SIGTERM in phase 'fsdp' at step {saved.name};" not in said:
        raise RuntimeError(f"saved step {saved.name}, but:\n{said}")
    return int(saved.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    common.add_json_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = study(pathlib.Path(folder))
    common.print_table(rows)
    env = common.environment(job=list(JOB), tolerance=TOLERANCE)
    common.write_json(args.json, env, rows)
    if not all(row["holds"] for row in rows):
        raise SystemExit("something does not hold")


if __name__ == "__main__":
    main()

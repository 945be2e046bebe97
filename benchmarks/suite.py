"""Which command makes each file of results, and how are they made again?

    python -m benchmarks.suite                        # lists files and commands
    python -m benchmarks.suite decode time_to_loss --folder DIR --minutes 9

The second runs those commands, each on a GPU of its own, or one after another on the
CPU. What ended well is not done again by the next call with that folder, and studies
that a call cuts off go on where they stopped. What a run prints is in DIR/NAME.log.
Compiled programs are kept in DIR too.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from benchmarks.parts import common

MARGIN = 20.0  # s, for a study to tell what it has before it is ended
STATES = "suite.json"  # in the folder: what ended well


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that makes a file of results.

    Attributes:
      name: of the file, without the device.
      minutes: what it takes on one H100, or on two CPU cores, about.
      options: of the command, but for `--json`; `{folder}` and `{data}` are as given.
      module: of `benchmarks`; None: the name.
      on: "gpu" or "cpu".
      any_device: its numbers are not of a device, nor does its file name one.
      resumes: it has `--minutes`, and its file says whether it is complete.
    """

    name: str
    minutes: float
    options: str = ""
    module: str | None = None
    on: str = "gpu"
    any_device: bool = False
    resumes: bool = False

    def file(self, device: str) -> str:
        return f"{self.name}.json" if self.any_device else f"{self.name}_{device}.json"

    @property
    def script(self) -> str:
        return f"benchmarks.{self.module or self.name}"

    @property
    def reads_data(self) -> bool:
        return "{data}" in self.options

    def line(self) -> dict[str, object]:
        """As listed."""
        shown = self.options.format(folder="DIR", data="DATA")
        return {
            "file": self.file("DEVICE" if self.on == "gpu" else self.on),
            "minutes": self.minutes,
            "command": f"python -m {self.script} {shown}".strip(),
        }

    def command(
        self,
        device: str,
        folder: pathlib.Path,
        data: pathlib.Path | None,
        left_s: float,
    ) -> list[str]:
        """Of a process that has `left_s` seconds."""
        given = {"folder": folder, "data": data}
        options = [part.format(**given) for part in shlex.split(self.options)]
        if self.resumes and math.isfinite(left_s):
            options += ["--minutes", f"{max(left_s - MARGIN, 0) / 60:.2f}"]
        options += ["--json", str(folder / self.file(device))]
        return [sys.executable, "-m", self.script, *options]


CPU, ANY = {"on": "cpu"}, {"on": "cpu", "any_device": True}
STUDY = {"resumes": True}
JOBS = (
    # weights: masks and methods
    Job("mask_selection", 2),
    Job("mask_selection", 3, **CPU),
    Job("step_overhead", 6),
    Job("step_overhead", 12, **CPU),
    Job("main_job", 10, **CPU),
    Job("dynamic_sparsity", 30, **ANY),
    Job("progressive_gradient_flow", 60, **ANY),
    Job("cast_toy", 3, **CPU),
    Job("fuzz", 60, **CPU),
    Job("kill_resume", 30, **CPU),
    Job("multi_process", 10, **CPU),
    Job("scale_compiled", 30, module="scale", **ANY),
    # blocks of weights
    Job("block_matmul", 5),
    Job("block_stream", 3),
    Job("block_matmul_tiles", 4),
    Job("block_training", 5),
    # blocks of attention
    Job("block_attention", 6),
    Job("block_attention_tiles", 5),
    Job("attention_training", 4),
    Job("decode_attention", 3),
    Job("decode_attention_tiles", 3),
    Job("keep_highest", 1),
    Job("selection_cost", 3),
    Job("sparse_frontier", 40, "--length 1024 --steps 1200 --sequences 16", **CPU),
    *(
        Job(
            f"sparse_frontier_{length}",
            minutes,
            f"--length {length} --steps 4000 --resume "
            f"--weights {{folder}}/frontier_{length}.safetensors",
            module="sparse_frontier",
        )
        for length, minutes in ((8192, 5), (32768, 8))
    ),
    # activations
    Job("statistical_topk", 4),
    Job("spark_training", 2),
    Job("decode", 2),
    Job("decode", 10, **CPU),
    Job("ffn_decode", 5, "--resume"),
    Job("ffn_decode_tiles", 2),
    Job("ffn_decode", 10, **CPU),
    Job("gemma3n_parity", 1, **ANY),
    # pretrained models
    Job("llama_parity", 1, **ANY),
    Job("smollm2_loss", 1, **ANY),
    # what kernels compile to
    Job("compiled_hopper", 10, module="compiled", **ANY),
    Job("compiled_tpu", 20, **ANY),
    # studies, see RESULTS.md
    Job(
        "smollm2_cast",
        12,
        "--model {data}/SmolLM2-135M-Instruct.Q4_1.gguf --tokens {data}/tokens.npz",
        **STUDY,
    ),
    Job(
        "smollm2_cast_longer",
        19,
        "--model {data}/SmolLM2-135M-Instruct.Q4_1.gguf --tokens {data}/tokens.npz "
        "--steps 2400 --tuning-steps 600 "
        "--methods CAST AST-like 'dense, trained on'",
        module="smollm2_cast",
        **STUDY,
    ),
    Job("high_sparsity_text", 25, "--task text", module="high_sparsity", **STUDY),
    Job(
        "high_sparsity_digits",
        8,
        "--task digits --repeats 6 --digits {data}/mnist_5k.csv.gz",
        module="high_sparsity",
        **STUDY,
    ),
    Job("spark_quality", 11, **STUDY),
    Job("time_to_loss", 29, **STUDY),
    Job(
        "time_to_loss_longer",
        27,
        "--seconds 480 --repeats 1 --as-in benchmarks/results/time_to_loss_h200.json",
        module="time_to_loss",
        **STUDY,
    ),
    Job("long_context_training", 25, **STUDY),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one job runs at a time."""

    on: str  # "gpu" or "cpu"
    device: str  # as in names of files: "h100"
    env: Mapping[str, str]
    name: str  # as printed


def places(listed: str | None = None) -> list[Place]:
    """The CPU, and each GPU.

    Args:
      listed: what `nvidia-smi` lists, lines of index and name; None: as it does now.
    """
    if listed is None:
        query = ("nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader")
        try:
            listed = subprocess.run(query, capture_output=True, text=True).stdout
        except FileNotFoundError:
            listed = ""
    found = [Place("cpu", "cpu", {"JAX_PLATFORMS": "cpu"}, "cpu")]
    for line in listed.splitlines():
        index, name = line.split(", ")  # "0, NVIDIA H100 80GB HBM3"
        device = name.removeprefix("NVIDIA ").split()[0].lower()
        env = {"CUDA_VISIBLE_DEVICES": index}
        found.append(Place("gpu", device, env, f"{device} {index}"))
    return found


class Suite:
    """Jobs that wait, and what became of the others.

    Args:
      jobs: to be done; those that ended well before are left out.
      folder: of files, logs and what ended well.
      data: of files that jobs read.
      minutes: from now on; a job that would end later is not begun, one that still
        runs then is ended.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: pathlib.Path,
        data: pathlib.Path | None = None,
        minutes: float = math.inf,
    ):
        self._folder, self._data = folder, data
        self._began = time.monotonic()
        self._end = self._began + 60 * minutes
        self._lock = threading.Lock()
        self._waiting = sorted(jobs, key=lambda job: -job.minutes)  # the longest first
        states = folder / STATES
        self._ended = json.loads(states.read_text()) if states.exists() else {}
        self.rows: list[dict[str, object]] = []

    def run(self, at: Sequence[Place]) -> bool:
        """Runs what there is time for; whether nothing failed."""
        threads = [threading.Thread(target=self._work, args=(place,)) for place in at]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.rows += [
            {"file": job.name, "state": "waits: no time, or no such device"}
            for job in self._waiting
        ]
        return all(not str(row["state"]).startswith("failed") for row in self.rows)

    def _work(self, place: Place) -> None:
        while job := self._next(place):
            file = job.file(place.device)
            if file in self._ended:
                self._tell(place, file, "ended well before", self._ended[file])
                continue
            self._say(place, f"{file} began")
            began = time.monotonic()
            state = self._do(job, place)
            seconds = round(time.monotonic() - began)
            self._tell(place, file, state, seconds)
            if state == "ended well":
                self._keep(file, seconds)

    def _next(self, place: Place) -> Job | None:
        left = (self._end - time.monotonic()) / 60
        with self._lock:
            for job in self._waiting:
                needs = 1 if job.resumes else job.minutes
                ended = job.file(place.device) in self._ended
                if job.on == place.on and (ended or left >= needs):
                    self._waiting.remove(job)
                    return job
        return None

    def _keep(self, file: str, seconds: float) -> None:
        with self._lock:
            self._ended[file] = seconds
            states = json.dumps(self._ended, indent=1)
            (self._folder / STATES).write_text(states)

    def _do(self, job: Job, place: Place) -> str:
        """Runs a job; what became of it."""
        file = job.file(place.device)
        left_s = self._end - time.monotonic()
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self._folder / "compiled")}
        with (self._folder / file).with_suffix(".log").open("a") as log:
            process = subprocess.Popen(
                job.command(place.device, self._folder, self._data, left_s),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **cache, **place.env},
            )
            try:
                code = process.wait(left_s if math.isfinite(left_s) else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return "cut off"
        if code:
            return f"failed: exit code {code}, see its log"
        if job.resumes and not self._is_complete(file):
            return "goes on with the next call"
        return "ended well"

    def _is_complete(self, file: str) -> bool:
        return json.loads((self._folder / file).read_text())["env"]["complete"]

    def _tell(self, place: Place, file: str, state: str, seconds: float) -> None:
        self.rows.append({"file": file, "state": state, "seconds": seconds})
        self._say(place, f"{file} {state}, {seconds:.0f} s")

    def _say(self, place: Place, what: str) -> None:
        gone = int(time.monotonic() - self._began)
        print(f"{gone // 60:3d}:{gone % 60:02d}  {place.name}: {what}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="jobs; none: all")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="run them, and write files here"
    )
    parser.add_argument(
        "--data", type=pathlib.Path, help="of files that some jobs read"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end after so many; call again"
    )
    parser.add_argument(
        "--on", choices=("gpu", "cpu"), help="jobs of it; to run: gpu if there is one"
    )
    args = parser.parse_args(argv)
    names = {job.name for job in JOBS}
    if unknown := sorted(set(args.names) - names):
        known = ", ".join(sorted(names))
        parser.error(f"a NAME must be one of {known}; got {', '.join(unknown)}")
    found = places()
    on = args.on or (found[-1].on if args.folder else None)
    jobs = [job for job in JOBS if not args.names or job.name in args.names]
    jobs = [job for job in jobs if on in (None, job.on)]
    if args.folder is None:
        common.print_table([job.line() for job in jobs])
        return 0
    if not any(place.on == on for place in found):
        parser.error(f"--on {on}: nvidia-smi finds no GPU")
    if args.data is None and (reads := [job.name for job in jobs if job.reads_data]):
        parser.error(f"--data is needed for {', '.join(reads)}; or name other jobs")
    args.folder.mkdir(parents=True, exist_ok=True)
    suite = Suite(jobs, args.folder, args.data, args.minutes)
    fine = suite.run([place for place in found if place.on == on])
    common.print_table(suite.rows)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

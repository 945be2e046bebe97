"""A run folder: its configuration, its metrics, and nothing ever overwritten."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sparsejax.training._files import write_atomic

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of one run.

    Attributes:
      folder: holds `config.json`, `metrics.jsonl`, `checkpoints/` and what the script
        adds, such as a picture and the final weights.
    """

    folder: Path

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def checkpoints(self, phase: str) -> Path:
        """Where the checkpoints of one phase are."""
        return self.folder / "checkpoints" / phase

    def log(self, row: Row) -> Row:
        """Appends a row to the metrics; returns it as written, arrays as numbers."""
        row = _plain(row)
        with open(self.metrics_file, "a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def rows(self) -> list[Row]:
        """Reads the metrics; a last line cut off by a crash is left out."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, phase: str, step: int) -> None:
        """Drops the rows of `phase` after `step`: training goes on from there."""
        rows = self.rows()
        kept = [row for row in rows if row["phase"] != phase or row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if self.metrics_file.exists() and self.metrics_file.read_text() != text:
            write_atomic(self.metrics_file, text)


def open_run(folder: Path, config: Mapping[str, Any], *, resume: bool) -> Run:
    """Starts the run `folder`, or goes on with it.

    Args:
      folder: created if it does not exist.
      config: everything that determines the result, as JSON can hold it. It is stored
        in the folder, next to the versions it first ran on.
      resume: go on with the run in `folder`; one that is not there yet is started, so
        that a supervisor can give the same command again and again.

    Raises:
      ValueError: `folder` holds a run and `resume` is False, or a run of another
        configuration. Nothing is written.
    """
    file = folder / "config.json"
    wanted = json.loads(json.dumps(config))
    if file.exists():
        if not resume:
            raise ValueError(
                f"{folder} already holds a run. Go on with it by `--resume`, or choose "
                "another `--name`."
            )
        _require_equal(json.loads(file.read_text())["config"], wanted, folder)
        return Run(folder)
    if folder.exists() and any(p.suffix != ".partial" for p in folder.iterdir()):
        raise ValueError(
            f"{folder} is neither empty nor a run: it has no config.json. Choose "
            "another `--name`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    content = {"config": wanted, "environment": environment}
    write_atomic(file, json.dumps(content, indent=2) + "\n")
    return Run(folder)


def _require_equal(stored: Row, wanted: Row, folder: Path) -> None:
    there, now = _flat(stored), _flat(wanted)
    differing = [
        f"  {name}: {there.get(name, 'absent')!r} there, "
        f"{now.get(name, 'absent')!r} now"
        for name in [*now, *(there.keys() - now.keys())]
        if there.get(name, ...) != now.get(name, ...)
    ]
    if differing:
        raise ValueError(
            f"the run in {folder} has another configuration:\n"
            + "\n".join(differing)
            + "\nResume it with its own, or start a run of another `--name`."
        )


def _flat(config: Row, prefix: str = "") -> Row:
    """Nested fields under dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _plain(value: Any) -> Any:
    """Turns arrays into numbers; NaN and infinities, which JSON lacks, into None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int | None):
        return value
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number

"""A run folder: its configuration, its metrics, and nothing ever overwritten.

Several processes share a folder that all see: each reads it, the first alone writes.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sparsejax.training._files import write_atomic
from sparsejax.training._processes import is_first, wait_for_all

Row = dict[str, Any]

_MAX_CONFIG_BYTES = 2**24  # a larger file is none of ours: it is not read


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
        """Appends a row to the metrics; returns it as written, arrays as numbers.

        Raises:
          OSError: it cannot be written, as on a full disk; the message names the file.
        """
        row = _plain(row)
        if is_first():
            try:
                with open(self.metrics_file, "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise OSError(
                    f"cannot write to {self.metrics_file}: {error.strerror}. What the "
                    "checkpoints hold is safe. Make room or mend the disk, then resume."
                ) from error
        return row

    def rows(self) -> list[Row]:
        """Reads the metrics; a last line cut off by a crash is left out.

        Raises:
          ValueError: another line is no row; the message names the file and the line.
        """
        if not self.metrics_file.exists():
            return []
        rows = []
        with open(self.metrics_file, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    rows.append(_parse_row(line, f"line {number} of {file.name}"))
        return rows

    def rewind(self, phase: str, step: int) -> None:
        """Drops the rows of `phase` after `step`: training goes on from there."""
        if not is_first():
            return
        rows = self.rows()
        kept = [row for row in rows if row["phase"] != phase or row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept).encode()
        if self.metrics_file.exists() and self.metrics_file.read_bytes() != text:
            write_atomic(self.metrics_file, text)


def open_run(folder: str | Path, config: Mapping[str, Any], *, resume: bool) -> Run:
    """Starts the run `folder`, or goes on with it.

    Args:
      folder: created if it does not exist.
      config: everything that determines the result, as JSON can hold it. It is stored
        in the folder, next to the versions it first ran on.
      resume: go on with the run in `folder`; one that is not there yet is started, so
        that a supervisor can give the same command again and again.

    Raises:
      TypeError: JSON cannot hold `config`, naming the field.
      ValueError: `folder` holds a run and `resume` is False, or a run of another
        configuration, or a config.json that is not ours. Nothing is written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     run = open_run(folder, {"learning_rate": 0.1}, resume=False)
      ...     _ = run.log({"phase": "dense", "step": 1, "loss": jnp.float32(0.5)})
      ...     open_run(folder, {"learning_rate": 0.1}, resume=True).rows()
      [{'phase': 'dense', 'step': 1, 'loss': 0.5}]
    """
    folder = Path(folder)
    file = folder / "config.json"
    wanted = _as_json(config)
    if file.exists():
        if not resume:
            raise ValueError(
                f"{folder} already holds a run. Go on with it by `resume=True`, or "
                "choose another `folder`."
            )
        _require_equal(_read_config(file), wanted, folder)
        wait_for_all("open_run: read")
        return Run(folder)
    if folder.exists() and any(p.suffix != ".partial" for p in folder.iterdir()):
        raise ValueError(
            f"{folder} is neither empty nor a run: it has no config.json. Choose "
            "another `folder`."
        )
    wait_for_all("open_run: read")  # before there is a file that others could find
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
        content = {"config": wanted, "environment": environment}
        write_atomic(file, json.dumps(content, indent=2) + "\n")
    wait_for_all("open_run: written")
    return Run(folder)


def _as_json(config: Mapping[str, Any]) -> Row:
    """The configuration as it is read again: of tuples JSON makes lists."""
    config = dict(config)
    try:
        return json.loads(json.dumps(config))
    except TypeError:
        for name, value in _flat(config).items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise TypeError(
                    f"`config` must be what JSON can hold; got {name!r} of type "
                    f"{type(value).__name__}: {error}. Pass `float(...)` or `int(...)` "
                    "of a number, `str(...)` of anything else."
                ) from error
        raise  # a name is what JSON cannot hold


def _read_config(file: Path) -> Row:
    try:
        if (size := file.stat().st_size) > _MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
            raise ValueError('it must be an object that holds an object "config"')
        _flat(content["config"])
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not the configuration of a run: {error}. Choose another "
            "`folder`."
        ) from error
    return content["config"]


def _parse_row(line: bytes, place: str) -> Row:
    """A line of metrics; JSON has no code to run."""
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            if isinstance(row.get("phase"), str):
                return row
        raise ValueError('a row is an object with a text "phase" and a count "step"')
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} is not a row of metrics: {error}. Remove that line, or start a "
            "run in another folder."
        ) from error


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
            + "\nResume it with its own, or start a run in another `folder`."
        )


def _flat(config: Row, prefix: str = "") -> Row:
    """Nested fields under dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _plain(value: Any) -> Any:
    """Turns arrays into numbers; NaN and infinities, which JSON lacks, into None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int | None):
        return value
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number

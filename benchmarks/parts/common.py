"""What every benchmark shares: arguments, timing, the environment, tables and JSON."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj

# of each platform, as an operation's `implementation`
KERNELS = {"gpu": "mosaic_gpu", "tpu": "pallas_tpu"}

Row = Mapping[str, Any]  # column name, with its unit, -> value


def parse_args(
    doc: str | None,
    *,
    repeats: int = 30,
    quick_repeats: int = 3,
    argv: Sequence[str] | None = None,
    parser: argparse.ArgumentParser | None = None,
) -> argparse.Namespace:
    """Reads the options that every benchmark has, and those of its own.

    Args:
      doc: the script's docstring; its first line is the question.
      repeats: default of `--repeats`: timed samples of a case, or seeds of a study.
      quick_repeats: that default under `--quick`.
      argv: the arguments; None for those of the process.
      parser: with options of its own, to which the others are added.

    Returns:
      `quick` (bool), `repeats` (int), `json` (a path, or None), and its own.
    """
    question = (doc or "").strip().split("\n")[0]
    parser = parser or argparse.ArgumentParser()
    parser.description = question
    parser.add_argument("--quick", action="store_true", help="few, tiny cases, for CI")
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed samples of each case, or seeds of a study (default: "
        f"{repeats}; {quick_repeats} with --quick)",
    )
    add_json_option(parser)
    args = parser.parse_args(argv)
    if args.repeats is None:
        args.repeats = quick_repeats if args.quick else repeats
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {args.repeats}")
    print(question, flush=True)
    return args


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """`--json PATH`, whose folder must be there before hours of work."""

    def path_in_a_folder(text: str) -> pathlib.Path:
        path = pathlib.Path(text)
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
        return path

    parser.add_argument(
        "--json", type=path_in_a_folder, metavar="PATH", help="write the rows here too"
    )


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """The norm of the difference over that of `want`, 1 in place of 0."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    norm = jnp.linalg.norm(want)
    return float(jnp.linalg.norm(got - want) / jnp.where(norm > 0, norm, 1))


def compare_with_torch(
    doc: str | None,
    cases: Sequence[Any],
    run: Callable[[Any, int], Row],
    notes: Sequence[str],
    argv: Sequence[str] | None,
) -> None:
    """The main function of a comparison with `transformers`, in full precision.

    Args:
      doc: as in `parse_args`.
      cases: all of them; the first alone under `--quick`.
      run: takes a case and a seed and gives a row.
      notes: on the rows.
      argv: as in `parse_args`.
    """
    args = parse_args(doc, repeats=3, quick_repeats=1, argv=argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    chosen = cases[:1] if args.quick else cases
    rows = [run(case, seed) for case in chosen for seed in range(args.repeats)]
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}."
    notes = [*notes, versions]
    print_table(rows, notes)
    write_json(args.json, environment(repeats=args.repeats), rows, notes)


def mean_and_error(values: Any) -> tuple[float, float]:
    """The mean over seeds and its standard error (NaN for a single seed)."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))


def environment(**settings: Any) -> dict[str, Any]:
    """Where numbers were measured: versions, device, date; and `settings` as given."""
    names = ("jax", "jaxlib", "optax", "flax", "numpy")
    device = jax.devices()[0]
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {"sparsejax": sj.__version__}
        | {name: found for name in names if (found := _version(name))},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "host": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        **settings,
    }


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; a column for every key, in order of appearance.

    A column `x_se` is shown beside `x`, as its error.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    errors = {key: f"{key}_se" for key in keys if f"{key}_se" in keys}
    columns = [key for key in keys if key not in errors.values()]
    cells = [
        columns,
        *(
            [_cell(row.get(key), row.get(errors.get(key))) for key in columns]
            for row in rows
        ),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [
        any(isinstance(row.get(key), int | float) for row in rows) for key in columns
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def print_table(rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """Prints the rows as aligned text, and the notes below."""
    print(format_table(rows))
    for note in notes:
        print(f"- {note}")


def write_json(
    path: str | os.PathLike[str] | None,
    env: Mapping[str, Any],
    rows: Sequence[Row],
    notes: Sequence[str] = (),
) -> None:
    """Writes `env`, `notes` and `rows`; nothing if `path` is None.

    One row a line, so that a new result gives a readable diff. A number that is not
    finite becomes null, as JSON has no other word for it.
    """
    if path is None:
        return
    lines = ",\n".join(f"  {_dumps(row)}" for row in rows)
    parts = (
        f'"env": {_dumps(env, indent=1)}',
        f'"notes": {_dumps(list(notes), indent=1)}',
        f'"rows": [\n{lines}\n]',
    )
    pathlib.Path(path).write_text("{\n" + ",\n".join(parts) + "\n}\n")


def read_rows(
    path: pathlib.Path | None, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows that `write_json` wrote; none without a file.

    Raises:
      ValueError: if they were made with other settings: parts of its `env`.
    """
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(dict(settings))).items():
        if found["env"].get(name) != value:
            raise ValueError(
                f"the rows in {path} must have been made with {name}={value}; got "
                f"{found['env'].get(name)}. Give the same options, or another file."
            )
    return found["rows"]


def read_back(
    parser: argparse.ArgumentParser,
    path: pathlib.Path | None,
    env: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The rows of a run that was cut off, for `--resume`, if it was as this one."""
    if path is None:
        parser.error("--resume needs --json")
    names = sorted(env.keys() - {"date", "host"})
    try:
        return read_rows(path, {name: env[name] for name in names})
    except ValueError as error:
        parser.error(f"--resume: {error}")


def report(
    path: str | os.PathLike[str] | None,
    env: Mapping[str, Any],
    rows: Iterable[Row],
    notes: Sequence[str] = (),
) -> None:
    """Prints and writes each row as it is measured, so that a stopped run keeps them.

    At the end all rows are printed once more, as one table with the notes.
    """
    found = []
    for row in rows:
        found.append(row)
        print_table([row])
        write_json(path, env, found, notes)
    print_table(found, notes)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # flax is not needed here
        return None


def _cell(value: Any, error: Any = None) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if error is None else f"{text} ± {error:.1g}"


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """Python values that JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

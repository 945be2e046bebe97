"""The command line that the studies share: options, the ledger, what is told."""

import argparse
import importlib.util
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.parts import common, lm_study
from benchmarks.parts.lm_report import Row


def make_parser() -> argparse.ArgumentParser:
    """What `common.parse_args` adds to; a study may add options of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no run that would end later; call again to go on",
    )
    return parser


def open_ledger(
    parser: argparse.ArgumentParser,
    path: pathlib.Path | None,
    settings: Mapping[str, Any],
    minutes: float,
) -> lm_study.Ledger:
    """As `lm_study.Ledger`; exits if the file is of other settings."""
    try:
        return lm_study.Ledger(path, settings, minutes=minutes)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def run_and_tell(
    ledger: lm_study.Ledger,
    runs: Callable[[], None],
    *,
    table: Callable[[Sequence[Row]], list[dict[str, Any]]],
    conclusions: Callable[[Sequence[Row]], list[str]],
    draw: Callable[[pathlib.Path, Sequence[Row]], None],
) -> None:
    """Does the runs that there is time for, and says what all so far come to.

    Args:
      ledger: of the runs.
      runs: does them, or raises `lm_study.OutOfTime`.
      table: from the rows to the lines that are printed.
      conclusions: from the rows to the notes below.
      draw: (file, lines); left out without a file or without matplotlib.
    """
    try:
        runs()
        complete, state = True, "all runs are done"
    except lm_study.OutOfTime:
        complete, state = False, "stopped for time: call again to go on"
    lines, notes = table(ledger.rows), conclusions(ledger.rows)
    ledger.write(notes, complete=complete)
    common.print_table(lines, notes)
    if ledger.path and importlib.util.find_spec("matplotlib"):
        draw(ledger.path.with_suffix(".png"), lines)
    print(f"{len(ledger.rows)} runs: {state}")

"""What RESULTS.md says is what the files of its runs hold."""

import json
import pathlib
import re

import pytest

from benchmarks import spark_quality
from benchmarks.parts import common

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "RESULTS.md").read_text()


def table_below(first_cell: str) -> dict[str, dict[str, str]]:
    """The cells of the table whose head begins so, by row and column."""
    head, _, *lines = re.search(
        rf"^\| {re.escape(first_cell)} \|.*?(?=\n\n)", PAGE, re.DOTALL | re.MULTILINE
    )[0].splitlines()
    _, *columns = cells(head)
    rows = [cells(line) for line in lines]
    return {name: dict(zip(columns, found, strict=True)) for name, *found in rows}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def seeds(file: str, column: str = "loss") -> dict[str, list[float]]:
    """That column of the runs judged on `test`, by method."""
    found = {}
    for row in json.loads((ROOT / "benchmarks/results" / file).read_text())["rows"]:
        if row["judged_on"] == "test":
            found.setdefault(row["method"], []).append(row[column])
    return found


def losses(file: str, column: str = "loss") -> dict[str, str]:
    """Mean and standard error over the seeds, if there are several."""
    return {
        name: "{:.3f} ± {:.3f}".format(*common.mean_and_error(of_seeds))
        if len(of_seeds) > 1
        else f"{of_seeds[0]:.3f}"
        for name, of_seeds in seeds(file, column).items()
    }


@pytest.mark.parametrize(
    ("file", "first_cell"),
    [
        ("smollm2_cast_h200.json", "method"),
        ("smollm2_cast_longer_h200.json", "method, 2400 steps"),
    ],
)
def test_cast_on_smollm2(file, first_cell):
    table = table_below(first_cell)
    columns = {"before the prune": "loss_before", "after it": "loss_after"}
    for head, column in columns.items():
        found = losses(file, column)
        assert {name: cells[head] for name, cells in table.items()} == found
    for name, of_seeds in seeds(file, "ms_step").items():
        assert table[name]["seeds"] == str(len(of_seeds)), name
        assert table[name]["ms a step"] in (f"{of_seeds[0]:.1f}", ""), name


@pytest.mark.parametrize(
    ("file", "before", "dense"),
    [
        ("high_sparsity_digits_h200.json", "", "network"),
        ("high_sparsity_text_h200.json", "text, ", "decoder"),
    ],
)
def test_high_sparsity(file, before, dense):
    found = losses(file)
    assert f"{dense} has {found['dense']}" in PAGE.replace("\n", " ")
    for suffix, head in (
        ("", "equal steps"),
        (" at SR-STE's FLOPs", "SR-STE's training FLOPs"),
    ):
        for way, of_way in table_below(before + head).items():
            of_way.pop("steps", None)
            for pattern, cell in of_way.items():
                assert cell == found[f"{pattern} {way}{suffix}"], (way, pattern)


def test_spark_quality():
    file = "spark_quality_h200.json"
    table = table_below("model")
    assert {name: cells["loss"] for name, cells in table.items()} == losses(file)
    rows = json.loads((ROOT / "benchmarks/results" / file).read_text())["rows"]
    for line in spark_quality.table(rows):
        cells = table[line["method"]]
        share = 100 * line["used"]
        used = f"{share:.0f} %" if share > 50 else f"{share:.1f} %"
        assert cells["neurons used"] == used
        assert cells["keys used"] == f"{line['keys']:.0f}"
        if "times_fewer_flops" in line:
            by, error = line["to_dense_percent"], line["to_dense_percent_se"]
            assert cells["to dense"] == f"{by:+.1f} ± {error:.1f} %"
            assert cells["fewer FLOPs"] == f"{line['times_fewer_flops']:.2f}x"


@pytest.mark.parametrize(
    ("file", "first_cell", "columns"),
    [
        ("time_to_loss_h200.json", "in 60 s", {}),
        ("time_to_loss_longer_h200.json", "in 480 s", {}),
        (
            "long_context_training_h200.json",
            "at 32768 bytes, in 60 s",
            {"density": ("density", "{:.2f}")},
        ),
    ],
)
def test_races(file, first_cell, columns):
    table, found = table_below(first_cell), losses(file)
    assert {name: cells["loss"] for name, cells in table.items()} == found
    columns = columns | {
        "ms a step": ("ms_step", "{:.1f}"),
        "steps": ("steps", "{}"),
        "learning rate": ("lr", "{:.0e}"),
    }
    for head, (column, style) in columns.items():
        of_methods = seeds(file, column)
        for name, cells in table.items():
            told = style.format(of_methods[name][0]).replace("e-0", "e-")
            assert cells[head] == told, (name, head)
            assert cells.get("seeds", "1") == str(len(of_methods[name])), name

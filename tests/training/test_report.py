"""Tables line up, and a picture is drawn whatever the run has measured."""

import math

import numpy as np
import pytest

from sparsejax import training

pytestmark = pytest.mark.once


def test_table_lines_up():
    rows = [
        {"model": "dense", "steps": 1000, "loss": 1.23456},
        {"model": "a longer name", "steps": 2, "loss": math.inf},
        {"model": "none", "steps": 3, "loss": None},
    ]
    assert training.markdown_table(rows).split("\n") == [
        "| model         | steps |   loss |",
        "|---------------|------:|-------:|",
        "| dense         | 1,000 | 1.2346 |",
        "| a longer name |     2 |    inf |",
        "| none          |     3 |      - |",
    ]
    assert training.markdown_table([]) == ""


def test_table_tells_yes_from_one():
    table = training.markdown_table([{"passed": True, "runs": 1}])
    assert table.split("\n")[-1] == "|   True |    1 |"


def training_rows(phase, steps, **leaf_metrics):
    for step in steps:
        yield {
            "phase": phase,
            "step": step,
            "bits_per_byte": 8 / (step + 1),
            "mask_changes": step % 3,
        }
        if step % 5 == 0:
            yield {"phase": phase, "step": step, "validation_bits_per_byte": 3.0} | {
                name: {"a": value, "b": value} for name, value in leaf_metrics.items()
            }


@pytest.mark.parametrize(
    "rows",
    [
        [{"phase": "dense", "step": 0, "bits_per_byte": None}],
        [*training_rows("dense", range(3))],
        [
            *training_rows("dense", range(200), leaf_sparsity=0.0),
            *training_rows(
                "cast", range(200, 230), leaf_sparsity=0.5, leaf_pruned_magnitude=0.1
            ),
        ],
    ],
    ids=["empty", "short", "full"],
)
@pytest.mark.parametrize("with_mask", [False, True])
def test_picture_is_drawn(tmp_path, rows, with_mask):
    path = tmp_path / "report.png"
    mask = np.arange(300 * 20).reshape(300, 20) % 2 == 0 if with_mask else None
    training.draw_report(path, rows, title="test", mask=mask, mask_name="kernel")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000

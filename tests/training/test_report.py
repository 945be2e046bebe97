"""Tables line up, and a picture is drawn whatever the run has measured."""

import math

import jax.numpy as jnp
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


def test_mask_metrics_count_by_leaf():
    masks = {
        "a": {"kernel": jnp.array([[True, False], [True, True]]), "bias": None},
        "b": {"kernel": jnp.array([[False, False]])},
    }
    weights = {
        "a": {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]]), "bias": jnp.ones(2)},
        "b": {"kernel": jnp.zeros((1, 2))},
    }
    assert float(training.mask_sparsity(masks)) == 0.5
    assert float(training.mask_sparsity({})) == 0.0
    metrics = training.leaf_metrics(masks, weights)
    assert metrics["leaf_sparsity"] == {"a.kernel": 0.25, "b.kernel": 1.0}
    pruned = metrics["leaf_pruned_magnitude"]
    assert pruned == {"a.kernel": pytest.approx(0.2), "b.kernel": 0.0}
    empty = training.leaf_metrics({}, weights)
    assert empty == {"leaf_sparsity": {}, "leaf_pruned_magnitude": {}}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_mask_metrics_of_narrow_weights(dtype):
    """2**16 is beyond float16, and bfloat16 has steps of 512 there."""
    weights = {"kernel": jnp.full(2**16, 1, dtype)}
    masks = {"kernel": jnp.arange(2**16) >= 12345}
    pruned = training.leaf_metrics(masks, weights)["leaf_pruned_magnitude"]
    assert pruned == {"kernel": pytest.approx(12345 / 2**16)}

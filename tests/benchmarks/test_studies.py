"""Every study runs in its quick form, and writes what it prints."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import (
    attention_training,
    block_training,
    cast_toy,
    dynamic_sparsity,
    keep_highest,
    progressive_gradient_flow,
    selection_cost,
    sparse_frontier,
)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.usefixtures("compile_fast")
@pytest.mark.parametrize(
    "study, columns, num_rows",
    [
        (attention_training, {"seq", "model", "speedup", "memory_gb"}, 2),
        (block_training, {"model", "speedup", "memory_gb", "ffn_ms"}, 4),
        (cast_toy, {"method", "l1_decay", "mse_after_prune_se"}, 24),
        (dynamic_sparsity, {"method", "allocation", "lr", "test_loss"}, 2),
        (keep_highest, {"rows", "fast_ms", "top_k_ms", "speedup"}, 3),
        (progressive_gradient_flow, {"method", "pattern", "test_acc_percent"}, 2),
        (selection_cost, {"method", "realised", "select_ms", "speedup"}, 3),
        (sparse_frontier, {"phase", "density", "mass", "worst", "select_ms"}, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_study_runs_in_its_quick_form(study, columns, num_rows, tmp_path, capsys):
    path = tmp_path / "study.json"
    study.main(["--quick", "--json", str(path)])
    printed = capsys.readouterr().out
    assert printed.startswith(study.__doc__.split("\n")[0])  # the question
    found = json.loads(path.read_text())
    assert len(found["rows"]) == num_rows
    assert columns <= found["rows"][0].keys()
    assert found["env"]["repeats"] == 2
    assert found["notes"] and all(note in printed for note in found["notes"])


def test_live_weights_lie_on_a_path_from_input_to_output():
    # unit 0 of the middle has no input, unit 1 no output, unit 2 both
    first = jnp.array([[False, True, True], [False, False, False]])
    last = jnp.array([[True], [False], [True]])
    found = dynamic_sparsity.live([first, last])
    assert [mask.sum().item() for mask in found] == [1, 1]
    assert found[0][0, 2] and found[1][2, 0]

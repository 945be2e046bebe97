"""A run folder goes on with its own configuration only and keeps its metrics once."""

import json
import math
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import training

CONFIG = {"seed": 0, "lr": 1e-3, "text": {"bytes": 10}}


def test_starts_then_refuses_then_resumes(tmp_path):
    folder = tmp_path / "runs" / "a"
    training.open_run(folder, CONFIG, resume=False)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"already.*`resume=True`, or.* `folder`"):
        training.open_run(folder, CONFIG, resume=False)
    training.open_run(folder, CONFIG, resume=True)
    assert (folder / "config.json").read_bytes() == before
    assert json.loads(before)["config"] == CONFIG


def test_resume_without_a_run_starts_it(tmp_path):
    training.open_run(tmp_path / "a", CONFIG, resume=True)
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert stored["config"] == CONFIG


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"seed": 0, "lr": jnp.float32(1)}, "'lr' of type ArrayImpl"),
        ({"model": {"widths": [1, np.int64(2)], "d": 1}}, r"'model\.widths' of type l"),
    ],
)
def test_a_configuration_that_json_cannot_hold_is_named(tmp_path, config, name):
    with pytest.raises(TypeError, match=rf"{name}.*Pass `float\(\.\.\.\)`"):
        training.open_run(tmp_path / "a", config, resume=False)
    assert not (tmp_path / "a").exists()


def test_another_configuration_is_refused_by_field(tmp_path):
    training.open_run(tmp_path, CONFIG, resume=False)
    before = (tmp_path / "config.json").read_bytes()
    other = {"seed": 1, "lr": 1e-3, "text": {"bytes": 11}, "new": "x"}
    with pytest.raises(ValueError, match="another configuration") as caught:
        training.open_run(tmp_path, other, resume=True)
    message = str(caught.value)
    assert "seed: 0 there, 1 now" in message
    assert "text.bytes: 10 there, 11 now" in message
    assert "new: 'absent' there, 'x' now" in message
    assert "lr" not in message
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(ValueError, match="neither empty nor a run"):
            training.open_run(tmp_path, CONFIG, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_crash_while_starting_is_no_obstacle(tmp_path):
    (tmp_path / "config.json.partial").write_text('{"conf')
    training.open_run(tmp_path, CONFIG, resume=False)
    assert json.loads((tmp_path / "config.json").read_text())["config"] == CONFIG


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"config": {"seed"',
        "[" * 100_000,
        "[1, 2]",
        '{"config": [0]}',
        '{"config": ' + '{"a": ' * 900 + "0" + "}" * 901,
        b"\xff\xfe\x00",
        "gASVCAAAAAAAAACMBHNhZmWULg==",
    ],
    ids=["empty", "cut", "deep", "list", "no object", "nested", "bytes", "text"],
)
def test_a_foreign_config_is_named(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"config\.json is not the conf|another"):
        training.open_run(tmp_path, CONFIG, resume=True)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_huge_config_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(ValueError, match=r"not the conf.* 1,099,511,627,776 bytes"):
        training.open_run(tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize(
    "line",
    ['{"phase": "a", "st', "3", "[]", "{}", '{"phase": 1, "step": 2}', "[" * 100_000],
    ids=["cut", "number", "list", "empty", "phase", "deep"],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    run = training.open_run(tmp_path, CONFIG, resume=False)
    run.log({"phase": "a", "step": 1})
    with open(run.metrics_file, "a") as file:
        file.write(line + "\n")
    before = run.metrics_file.read_bytes()
    for read in (run.rows, lambda: run.rewind("a", 0)):
        with pytest.raises(ValueError, match=r"line 2 of .*\.jsonl is not a row"):
            read()
    assert run.metrics_file.read_bytes() == before


def test_metrics_on_a_full_disk(tmp_path):
    run = training.open_run(tmp_path, CONFIG, resume=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        run.log({"phase": "a", "step": 1})
        with pytest.raises(OSError, match=r"cannot write to .*\.jsonl: File too"):
            run.log({"phase": "a", "step": 2, "loss": "x" * 64})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.rows() == [{"phase": "a", "step": 1}]
    run.rewind("a", 1)
    run.log({"phase": "a", "step": 2})
    assert [row["step"] for row in run.rows()] == [1, 2]


def test_metrics_are_numbers_and_rewind_by_phase(tmp_path):
    run = training.open_run(tmp_path, CONFIG, resume=False)
    assert run.rows() == []
    for phase in ("dense", "sparse"):
        for step in (1, 2, 3):
            run.log({"phase": phase, "step": step, "loss": jnp.float32(step / 2)})
    run.log({"phase": "sparse", "step": 3, "by_leaf": {"a": np.float64(1), "b": None}})
    run.log({"phase": "sparse", "step": 4, "loss": jnp.nan})
    assert run.rows()[0] == {"phase": "dense", "step": 1, "loss": 0.5}
    assert run.rows()[-1]["loss"] is None
    run.log({"phase": "sparse", "step": 4, "lists": [jnp.float32(1), (math.nan, 2)]})
    assert run.rows()[-1]["lists"] == [1, [None, 2]]
    with open(run.metrics_file, "a") as file:
        file.write('{"phase": "sparse", "st')  # a crash while writing
    run.rewind("sparse", 2)
    steps = [(row["phase"], row["step"]) for row in run.rows()]
    assert steps == [("dense", s) for s in (1, 2, 3)] + [("sparse", 1), ("sparse", 2)]
    run.log({"phase": "sparse", "step": 3})
    assert run.rows()[-1] == {"phase": "sparse", "step": 3}


def test_atomic_write_replaces_as_a_whole(tmp_path):
    path = tmp_path / "file"
    training.write_atomic(path, "one")
    training.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

"""Arguments, timing, tables and JSON of the benchmarks."""

import argparse
import functools
import json
import math
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import high_sparsity, sparse_frontier
from benchmarks.parts import common, lm_command, timing


def test_arguments_have_defaults_for_both_forms():
    args = common.parse_args("Is it fast?\n\nMore.", repeats=7, argv=[])
    assert (args.quick, args.repeats, args.json) == (False, 7, None)
    args = common.parse_args("Is it fast?", quick_repeats=2, argv=["--quick"])
    assert (args.quick, args.repeats) == (True, 2)
    args = common.parse_args("Is it fast?", argv=["--quick", "--repeats", "5"])
    assert args.repeats == 5


def test_a_study_tells_its_own_options_beside_those_of_all(capsys):
    parser = lm_command.make_parser()
    args = common.parse_args("Is it?", argv=["--minutes", "9"], parser=parser)
    assert (args.minutes, args.quick) == (9.0, False)
    for main, own in (
        (high_sparsity.main, ("--task", "--digits")),
        (sparse_frontier.main, ("--length",)),
    ):
        with pytest.raises(SystemExit):
            main(["--help"])
        told = capsys.readouterr().out
        assert all(option in told for option in (*own, "--json", "--quick"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--repeats", "0"], "at least 1; got 0"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_bad_arguments_stop_before_anything_runs(argv, message, capsys):
    with pytest.raises(SystemExit):
        common.parse_args("Is it fast?", argv=argv)
    assert message in capsys.readouterr().err


def test_time_is_that_of_one_call():
    median, spread = timing.time_ms(lambda: time.sleep(0.005), repeats=3)
    assert 5 <= median < 50  # a busy machine sleeps longer
    assert spread >= 0
    fast, _ = timing.time_ms(jax.jit(lambda x: x + 1), jnp.ones(8), repeats=3)
    assert 0 < fast < 5


def test_mean_and_error_by_hand():
    mean, error = common.mean_and_error(jnp.array([1.0, 2.0, 3.0]))
    assert mean == 2
    assert error == pytest.approx(1 / math.sqrt(3))
    mean, error = common.mean_and_error([4.0])
    assert mean == 4 and math.isnan(error)


def test_environment_names_device_and_versions():
    env = common.environment(repeats=4)
    assert env["versions"]["jax"] == jax.__version__
    assert env["platform"] == jax.default_backend()
    assert env["repeats"] == 4
    assert env["host"] == f"{platform.system()} {platform.machine()}"  # no kernel
    assert {"date", "python", "device_kind", "cpu_count"} <= set(env)


def test_table_aligns_and_marks_what_is_missing():
    rows = [{"method": "dense", "ms": 1.23456}, {"method": "rigl", "note": "slow"}]
    assert common.format_table(rows).split("\n") == [
        "method     ms  note",
        "dense   1.235  -",
        "rigl        -  slow",
    ]


def test_table_shows_errors_beside_their_means():
    rows = [{"acc": 0.75, "acc_se": 0.01234}, {"acc": 1, "acc_se": 0.0}]
    assert common.format_table(rows).split("\n") == [
        "        acc",
        "0.75 ± 0.01",
        "      1 ± 0",
    ]


def test_json_is_strict_and_nothing_without_a_path(tmp_path):
    path = tmp_path / "x.json"
    rows = [{"a": np.float32(0.5), "b": math.nan}, {"a": 1, "b": "x"}]
    common.write_json(path, common.environment(), rows, notes=["it holds"])

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found["rows"] == [{"a": 0.5, "b": None}, {"a": 1, "b": "x"}]
    assert found["notes"] == ["it holds"]
    assert found["env"]["versions"]["jax"] == jax.__version__
    common.write_json(None, {}, rows)


def test_variants_agree_before_they_are_timed(capsys):
    def refuse(x):
        raise ValueError("no room")

    ways = {"twice": lambda x: 2 * x, "sum": lambda x: x + x, "refused": refuse}
    fns = {name: jax.jit(fn) for name, fn in ways.items()}
    arguments = {size: (size * jnp.ones(4),) for size in (1, 3)}
    times = timing.time_variants(fns, arguments, repeats=1, tolerance=1e-6)
    assert {label: list(found) for label, found in times.items()} == {
        1: ["twice", "sum"],
        3: ["twice", "sum"],
    }
    assert "refused: left out: no room" in capsys.readouterr().out
    fns["thrice"] = jax.jit(lambda x: 3 * x)
    with pytest.raises(AssertionError, match="thrice"):
        timing.time_variants(fns, arguments, repeats=1, tolerance=1e-6)


def test_one_program_for_each():
    call = timing.for_each(lambda x, y, scale: scale * (x + y))
    got = call([(1.0, 2.0), (3.0, 4.0)], 10.0)
    assert list(map(float, got)) == [30.0, 70.0]
    assert list(map(float, timing.for_each(jnp.negative)([1.0, 2.0]))) == [-1.0, -2.0]


def test_rows_of_another_run_are_not_kept(tmp_path, capsys):
    path, parser = tmp_path / "rows.json", argparse.ArgumentParser()
    assert common.read_back(parser, path, {}) == []
    path.write_text(json.dumps({"env": {"length": 64}, "rows": [1]}))
    read_back = functools.partial(common.read_back, parser, path)
    assert read_back({"length": 64, "date": "today"}) == [1]
    for again in (
        functools.partial(read_back, {"length": 128}),
        lambda: common.read_back(parser, None, {}),
    ):
        with pytest.raises(SystemExit):
            again()
    printed = capsys.readouterr().err
    assert "made with length=128; got 64" in printed
    assert "--resume needs --json" in printed

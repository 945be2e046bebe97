"""Kernels for TPU compile where libtpu is; where not, it is said how to get it."""

import importlib.metadata
import importlib.util
import json

import jax
import pytest

from benchmarks import compiled_tpu
from benchmarks.parts import tpu_compile

pytestmark = pytest.mark.once

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def without_libtpu(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_found)


def test_without_libtpu_it_is_said_how_to_get_it(monkeypatch, capsys):
    without_libtpu(monkeypatch)
    assert compiled_tpu.main(["--quick"]) == 1
    assert f'pip install "jax[tpu]=={jax.__version__}"' in capsys.readouterr().err


def test_all_cases_are_named_apart():
    names = [(case.operation, case.case) for case in compiled_tpu.cases()]
    assert len(set(names)) == len(names)


@needs_libtpu
def test_quick(tmp_path, capsys):
    path = tmp_path / "compiled.json"
    assert compiled_tpu.main(["--quick", "--json", str(path)]) == 0
    whole = json.loads(path.read_text())
    assert [row["ok"] for row in whole["rows"]] == [True]
    assert whole["env"]["libtpu"] and whole["notes"][0] in capsys.readouterr().out


@needs_libtpu
def test_what_does_not_compile_is_a_row(monkeypatch):
    tpu_compile.find_libtpu()

    def fails(x):
        raise ValueError(f"first line\nand {x}")

    report = tpu_compile.compile_for("v5e", fails, [compiled_tpu.array(2)])
    assert report == tpu_compile.Report(False, error="first line")

"""Public names have docstrings, and every example in one gives what it says."""

import ast
import doctest
import importlib
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "sparsejax"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# What an example may use besides the names of its own module.
COMMON = {"sj": sj, "jax": jax, "jnp": jnp, "np": np, "optax": optax}


def module_names() -> list[str]:
    paths = [p.relative_to(PACKAGE.parent) for p in sorted(PACKAGE.rglob("*.py"))]
    names = [".".join(p.with_suffix("").parts) for p in paths]
    return [name.removesuffix(".__init__") for name in names]


def failures(module) -> str:
    """Runs the examples of one module; returns the report, empty if all hold."""
    report = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        test.globs = COMMON | test.globs
        runner.run(test, out=report.append)
    return "".join(report)


@pytest.mark.once
@pytest.mark.parametrize("name", module_names())
def test_examples_run(name):
    report = failures(importlib.import_module(name))
    assert not report, report


@pytest.mark.parametrize(
    "path",
    sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("__init__.py")),
)
def test_exported_names_have_docstrings(path):
    # By the source: a class has an inherited or a generated `__doc__` anyway.
    for node in ast.parse((PACKAGE / path).read_text()).body:
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        source = PACKAGE.parent.joinpath(*node.module.split(".")).with_suffix(".py")
        body = ast.parse(source.read_text()).body if source.is_file() else ()
        defined = {  # the last of a name: overloads stand before it
            item.name: item
            for item in body
            if isinstance(item, ast.FunctionDef | ast.ClassDef)
        }
        for name in {alias.name for alias in node.names} & defined.keys():
            assert ast.get_docstring(defined[name]), f"{name} in {node.module}"


def test_a_wrong_example_is_reported():
    module = types.ModuleType("wrong", ">>> 1 + 1\n3")
    assert "Got:\n    2" in failures(module)


def test_the_front_door_tells_of_every_name_behind_it():
    names = {
        alias.name
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert set(re.findall(r"`(?:sj\.)?(\w+)`", sj.__doc__ or "")) == names

"""Which room of sparsejax may import which, and how; read from the source by `ast`.

A room is a folder of sparsejax/, or a lone module such as typing.py. Its modules are
`_underscored.py`; its `__init__.py` re-exports what other rooms may use, and they write
`from sparsejax import masks` or `from sparsejax.masks import topk_mask`. Likewise the
packages of `ops`, and their neighbours in the room.
"""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from absl.testing import parameterized

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparsejax"
MAX_LINES = 400

WEIGHT_ROOMS = {"patterns", "scores", "allocation", "schedules", "masks", "transforms"}
NN_MAY = {
    "typing",
    "patterns",
    "masks",
    "formats",
    "ops",
    "activations",
    "attention",
}
MAY_IMPORT: dict[str, set[str]] = {
    "typing": set(),
    "patterns": {"typing"},
    "scores": {"typing"},
    "allocation": {"typing", "patterns"},
    "schedules": {"typing"},
    "masks": {"typing", "patterns"},
    "transforms": {"typing"} | WEIGHT_ROOMS,
    "penalties": {"typing", "patterns"},
    "oneshot": {"typing"} | WEIGHT_ROOMS,
    "formats": {"typing", "patterns"},
    "ops": {"typing", "patterns", "formats"},
    "activations": {"typing", "scores", "ops"},
    "attention": {"typing", "formats", "activations", "ops"},
    "metrics": {"typing", "formats"} | WEIGHT_ROOMS,
    "nn": NN_MAY,
    "models": {"nn"} | NN_MAY,
    "decode": {"models", "nn"} | NN_MAY,
}
ROOMS = {*MAY_IMPORT, "training"}
MAY_IMPORT["training"] = ROOMS
MAY_IMPORT["__init__"] = ROOMS  # the front door
# Lone modules that every room may import: each is about one thing that is no room's.
FOR_ALL = {
    "_bits",
    "_blocks",
    "_compat",
    "_devices",
    "_extras",
    "_governed",
    "_indexing",
    "_ints",
    "_jaxpr",
    "_lengths",
    "_names",
    "_order",
    "_pairs",
    "_promotion",
    "_reshape",
    "_safetensors",
    "_straight_through",
    "_tokens",
}
MAY_IMPORT |= {name: {"typing"} for name in FOR_ALL}

# Third-party packages that only some rooms may import.
ONLY_IN = {
    "optax": {"transforms", "oneshot", "training"},
    "pallas": {"ops"},
    "flax": {"nn", "models", "decode", "training"},
}
IMPORT_NAMES = {"orbax-checkpoint": "orbax"}  # where it is not the distribution's name


def declared_dependencies() -> tuple[set[str], set[str]]:
    """The import names that pyproject.toml declares: always there, and extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def import_names(requirements):
        names = {re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in requirements}
        return {IMPORT_NAMES.get(name, name) for name in names} - {"sparsejax"}

    shown = [
        requirement
        for name in ("metrics", "examples", "models", "torch")
        for requirement in extras[name]
    ]
    return import_names(project["dependencies"]), import_names(shown)


RUNTIME, EXTRAS = declared_dependencies()


def room_of(path: str) -> str:
    """`path` is relative to sparsejax/: "masks/_topk.py" -> masks, "typing.py"."""
    return pathlib.PurePosixPath(path).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> list[str]:
    """The dotted names that an import statement imports, aliases aside."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def check_own(path: str, name: str) -> str | None:
    """What is wrong with importing `name`, which starts with sparsejax; or None."""
    room, (_, *parts) = room_of(path), name.split(".")
    if not parts or parts[0] not in MAY_IMPORT:
        if room == "training":
            return None
        return f"imports {name}: neither a room nor a name of a room"
    other = parts[0]
    if other in FOR_ALL:
        return None
    if other == room:
        return check_package(path, name)
    if other not in MAY_IMPORT[room]:
        return f"imports {name}: {room} may not import {other}"
    if len(parts) > 2 or any(part.startswith("_") for part in parts):
        return f"imports {name}: import the room sparsejax.{other} or a name of it"
    return None


def check_package(path: str, name: str) -> str | None:
    """What is wrong with importing `name` from the room of `path`; or None."""
    _, room, *parts = name.split(".")
    if len(parts) < 2 or parts[0].startswith("_"):
        return None  # of the room itself
    at_home = pathlib.PurePosixPath(path).parts[:2] == (room, parts[0])
    if at_home or not any(part.startswith("_") for part in parts):
        return None
    return (
        f"imports {name}: private to {room}.{parts[0]}; share it in a module of {room}"
    )


def check_third_party(room: str, name: str, at_top: bool) -> str | None:
    """What is wrong with importing `name` from another package; or None."""
    package = name.split(".")[0]
    for what, rooms in ONLY_IN.items():
        if what in name.split(".") and room not in rooms:
            return f"imports {name}: only {', '.join(sorted(rooms))} may import {what}"
    if package in sys.stdlib_module_names or package in RUNTIME:
        return None
    if package not in EXTRAS:
        return f"imports {name}: {package} is not declared in pyproject.toml"
    if at_top:
        return f"imports {name} at the top, but it is an extra; import it in the call"
    return None


def violations(path: str, source: str) -> list[str]:
    """Every breach of the rules in the module `path`, relative to sparsejax/."""
    room = room_of(path)
    if room not in MAY_IMPORT:
        return [f"{path}: `{room}` is no room; add it to MAY_IMPORT"]
    tree = ast.parse(source)
    in_functions = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        problems = []
        if isinstance(node, ast.ImportFrom) and node.level:
            problems = ["a relative import; write it from sparsejax"]
        elif names := imported(node):
            for name in names:
                if name.split(".")[0] == "sparsejax":
                    problems.append(check_own(path, name))
                else:
                    at_top = node not in in_functions
                    problems.append(check_third_party(room, name, at_top))
        elif isinstance(node, ast.Call) and room != "__init__":
            called = getattr(node.func, "id", getattr(node.func, "attr", None))
            if called in ("import_module", "__import__"):
                problems = [f"calls {called}; only the front door does"]
        found += [f"{path}:{node.lineno}: {p}" for p in problems if p]
    if source.count("\n") > MAX_LINES:
        found.append(f"{path}: more than {MAX_LINES} lines; split it")
    parts = pathlib.PurePosixPath(path).parts
    if parts[-1] == "__init__.py" and len(parts) > 1:
        found += init_violations(path, tree)
    return found


def init_violations(path: str, tree: ast.Module) -> list[str]:
    """A room's `__init__.py`: a docstring, and re-exports in the one form."""
    here = ".".join(["sparsejax", *pathlib.PurePosixPath(path).parts[:-1]])
    found = []
    if ast.get_docstring(tree) is None:
        found.append(f"{path}: says in a docstring what the room is for")
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if not isinstance(node, ast.ImportFrom):
            found.append(f"{path}:{node.lineno}: an __init__ holds only re-exports")
            continue
        for alias in node.names:
            # A whole module, such as transforms.weight_scaling, comes from the room.
            whole = node.module == here
            module = node.module or ""
            lone = module.removeprefix("sparsejax.") in FOR_ALL
            inside = lone or module.startswith(here + ".")
            want = alias.name.lstrip("_") if whole else alias.name
            if alias.asname != want or not (whole or inside):
                found.append(
                    f"{path}:{node.lineno}: write `from {here}._module import "
                    f"{alias.name} as {want}`"
                )
    return found


def package_files() -> list[str]:
    return sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", package_files())
def test_module_keeps_the_rules(path):
    found = violations(path, (PACKAGE / path).read_text())
    assert not found, "\n".join(found)


def test_parts_of_benchmarks_import_no_script():
    for path in (ROOT / "benchmarks/parts").glob("*.py"):
        source = path.read_text()
        assert "__main__" not in source, f"{path.name}: a script stands above"
        for node in ast.walk(ast.parse(source)):
            for name in imported(node):
                package, *inside = name.split(".")
                assert package != "benchmarks" or inside[0] == "parts", (
                    f"{path.name}:{node.lineno}: imports {name}"
                )


def test_rooms_form_no_cycle():
    below: dict[str, set[str]] = {}

    def visit(room, above):
        assert room not in above, f"{room} imports itself through {above}"
        for other in MAY_IMPORT[room] - {room}:
            if other not in below:
                visit(other, [*above, room])
        below[room] = MAY_IMPORT[room]

    for room in MAY_IMPORT:
        visit(room, [])


def loaded_after(statement: str) -> list[str]:
    """Flax and pallas modules that a fresh process has after `statement`."""
    code = (
        f"{statement}\n"
        "import sys\n"
        "heavy = {'flax', 'pallas'}\n"
        "print(*(m for m in sys.modules if heavy & set(m.split('.'))))"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_loads_neither_flax_nor_pallas():
    assert loaded_after("import sparsejax") == []


def test_rooms_below_nn_load_neither_flax_nor_pallas():
    there = {room_of(path) for path in package_files()} - ONLY_IN["flax"] - {"__init__"}
    assert loaded_after(f"from sparsejax import {', '.join(sorted(there))}") == []


class CheckerTest(parameterized.TestCase):
    """The checker itself, on sources that break one rule each."""

    @parameterized.parameters(
        ("masks/_a.py", "from sparsejax import transforms", "may not import"),
        ("masks/_a.py", "from sparsejax.scores import magnitude", "may not import"),
        ("masks/_a.py", "import sparsejax.nn", "may not import"),
        ("masks/_a.py", "def f():\n  from sparsejax import nn", "may not import"),
        ("typing.py", "from sparsejax.patterns import NM", "may not import"),
        ("nn/_a.py", "from sparsejax.transforms import rigl", "may not import"),
        ("transforms/_a.py", "from sparsejax.masks._topk import x", "import the room"),
        ("transforms/_a.py", "from sparsejax.masks import _topk", "import the room"),
        ("transforms/_a.py", "import sparsejax.masks._topk", "import the room"),
        ("nn/_a.py", "from sparsejax.ops.block_matmul import x", "import the room"),
        ("__init__.py", "from sparsejax.masks._topk import x", "import the room"),
        ("ops/a/_b.py", "from sparsejax.ops.c._d import e", "private to ops.c"),
        ("ops/a/_b.py", "from sparsejax.ops.c import _d", "private to ops.c"),
        ("ops/a/_b.py", "import sparsejax.ops.c._d", "private to ops.c"),
        ("ops/_b.py", "def f():\n  from sparsejax.ops.c import _d", "private to ops.c"),
        ("masks/_a.py", "import sparsejax as sj", "neither a room"),
        ("masks/_a.py", "from sparsejax import nm_mask", "neither a room"),
        ("masks/_a.py", "from ._topk import topk_mask", "relative"),
        ("masks/_a.py", "from .. import patterns", "relative"),
        ("masks/_a.py", "import optax", "only oneshot, training, transforms"),
        ("ops/_a.py", "from flax import nnx", "may import flax"),
        ("nn/_a.py", "from jax.experimental import pallas as pl", "may import pallas"),
        ("nn/_a.py", "import jax.experimental.pallas.tpu", "may import pallas"),
        ("nn/_a.py", "import chex", "not declared"),
        ("models/_a.py", "import safetensors.numpy", "is an extra"),
        ("masks/_a.py", "import_module('sparsejax.nn')", "only the front door"),
        ("masks/_a.py", "x = 1\n" * 401, "more than 400 lines"),
        ("extras/_a.py", "", "is no room"),
        ("extras.py", "", "is no room"),
        ("masks/__init__.py", "from sparsejax.masks._topk import x as x", "docstring"),
        ("masks/__init__.py", "'''.'''\nfrom sparsejax.masks._a import x", "write"),
        ("masks/__init__.py", "'''.'''\nfrom sparsejax.masks._a import *", "write"),
        ("masks/__init__.py", "'''.'''\nfrom sparsejax.typing import x as x", "write"),
        ("masks/__init__.py", "'''.'''\nx = 1", "only re-exports"),
    )
    def test_catches(self, path, source, want):
        found = violations(path, source)
        self.assertLen(found, 1, found)
        self.assertIn(want, found[0])

    @parameterized.parameters(
        ("masks/_a.py", "from sparsejax import patterns, typing, _compat"),
        ("masks/_a.py", "from sparsejax._compat import x"),
        ("masks/_a.py", "from sparsejax.masks._topk import topk_mask"),
        ("masks/_a.py", "import functools\nimport jax.numpy as jnp\nimport numpy"),
        ("transforms/_a.py", "import optax\nfrom sparsejax.masks import topk_mask"),
        ("ops/block_matmul/_a.py", "from sparsejax.ops.block_matmul import _reference"),
        ("ops/a/_b.py", "from sparsejax.ops.c import c\nfrom sparsejax.ops import _d"),
        ("ops/a/_b.py", "from sparsejax.ops._d import e"),
        ("ops/block_matmul/_a.py", "from jax.experimental import pallas as pl"),
        ("models/_a.py", "def f():\n  import safetensors.numpy"),
        ("training/_a.py", "import flax\nimport optax\nimport sparsejax as sj"),
        ("training/_a.py", "import orbax.checkpoint as ocp"),
        ("__init__.py", "import importlib\nimportlib.import_module('sparsejax.nn')"),
        ("masks/__init__.py", "'''.'''\nfrom sparsejax.masks._topk import x as x"),
        ("masks/__init__.py", "'''.'''\nfrom sparsejax._compat import x as x"),
        (
            "transforms/__init__.py",
            "'''.'''\nfrom sparsejax.transforms import _weights as weights",
        ),
        ("masks/_a.py", "x = 1\n" * 400),
    )
    def test_lets_pass(self, path, source):
        self.assertEqual(violations(path, source), [])

"""What studies read: documents that come with installed packages, in three parts.

Each document is in one part alone, by a hash of its name: a tenth of them in `tune`, a
tenth in `test`.
"""

import hashlib
import importlib.util
import pathlib
import sysconfig
from collections.abc import Mapping

import numpy as np

PARTS = ("train", "tune", "test")
SKIPPED = {"ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests"}

Document = tuple[str, str]  # name, text


def installed(package: str, name: str) -> pathlib.Path:
    """The path of a package's file; the package is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; give the path of {name} instead")
    return pathlib.Path(found.origin).parent / name


def standard_library() -> list[Document]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            found.append((f"python/{name.as_posix()}", text))
    return found


def part_of(name: str) -> str:
    """The part of a document; the same everywhere."""
    tenth = digest(name)[0] * 10 // 256
    return {0: "test", 1: "tune"}.get(tenth, "train")


def digest_of(parts: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(b"".join(parts[name].tobytes() for name in PARTS))
    return digest.hexdigest()[:16]


def digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()

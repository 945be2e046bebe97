"""Text for minutes of an H100: the Python source that is installed, in bytes.

Ten times that of `lm_text`, where the likes of torch, transformers and scipy are beside
JAX. Files of a folder lie side by side, so that a long context has something to look
up, and are in one part; of equal files there is one. Libraries repeat themselves, so
the parts are more alike than those of other texts.
"""

import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.parts import documents, lm_text

LARGEST = 2**18  # bytes; longer files are mostly tables
SHARE = 20  # one folder of so many in each of `tune` and `test`


def load() -> dict[str, Any]:
    """As `lm_text.load`."""
    found: dict[str, list[bytes]] = {part: [] for part in documents.PARTS}
    for name, content in files():
        found[part_of(name)].append(content + lm_text.END)
    return lm_text.joined(found, "installed Python source")


def files() -> Iterator[tuple[pathlib.PurePath, bytes]]:
    """Names within their roots, and contents; each content once."""
    paths = sysconfig.get_paths()
    packages = [pathlib.Path(paths[name]) for name in ("purelib", "platlib")]
    packages.append(pathlib.Path(jax.__file__).parents[1])
    seen = set()
    for root in [*dict.fromkeys(packages), pathlib.Path(paths["stdlib"])]:
        for path in sorted(root.rglob("*.py")):
            if not path.is_file() or path.stat().st_size > LARGEST:
                continue  # a link may lead nowhere
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if content and digest not in seen:
                seen.add(digest)
                yield path.relative_to(root), content


def part_of(name: pathlib.PurePath) -> str:
    """The part of a file, that of its folder; the same everywhere."""
    digest = hashlib.sha256(name.parent.as_posix().encode()).digest()
    bucket = int.from_bytes(digest[:4]) % SHARE
    return {0: "test", 1: "tune"}.get(bucket, "train")

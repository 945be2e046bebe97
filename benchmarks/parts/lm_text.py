"""Text for models that begin from nothing: the standard library's source in bytes.

It needs no file, no tokenizer and no network, and an output layer of 256 tokens. It
differs between versions of Python: results are comparable where the digests agree.
"""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.parts import documents

VOCAB_SIZE = 256
END = b"\0"  # stands behind each document


def load() -> dict[str, Any]:
    """The parts of `documents`, uint8 each; `about` and `digest` name them."""
    found: dict[str, list[bytes]] = {part: [] for part in documents.PARTS}
    for name, text in documents.standard_library():
        found[documents.part_of(name)].append(text.encode() + END)
    return joined(found, f"Python {platform.python_version()}, standard library")


def joined(found: Mapping[str, Sequence[bytes]], about: str) -> dict[str, Any]:
    """The documents of each part one after another, and what they are."""
    parts = {
        part: np.frombuffer(b"".join(texts), np.uint8) for part, texts in found.items()
    }
    sizes = ", ".join(f"{parts[part].size:,} {part}" for part in parts)
    digest = documents.digest_of(parts)
    return parts | {"about": f"{about}; bytes: {sizes}", "digest": digest}

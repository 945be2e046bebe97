"""The text that SmolLM2 is trained and judged on, as token arrays in one file.

Articles of Wikipedia, with their markup, from the package gensim (4.4.0; text CC BY-SA,
not to be passed on), and the source of Python's standard library. Each document is in
one part alone, by a hash of its name: a tenth of them in `tune`, a tenth in `test`.
"""

import bz2
import hashlib
import html
import importlib.metadata
import pathlib
import platform
import re
import sysconfig
from collections.abc import Iterable, Mapping

import numpy as np

from benchmarks import smollm2_loss

WIKIPEDIA = (
    "gensim",
    "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)
PARTS = ("train", "tune", "test")
END = "<|endoftext|>"  # stands behind each document
SKIPPED = {"ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests"}

Document = tuple[str, str]  # name, text


def wikipedia() -> list[Document]:
    file = smollm2_loss.installed(*WIKIPEDIA)
    with bz2.open(file, "rt", encoding="utf-8") as dump:
        found = re.findall(
            r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump.read(), re.DOTALL
        )
    return [(f"wikipedia/{title}", html.unescape(text)) for title, text in found]


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
    tenth = _digest(name)[0] * 10 // 256
    return {0: "test", 1: "tune"}.get(tenth, "train")


def tokenized(model: pathlib.Path, documents: Iterable[Document]) -> dict:
    """The parts, uint16 each, and `about`: what they are."""
    tokenizer = smollm2_loss.tokenizer_of(model)
    end = tokenizer.token_to_id(END)
    if end is None or tokenizer.get_vocab_size() > 2**16:
        raise ValueError(
            f"the vocabulary of {model} must have {END} and at most {2**16} tokens; "
            f"got {tokenizer.get_vocab_size()} tokens. Give the file of SmolLM2."
        )
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, text in sorted(documents, key=lambda found: _digest(found[0])):  # mixed
        part = part_of(name)
        parts[part] += [*tokenizer.encode(text).ids, end]
        counts[part] += 1
    about = (
        f"gensim {importlib.metadata.version('gensim')}, Wikipedia; Python "
        f"{platform.python_version()}, standard library; documents: "
        + ", ".join(f"{num} {part}" for part, num in counts.items())
    )
    arrays = {part: np.array(tokens, np.uint16) for part, tokens in parts.items()}
    return arrays | {"about": np.array(about)}


def save(file: pathlib.Path, model: pathlib.Path) -> None:
    found = tokenized(model, [*wikipedia(), *standard_library()])
    np.savez_compressed(file, **found)
    sizes = ", ".join(f"{found[name].size:,} {name}" for name in PARTS)
    print(f"{file}: {found['about']}; tokens: {sizes}")


def load(file: pathlib.Path) -> dict:
    """What `save` wrote, `about` a string; `digest` tells texts apart."""
    with np.load(file) as stored:
        found = {name: stored[name] for name in (*PARTS, "about")}
    return found | {"about": str(found["about"]), "digest": digest_of(found)}


def digest_of(parts: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(b"".join(parts[name].tobytes() for name in PARTS))
    return digest.hexdigest()[:16]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()

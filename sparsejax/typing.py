"""Names for what goes in and out of the library: trees of arrays, and paths in them.

Every tree mirrors the params it belongs to. `None` at a leaf means "dense, not
governed"; it is a value here, so trees are flattened with `is_leaf=is_none`.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import jax

KeyPath: TypeAlias = tuple[Hashable, ...]
"""The path of a leaf, as `jax.tree_util.tree_flatten_with_path` gives it; its names
are those of `plain_path`."""

Params: TypeAlias = Any
"""A pytree of arrays: a dict, a Flax `nnx.State`, an Equinox module, ..."""

MaskTree: TypeAlias = Any
"""Like the params; bool arrays, True = kept, None = not governed."""

ScoreTree: TypeAlias = Any
"""Like the params; float arrays, higher = kept, None = not governed."""

SparsityTree: TypeAlias = Any
"""Like the params; the share of zeros of each leaf, in [0, 1), None = not governed."""

Where: TypeAlias = Callable[[KeyPath, Any], bool] | Any | None
"""Which leaves are governed: a predicate, a tree (prefix) of bools, or the default."""

ScalarOrSchedule: TypeAlias = float | jax.Array | Callable[[Any], Any]
"""A number, or a function from the step (int32[]) to one."""


def is_none(leaf: object) -> bool:
    """Makes `None` a leaf when a tree is flattened."""
    return leaf is None


def plain_path(path: KeyPath) -> tuple[str, ...]:
    """The names along a path, without the `.value` that Flax variables add.

    Alike for dicts, the params of Linen, an `nnx.State` and modules.

    Args:
      path: of a leaf, as a `where` gets it.

    Returns:
      One name an entry; places in lists are digits, as in
      `("blocks", "0", "ffn", "kernel")`.

    Example:
      >>> from jax.tree_util import DictKey, GetAttrKey
      >>> plain_path((DictKey("dense"), DictKey("kernel"), GetAttrKey("value")))
      ('dense', 'kernel')
    """
    names = [_key_name(key) for key in path]
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
        names.pop()
    return tuple(names)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)

"""Names for what goes in and out of the library: trees of arrays, and what knows them.

Every tree mirrors the params it belongs to. `None` at a leaf means "dense, not
governed"; it is a value here, so trees are flattened with `is_leaf=is_none`.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol, TypeAlias, runtime_checkable

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


@dataclasses.dataclass(frozen=True)
class GovernedLeaf:
    """What the optimizer's state knows of a leaf of the params that it makes sparse.

    Attributes:
      path: of the leaf, as `plain_path` gives it.
      method: what governs it, for messages.
      pattern: of the room `patterns`, for messages.
      unit: weights along each axis that the pattern keeps or drops together.
      mask: bool, of the leaf's shape; that of the last update.
      is_masked: the weights are used under `mask`; False where they are projected anew
        in every forward, or used dense.
      needs_dense_gradient: bool scalar, whether the next update reads the gradient of
        pruned weights too.
    """

    path: tuple[str, ...]
    method: str
    pattern: Any
    unit: tuple[int, ...]
    mask: jax.Array
    is_masked: bool
    needs_dense_gradient: jax.Array


@runtime_checkable
class MaskSource(Protocol):
    """A part of an optimizer's state that tells which weights are kept.

    Layers look for it in the state that they are given: they know no optimizer, and the
    methods know no layers.
    """

    def governed_leaves(self) -> Iterable[GovernedLeaf]:
        """Of this state and of those inside of it, in any order."""
        ...


def no_state(opt_state: Any) -> ValueError:
    """What to raise where an optimizer's state holds that of no method."""
    return ValueError(
        "the optimizer state must hold the state of a sparsejax method; found none in "
        f"{type(opt_state).__name__}. Wrap the optimizer, as in "
        "`sj.rigl(optax.adamw(...), ...)`, and pass the state it returns."
    )


def governed_twice(name: str, *methods: str) -> ValueError:
    """What to raise where two methods govern the leaf `name`; they may be unknown."""
    got = " and ".join(f"`{method}`" for method in methods) or "two"
    return ValueError(
        f"a leaf must be governed by one method; got {got} at {name}. Restrict one by "
        "`where`."
    )


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

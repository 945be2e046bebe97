"""Leaves that align by order, and what their names say against it.

Trees of other node types (a dict here, an `nnx.State` there) align by the order of
their leaves. A list of more than ten layers whose places became names, as in a plain
dict out of a checkpoint, has another order: "10" comes before "2".
"""

from collections.abc import Iterable, Sequence
from typing import Any

from sparsejax.typing import KeyPath, plain_path

Names = tuple[str, ...]  # of a leaf, as `typing.plain_path` gives them


def names_of(flat: Iterable[tuple[KeyPath, Any]]) -> list[Names]:
    """Of the leaves that `jax.tree_util.tree_flatten_with_path` gave, in order.

    Example:
      >>> names_of(jax.tree_util.tree_flatten_with_path({"a": [1, 2]})[0])
      [('a', '0'), ('a', '1')]
    """
    return [plain_path(path) for path, _ in flat]


def check_order(one: Sequence[Names], other: Sequence[Names], words: str) -> None:
    """Raises if leaves have the same names in another order.

    Where names differ otherwise nothing is known, and order counts.

    Args:
      one: names of leaves, in order.
      other: likewise.
      words: for the message, what the two are.

    Raises:
      ValueError: naming the first leaf out of place.

    Example:
      >>> one, other = [("0",), ("2",), ("10",)], [("0",), ("10",), ("2",)]
      >>> check_order(one, other, "`a` and `b`")
      Traceback (most recent call last):
      ValueError: `a` and `b` must have their leaves in one order; got 2 where
      10 is. ...
    """
    if list(one) == list(other) or sorted(one) != sorted(other):
        return
    mine, its = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
    raise ValueError(
        f"{words} must have their leaves in one order; got {'/'.join(mine)} where "
        f"{'/'.join(its)} is. Restore a checkpoint with a target, or give lists back "
        "their places by `flax.nnx.restore_int_paths`."
    )

"""One value for each leaf of a tree, from one value or a tree prefix of values.

Nodes are matched by their names, so that a dict stands for an `nnx.State`.
"""

from typing import Any

import jax

from sparsejax.typing import KeyPath, Params, is_none, plain_path


def broadcast_prefix(
    prefix: Any, params: Params, *, name: str, none: str = "leaves it dense"
) -> list[Any]:
    """Spreads one value, or a tree prefix of values, over the leaves of `params`.

    Nodes are matched by their names, not their types: a dict is a valid prefix of an
    `nnx.State`. `None` is a value, in `prefix` and in `params`.

    Args:
      prefix: a value, or a tree whose leaves sit at or above the leaves of `params`.
      params: the tree to cover.
      name: what the prefix is called in an error.
      none: what None at a leaf does, or when it may stand there, likewise.

    Returns:
      One value for each leaf of `params`, in flattening order.

    Raises:
      ValueError: if a leaf of `params` is not covered, or a value covers none.

    Example:
      >>> params = {"mlp": {"bias": 0.0, "kernel": 0.0}, "out": 0.0}
      >>> broadcast_prefix({"mlp": 0.9, "out": None}, params, name="sparsity")
      [0.9, 0.9, None]
    """
    entries = {
        plain_path(path): value
        for path, value in jax.tree_util.tree_flatten_with_path(
            prefix, is_leaf=is_none
        )[0]
    }
    # what `optax.partition` and `masked` hide may have entries all the same
    holes = [
        plain_path(path)
        for path, node in jax.tree_util.tree_flatten_with_path(
            params, is_leaf=_is_empty
        )[0]
        if _is_empty(node)
    ]
    values, used = [], set()
    for path, _ in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]:
        names = plain_path(path)
        found = [names[:i] for i in range(len(names) + 1) if names[:i] in entries]
        if not found:
            raise ValueError(
                f"`{name}` must be one value or a tree prefix of the params; it has "
                f"no entry at or above {leaf_name(path)}. Add one (None {none})."
            )
        values.append(entries[found[-1]])
        used.add(found[-1])
    unused = [
        names
        for names in entries
        if names and names not in used and not any(names[: len(h)] == h for h in holes)
    ]
    if unused:
        raise ValueError(
            f"`{name}` must be one value or a tree prefix of the params; its entry at "
            f"{'/'.join(unused[0])} is above no leaf. Remove it."
        )
    return values


def _is_empty(node: Any) -> bool:
    return node is not None and not jax.tree.leaves(node, is_leaf=is_none)


def leaf_name(path: KeyPath) -> str:
    """A leaf's path in words, also of params that are one bare array."""
    return jax.tree_util.keystr(path) or "the root"

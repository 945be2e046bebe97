"""Two trees side by side, leaf by leaf."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax._names import check_order, names_of
from sparsejax.typing import is_none


def map_aligned(
    fn: Callable[[str, jax.Array, jax.Array], Any],
    before: Any,
    after: Any,
    names: tuple[str, str],
) -> Any:
    """Maps `fn(path, leaf, other)` over two trees; where both have None it stays.

    Trees align by the order of their leaves, which their names must not contradict, not
    by their node types.

    Args:
      fn: called once all leaves are known to align.
      before: arrays and None.
      after: likewise.
      names: of the two, for messages.

    Returns:
      A tree like `before`.

    Raises:
      ValueError: if they do not align, naming the leaf.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(before, is_leaf=is_none)
    flat_after = jax.tree_util.tree_flatten_with_path(after, is_leaf=is_none)[0]
    others = [leaf for _, leaf in flat_after]
    if len(flat) != len(others):
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must mirror each other; got {len(flat)} "
            f"and {len(others)} leaves. Make both from the same params."
        )
    words = f"`{names[0]}` and `{names[1]}`"
    check_order(names_of(flat), names_of(flat_after), words)
    rows = [
        (jax.tree_util.keystr(path), one, other)
        for (path, one), other in zip(flat, others, strict=True)
    ]
    for path, one, other in rows:
        if (one is None) != (other is None):
            raise ValueError(
                "both trees must have an array, or both None, at a leaf; got None in "
                f"`{names[one is not None]}` only at {path}."
            )
        if one is not None and jnp.shape(one) != jnp.shape(other):
            raise ValueError(
                f"the arrays of a leaf must have one shape; got {jnp.shape(one)} in "
                f"`{names[0]}` and {jnp.shape(other)} in `{names[1]}` at {path}."
            )
    return treedef.unflatten(
        [
            None if one is None else fn(path, jnp.asarray(one), jnp.asarray(other))
            for path, one, other in rows
        ]
    )

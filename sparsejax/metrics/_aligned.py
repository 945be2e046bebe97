"""Two trees side by side, leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.typing import is_none


def aligned(
    before: Any, after: Any, names: tuple[str, str]
) -> list[tuple[str, jax.Array, jax.Array]]:
    """Paths and pairs of leaves; where both trees have None there is no pair.

    Trees align by the order of their leaves, not by their node types.

    Args:
      before: arrays and None.
      after: likewise.
      names: of the two, for messages.

    Raises:
      ValueError: if they do not align, naming the leaf.
    """
    flat = jax.tree_util.tree_flatten_with_path(before, is_leaf=is_none)[0]
    others = jax.tree.leaves(after, is_leaf=is_none)
    if len(flat) != len(others):
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must mirror each other; got {len(flat)} "
            f"and {len(others)} leaves. Make both from the same params."
        )
    pairs = []
    for (path, one), other in zip(flat, others, strict=True):
        if one is None and other is None:
            continue
        name = jax.tree_util.keystr(path)
        if one is None or other is None:
            raise ValueError(
                "both trees must have an array, or both None, at a leaf; got None in "
                f"`{names[one is not None]}` only at {name}."
            )
        if jnp.shape(one) != jnp.shape(other):
            raise ValueError(
                f"the arrays of a leaf must have one shape; got {jnp.shape(one)} in "
                f"`{names[0]}` and {jnp.shape(other)} in `{names[1]}` at {name}."
            )
        pairs.append((name, jnp.asarray(one), jnp.asarray(other)))
    return pairs

"""Resets what the inner optimizer remembers of weights that are kept again."""

import jax
import jax.numpy as jnp
import optax

from sparsejax.transforms._write_through import Edit
from sparsejax.typing import Params, is_none, plain_path


def regrown_resets(
    inner_state: optax.OptState,
    fresh_state: optax.OptState,
    params: Params,
    regrown: list[jax.Array | None],
) -> list[Edit | None]:
    """How each leaf of the inner state gives regrown weights their first moments back.

    A leaf of the inner state belongs to a parameter if its path ends with the param's
    and its shape is the param's (of several such params, the one with the longest
    path). No optimizer's state class is looked at, so any optimizer works; factored
    or scalar statistics stay as they are.

    Args:
      inner_state: of any optax optimizer; only paths and shapes are read.
      fresh_state: `inner.init(params)`, of the same structure.
      params: whose paths name the moments.
      regrown: bool masks, one entry a leaf of `params`; None = not governed.

    Returns:
      For each leaf of the inner state the function that puts `fresh_state`'s value
      wherever a weight is regrown, or None for a leaf that belongs to none.
    """
    owners = {}
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]
    for (path, leaf), mask in zip(flat, regrown, strict=True):
        owners[plain_path(path)] = (jnp.shape(leaf), mask) if leaf is not None else None

    def reset(path, leaf, fresh) -> Edit | None:
        names = plain_path(path)
        for start in range(len(names) + 1):
            found = owners.get(names[start:])
            if found is not None and found[0] == leaf.shape:
                mask = found[1]
                if mask is None:
                    return None
                return lambda after: jnp.where(mask, fresh, after)
        return None

    paths = jax.tree_util.tree_flatten_with_path(inner_state)[0]
    return [
        reset(path, leaf, fresh)
        for (path, leaf), fresh in zip(paths, jax.tree.leaves(fresh_state), strict=True)
    ]

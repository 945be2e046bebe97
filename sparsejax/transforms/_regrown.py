"""Resets what the inner optimizer remembers of weights that are kept again."""

import jax
import jax.numpy as jnp
import optax

from sparsejax.typing import Params, is_none, plain_path


def reset_regrown(
    inner_state: optax.OptState,
    fresh_state: optax.OptState,
    params: Params,
    regrown: list[jax.Array | None],
) -> optax.OptState:
    """Gives regrown weights their initial moments back.

    A leaf of the inner state belongs to a parameter if its path ends with the param's
    and its shape is the param's (of several such params, the one with the longest
    path). No optimizer's state class is looked at, so any optimizer works; factored
    or scalar statistics stay as they are.

    Args:
      inner_state: of any optax optimizer.
      fresh_state: `inner.init(params)`, of the same structure.
      params: whose paths name the moments.
      regrown: bool masks, one entry a leaf of `params`; None = not governed.

    Returns:
      The inner state with `fresh_state`'s value wherever a weight is regrown.
    """
    owners = {}
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]
    for (path, leaf), mask in zip(flat, regrown, strict=True):
        owners[plain_path(path)] = (jnp.shape(leaf), mask) if leaf is not None else None

    def owner(path, leaf):
        names = plain_path(path)
        for start in range(len(names) + 1):
            found = owners.get(names[start:])
            if found is not None and found[0] == jnp.shape(leaf):
                return found[1]
        return None

    def reset(path, leaf, fresh):
        mask = owner(path, leaf)
        return leaf if mask is None else jnp.where(mask, fresh, leaf)

    return jax.tree_util.tree_map_with_path(reset, inner_state, fresh_state)

"""What the inner optimizer remembers of pruned weights: nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax._names import names_of
from sparsejax.typing import Params, is_none, plain_path


def fresh_where_pruned(
    inner_state: optax.OptState,
    fresh_state: optax.OptState,
    params: Params,
    kept: list[jax.Array | None],
) -> Any:
    """Gives the moments of pruned weights their first values.

    Done before each step, this makes a pruned weight one that has had no gradient yet,
    and so a regrown one begins, without anything to be reset when masks change; where
    they change after the step, it is done again then.

    A leaf of the inner state belongs to a parameter if its path ends with the param's
    and its shape is the param's. Of several such params it is the one beside whose leaf
    most others have theirs: Adam's `mu/kernel` is a moment of `kernel` where there is a
    param `mu/kernel` too; then the one with the longest path. No optimizer's state
    class is looked at, so any optimizer works; factored or scalar statistics stay as
    they are.

    Args:
      inner_state: of any optax optimizer.
      fresh_state: `inner.init(params)`, of the same structure.
      params: whose paths name the moments.
      kept: bool masks, one entry a leaf of `params`; None = not governed.

    Returns:
      The inner state, with the values of `fresh_state` wherever a weight is pruned.
    """
    owners = {}
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]
    for (path, leaf), mask in zip(flat, kept, strict=True):
        owners[plain_path(path)] = (jnp.shape(leaf), mask) if leaf is not None else None

    inner_names = set(names_of(jax.tree_util.tree_flatten_with_path(inner_state)[0]))

    def num_beside(prefix):
        return sum((*prefix, *names) in inner_names for names in owners)

    def choose(path, leaf, fresh):
        names = plain_path(path)
        starts = [
            start
            for start in range(len(names) + 1)
            if (found := owners.get(names[start:])) and found[0] == leaf.shape
        ]
        if not starts:
            return leaf
        start = starts[0]
        if len(starts) > 1:
            start = max(starts, key=lambda start: num_beside(names[:start]))
        mask = owners[names[start:]][1]
        return leaf if mask is None else jnp.where(mask, leaf, fresh)

    return jax.tree_util.tree_map_with_path(choose, inner_state, fresh_state)

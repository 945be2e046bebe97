"""What training-free selectors share: the weights of the last queries, and budgets.

The last queries of a prompt attend to all of it; what they attend to stands for what
the others, or those to come, need.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax import ops
from sparsejax.attention import _blocks
from sparsejax.attention._spark import scaled_scores


def window_weights(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    window: int,
    lengths: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch kv_heads group window keys"]:
    """Causal attention weights of the last `window` queries, float32, no gradient.

    Queries are the last of the positions of the keys; each row sums to 1. With
    `lengths`, the keys of each sequence, there are as many queries as keys, and the
    last ones of each sequence are asked; rows before its first are 0.
    """
    query, key = jax.lax.stop_gradient((query, key))
    keys = jnp.arange(key.shape[1])
    if lengths is None:
        query, at = query[:, -window:], keys[None, -window:]
    else:
        at = lengths[:, None] + jnp.arange(-window, 0)
        rows = jnp.maximum(at, 0)[..., None, None]
        query = jnp.take_along_axis(query, rows, axis=1)
    seen = (keys <= at[..., None])[:, None, None]
    scores = jnp.where(seen, scaled_scores(query, key), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    # a row that sees nothing is of no query
    return weights if lengths is None else jnp.where(seen, weights, 0)


def diagonal_sums(
    weights: Float[Array, "*lead window keys"],
) -> Float[Array, "*lead keys"]:
    """Sums the weights over the queries at each distance from query to key.

    Entry `o` is of the keys `o` positions before their query; 0 is a query's own key.
    """
    *lead, window, keys = weights.shape
    # Each row shorter by one shifts the next by one, so that diagonals stand upright.
    padding = [(0, 0)] * (len(lead) + 1) + [(0, window)]
    flat = jnp.pad(weights[..., ::-1], padding)
    flat = flat.reshape(*lead, window * (keys + window))
    upright = flat[..., :-window].reshape(*lead, window, keys + window - 1)
    return upright.sum(axis=-2)[..., window - 1 :]  # those before are of later keys


def keep_highest(
    scores: Float[Array, "*lead keys"],
    num_kept: int | jax.Array,
    *,
    always: Bool[Array, "*#lead keys"],
) -> Bool[Array, "*lead keys"]:
    """Keeps the `num_kept` highest, `always` first; of equal ones those further left.

    For `num_kept` see `ops.keep_highest`. A NaN ranks below every number.
    """
    return ops.keep_highest(jnp.where(always, jnp.inf, scores), num_kept)


def check_prompt(query: Any, key: Any, window: int) -> None:
    """Raises unless shapes agree and there are `window` queries, at the last keys."""
    _blocks.check(query, key, (1, 1))
    queries, keys = query.shape[1], key.shape[1]
    if queries > keys:
        raise ValueError(
            "`query` must be the last positions of `key`, so no longer; got "
            f"{queries} queries and {keys} keys."
        )
    check_count("window", window, 1, queries, "queries")


def check_causal(causal: bool) -> None:
    """Raises unless attention is causal, where a selector knows no other."""
    if not causal:
        raise ValueError(
            f"`causal` must be True; got {causal}. Take `topk_blocks` for attention in "
            "both directions."
        )


def check_square(query: Any, key: Any, block_shape: tuple[int, int]) -> None:
    """Raises unless there are as many queries as keys, and a whole block of them."""
    _blocks.check(query, key, block_shape)
    queries, keys = query.shape[1], key.shape[1]
    if queries != keys:
        raise ValueError(
            "`query` and `key` must be of one whole prompt; got "
            f"{queries} queries and {keys} keys."
        )
    if max(block_shape) > keys:
        raise ValueError(
            f"`block_shape` must fit into the {keys} positions of the prompt; got "
            f"{block_shape}. Choose smaller blocks, or attend to all of so short a one."
        )


ENDS = "the `local` last and `sink` first that are always kept"


def check_ends(local: int, sink: int, keys: int, *, least_local: int = 0) -> None:
    """Raises unless `local` last keys and `sink` first keys are there."""
    check_count("local", local, least_local, keys, "keys")
    check_count("sink", sink, 0, keys, "keys")


def check_count(
    name: str,
    count: int,
    least: int,
    most: int,
    unit: str,
    *,
    always: str = "what is always kept",
) -> None:
    """Raises unless `count` is a budget from what is always kept to what there is."""
    if count < least:
        raise ValueError(
            f"`{name}` must be at least {least}, {always}; got {count}. Raise it, or "
            "keep fewer always."
        )
    if count > most:
        raise ValueError(
            f"`{name}` must be at most the {most} {unit} that there are; got {count}. "
            "Lower it, or attend to all of so short a sequence."
        )

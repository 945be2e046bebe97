"""The weights of the last queries, by which training-free selectors choose.

The last queries of a prompt attend to all of it; what they attend to stands for what
the others, or those to come, need.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
        at = lengths[:, None] + jnp.arange(-window, 0)[None]
        rows = jnp.maximum(at, 0)[..., None, None]
        query = jnp.take_along_axis(query, rows, axis=1)
    seen = (keys[None, None] <= at[..., None])[:, None, None]
    scores = jnp.where(seen, scaled_scores(query, key), -jnp.inf)
    if lengths is not None:  # a row that sees nothing is of no query
        scores = jnp.where((at >= 0)[:, None, None, :, None], scores, 0)
    weights = jax.nn.softmax(scores, axis=-1)
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

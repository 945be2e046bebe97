"""What both forms of attention, by blocks and by lists, check and complete."""

import math

import jax
import jax.numpy as jnp


def check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises unless dtypes and shapes of queries, keys and values agree."""
    for name, array in {"q": q, "k": k, "v": v}.items():
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype != q.dtype:
            raise TypeError(
                "`q`, `k` and `v` must be floating and of one dtype; got "
                f"{jax.typeof(array)} for `{name}`. Cast it."
            )
        if array.ndim != 4 or 0 in array.shape[1:]:
            raise ValueError(
                f"`{name}` must be [batch, seq, heads, head_dim], each but batch at "
                f"least 1; got shape {array.shape}."
            )
    if k.shape != v.shape:
        raise ValueError(
            f"`k` and `v` must have one shape; got {k.shape} and {v.shape}."
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "`q` and `k` must agree on batch and head_dim; got "
            f"{q.shape} and {k.shape}."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            "the key heads must divide the query heads; got "
            f"{k.shape[2]} and {q.shape[2]}."
        )


def of_scores(scale: float | None, head_dim: int) -> float:
    """The factor of the scores; `1 / sqrt(head_dim)` where none is given."""
    scale = float(head_dim**-0.5 if scale is None else scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"`scale` must be positive and finite; got {scale}.")
    return scale

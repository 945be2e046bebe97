"""What attention and its selectors check."""

from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import ops


def check_tokens(name: str, x: Any) -> None:
    """Raises unless `x`, called `name`, has the axes of queries, keys or values."""
    if x.ndim != 4:
        raise ValueError(
            f"`{name}` must be [batch, seq, heads, head_dim]; got shape {x.shape}."
        )


def check_heads(
    query: Any, key: Any, names: tuple[str, str] = ("query", "key")
) -> None:
    """Raises unless queries and keys, called `names`, fit each other."""
    if (
        query.ndim != 4
        or key.ndim != 4
        or query.shape[::3] != key.shape[::3]
        or query.shape[2] % key.shape[2]
    ):
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must be [batch, seq, heads, head_dim], "
            "equal in batch and head_dim, and the key heads must divide the query "
            f"heads; got {query.shape} and {key.shape}."
        )


def check_valid(valid: Any, shape: tuple[int, ...]) -> None:
    """Raises unless `valid` is bool, has all the keys, and broadcasts to `shape`."""
    if valid.dtype != jnp.bool_:
        raise TypeError(f"`valid` must be bool; got {jax.typeof(valid)}.")
    has_all_keys = valid.shape[-1:] == shape[-1:]
    if not has_all_keys or not ops.broadcasts(valid.shape, shape):
        raise ValueError(
            f"`valid` must broadcast to {shape} and have its last size, the keys; got "
            f"{valid.shape}."
        )

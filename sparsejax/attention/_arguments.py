"""What attention and its selectors check."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparsejax import formats, ops
from sparsejax._ints import check_int
from sparsejax._lengths import of_sequences

ENDS = "the `local` last and `sink` first that are always kept"


def check_tokens(name: str, x: Any) -> None:
    """Raises unless `x`, called `name`, has the axes of queries, keys or values."""
    if x.ndim != 4:
        raise ValueError(
            f"`{name}` must be [batch, seq, heads, head_dim]; got shape {x.shape}."
        )


def check_heads(query: Any, key: Any) -> None:
    """Raises unless queries and keys fit each other."""
    if (
        query.ndim != 4
        or key.ndim != 4
        or query.shape[::3] != key.shape[::3]
        or query.shape[2] % key.shape[2]
    ):
        raise ValueError(
            "`query` and `key` must be [batch, seq, heads, head_dim], equal in batch "
            "and head_dim, and the key heads must divide the query heads; got "
            f"{query.shape} and {key.shape}."
        )


def check_same_tokens(query: Any, key: Any) -> None:
    """Raises unless queries and keys fit each other, and are equally many."""
    check_heads(query, key)
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            "`query` and `key` must be of the same tokens; got "
            f"{query.shape[1]} queries and {key.shape[1]} keys."
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


def check_blocks(query: Any, key: Any, block_shape: tuple[int, int]) -> None:
    """Raises unless queries, keys and the shape of a block fit."""
    check_heads(query, key)
    formats.check_block_shape(block_shape)


def check_whole_blocks(query: Any, key: Any, block_shape: tuple[int, int]) -> None:
    """Raises unless queries and keys fit each other, and each has a whole block."""
    check_heads(query, key)
    formats.check_block_shape(block_shape)
    lengths = query.shape[1], key.shape[1]
    sides = zip(block_shape, lengths, strict=True)
    if any(side > length for side, length in sides):
        raise ValueError(
            f"`block_shape` must be at most {lengths}, the lengths of "
            f"the sequences; got {block_shape}. Choose smaller blocks."
        )


def check_sequences(query: Any, key: Any, block: int) -> None:
    """Raises unless queries and keys are of the same tokens, and a block of them."""
    check_same_tokens(query, key)
    check_int("block", block)
    if not 1 <= block <= query.shape[1]:
        raise ValueError(
            f"`block` must be in [1, {query.shape[1]}], the length of the sequence; "
            f"got {block}. Choose smaller blocks, or attend to all of it."
        )


def check_prompt(query: Any, key: Any, window: int) -> None:
    """Raises unless shapes agree and there are `window` queries, at the last keys."""
    check_heads(query, key)
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
    check_blocks(query, key, block_shape)
    check_same_tokens(query, key)
    if max(block_shape) > key.shape[1]:
        raise ValueError(
            f"`block_shape` must fit into the {key.shape[1]} positions of the prompt; "
            f"got {block_shape}. Choose smaller blocks, or attend to all of so short "
            "a one."
        )


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


def check_next(name: str, x: Any, batch: int, heads: int, head_dim: int) -> None:
    """Raises unless `x` is of one position in each sequence of a cache."""
    want = (batch, 1, heads, head_dim)
    if x.shape != want:
        raise ValueError(
            f"`{name}` must be of one position in each sequence of the cache, {want}; "
            f"got shape {x.shape}."
        )


def prompt_lengths(query: Any, key: Any, lengths: ArrayLike | None) -> jax.Array | None:
    """The tokens of each prompt, int32 `[batch]`, at least 1; None where all are."""
    if lengths is None:
        return None
    longer = max(query.shape[1], key.shape[1])
    return of_sequences("lengths", lengths, len(key), 1, longer)


def cache_lengths(key: Any, lengths: ArrayLike | None) -> jax.Array:
    """The keys of each sequence of a cache, int32 `[batch]`; all slots by default."""
    batch, num_slots = key.shape[:2]
    numbers: ArrayLike = num_slots if lengths is None else lengths
    return of_sequences("lengths", numbers, batch, 0, num_slots)

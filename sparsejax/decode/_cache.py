"""What a decoder remembers of the tokens so far."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, layer by layer, in a fixed number of slots.

    A token at position i lies in slot i. Slots from `lengths` on hold nothing that is
    read: a query sees the slots up to its own position.

    Attributes:
      keys: for each layer `[batch, slots, kv_heads, head_dim]`, rotated.
      values: for each layer `[batch, slots, kv_heads, head_dim]`.
      lengths: int32 `[batch]`, the tokens of each sequence.
      known: for each layer what its `KeySelector` knows of the tokens, or None.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    known: tuple[Any, ...]


def slots_for(num_tokens: int) -> int:
    """Slots of a cache for so many tokens, a few more where that is faster.

    On a GPU XLA cuts a long sum over slots into up to 16 parts of whole eights; to cut
    another number so, it would pad a copy of the cache in each step.

    Example:
      >>> slots_for(544), slots_for(4128)
      (544, 4224)
    """
    return num_tokens if num_tokens < 1024 else -(-num_tokens // 128) * 128

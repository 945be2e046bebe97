"""What a decoder remembers of the tokens so far."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, layer by layer, in a fixed room.

    A token at position i lies in slot i. Slots from `lengths` on hold nothing that is
    read: a query sees the slots up to its own position.

    Attributes:
      keys: for each layer `[batch, capacity, kv_heads, head_dim]`, rotated.
      values: for each layer `[batch, capacity, kv_heads, head_dim]`.
      lengths: int32 `[batch]`, the tokens of each sequence.
      known: for each layer what its `KeySelector` knows of the keys, or None.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    known: tuple[Any, ...]

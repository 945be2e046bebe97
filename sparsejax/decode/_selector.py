"""What chooses the keys that a decoding query reads, and what it sees of a layer."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sparsejax.formats import KeyLists


@dataclasses.dataclass(frozen=True)
class LayerTokens:
    """What an attention layer computed of its tokens, as a `KeySelector` sees it.

    Those of the prompts, filled up at the end with anything finite, or the next one of
    each sequence. What a selector does not use is not computed.

    Attributes:
      query: `[batch, seq, heads, head_dim]`, rotated.
      key: `[batch, seq, kv_heads, head_dim]`, rotated.
      unrotated_query: as `query`, before the rotation.
      unrotated_key: as `key`, before the rotation.
      positions: int32 `[batch, seq]`, of the tokens.
      rotate: the layer's own rotation: gives `[batch, seq, heads, dim]`, `dim` even,
        the positions `[1 | batch, seq]`.
    """

    query: jax.Array
    key: jax.Array
    unrotated_query: jax.Array
    unrotated_key: jax.Array
    positions: jax.Array
    rotate: Callable[[jax.Array, jax.Array], jax.Array]


class KeySelector(Protocol):
    """Chooses the keys that each token reads, by something kept beside the cache.

    - `Quest` and `DoubleSparsity` choose anew for each token, by what they keep of the
      rotated keys; `Seer` by a gate that was trained on those before the rotation.
    - `SnapKV` and `AdaSnapKV` choose once, by the last queries of the prompt.

    A selector is a pytree: settings are static, and what was calibrated or trained are
    leaves. One without arrays is made so by `jax.tree_util.register_static`.
    """

    def start(self, tokens: LayerTokens, lengths: jax.Array, num_slots: int) -> Any:
        """Reads the prompts.

        Args:
          tokens: of the prompts, `seq` of them.
          lengths: int32 `[batch]`, of the prompts, in `[1, seq]`.
          num_slots: of the cache, at least `seq`: the tokens that it has room for.

        Returns:
          A pytree of arrays: what `select` needs to know of the tokens.
        """
        ...

    def append(self, known: Any, tokens: LayerTokens) -> Any:
        """Takes in the next token of each sequence; the pytree keeps its shapes."""
        ...

    def select(self, known: Any, tokens: LayerTokens) -> KeyLists:
        """Chooses for the same tokens, which are in `known`.

        A token should be among those that it reads. Where lists have not room for all,
        `overflowed` says so: a step counts it in `Overflows`.
        """
        ...


def layer_tokens(
    layer: Any, x: jax.Array, positions: jax.Array
) -> tuple[LayerTokens, jax.Array]:
    """What a selector sees of a layer, and the values `[batch, seq, kv_heads, dim]`.

    Args:
      layer: an `nn.Attention`, whose queries, keys and values they are.
      x: `[batch, seq, d_model]`, its input.
      positions: int32 `[batch, seq]`.
    """
    query, key, value = layer.unrotated(x)
    rotated = layer.rotate(query, positions), layer.rotate(key, positions)
    return LayerTokens(*rotated, query, key, positions, layer.rotate), value


def in_slots(x: jax.Array, num_slots: int) -> jax.Array:
    """Keys or values `[batch, seq, ...]` as a cache has them, with room for more."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, num_slots - x.shape[1])
    return jnp.pad(x, padding)

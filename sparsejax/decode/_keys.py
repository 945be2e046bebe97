"""Which keys of the cache a decoding query reads: selectors over what they remember."""

import dataclasses
from typing import Any, Protocol

import jax

from sparsejax import attention
from sparsejax.formats import KeyLists


class KeySelector(Protocol):
    """Chooses keys anew for each token, by something small kept beside the cache.

    A selector is a setting of `prepare`: hashable, without arrays. `Quest` is one.
    """

    def start(self, key: jax.Array, lengths: jax.Array) -> Any:
        """Reads a cache of rotated keys `[batch, slots, kv_heads, head_dim]`.

        Args:
          key: keys, `lengths` of them in each sequence.
          lengths: int32 `[batch]`.

        Returns:
          A pytree of arrays: what `select` needs to know of the keys.
        """
        ...

    def append(self, known: Any, key: jax.Array) -> Any:
        """Takes in the next key of each sequence, `[batch, 1, kv_heads, head_dim]`."""
        ...

    def select(self, query: jax.Array, known: Any) -> KeyLists:
        """Chooses for a rotated query `[batch, 1, heads, head_dim]`.

        Its own key is in `known`, and should be among those chosen.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Quest:
    """Reads the pages whose keys may score highest, and the page of the query.

    Attributes:
      num_kept: earlier pages; at most all but one of the pages of the cache.
      page_size: keys of a page. The kernel for Hopper takes multiples of 128; the
        paper's 16 fits the query closer.

    References:
      See `sj.attention.quest`.
    """

    num_kept: int = 64
    page_size: int = 16

    def start(self, key: jax.Array, lengths: jax.Array) -> attention.PageBounds:
        """Bounds the keys of each page."""
        return attention.page_bounds(key, lengths, page_size=self.page_size)

    def append(
        self, known: attention.PageBounds, key: jax.Array
    ) -> attention.PageBounds:
        """Widens the bounds of the last page, or begins the next."""
        return attention.append_key(known, key)

    def select(self, query: jax.Array, known: attention.PageBounds) -> KeyLists:
        """See `sj.attention.quest`; fewer pages where the cache has fewer."""
        num_kept = min(self.num_kept, known.low.shape[1] - 1)
        return attention.quest(query, known, num_kept=num_kept)

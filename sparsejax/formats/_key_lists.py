"""`KeyLists`: which keys of a cache are kept, as one list for each head."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from sparsejax._indexing import put_in_rows
from sparsejax._ints import check_int
from sparsejax._promotion import along_last
from sparsejax.formats._block_mask import BlockMask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyLists:
    """Which keys of a cache are kept: pages of them or single ones, in rising order.

    What a decoding query attends to, or what is left of a cache after eviction. Page i
    holds the positions from `page_size * i` on. Leading axes are batch and heads; where
    query heads share a key head, a list for each key head means that they share it too.

    Lists have a static length, so other lists need no new trace. Entries beyond a count
    repeat the last index (0 in an empty list), so that they may be gathered.

    Attributes:
      num: int32 `[...]`, kept pages.
      indices: int32 `[..., capacity]`, which ones, ascending.
      overflowed: bool `[...]`, whether pages had to be dropped for want of room.
      page_size: keys of a page; 1 = single keys.

    Example:
      >>> kept = jnp.array([True, False, True])
      >>> lists = sj.formats.KeyLists.from_mask(kept, page_size=2, capacity=2)
      >>> print(lists.num, lists.indices, lists.to_mask(5).astype(int))
      2 [0 2] [1 1 0 0 1]
    """

    num: jax.Array
    indices: jax.Array
    overflowed: jax.Array
    page_size: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def from_mask(
        cls,
        kept: Bool[Array, "*lead pages"],
        *,
        page_size: int = 1,
        capacity: int | None = None,
    ) -> Self:
        """Builds the lists from one bool a page.

        Args:
          kept: True = kept.
          page_size: keys of a page.
          capacity: room of a list, None for all pages. A list that has more keeps its
            first pages; `overflowed` tells.

        Raises:
          TypeError: if `kept` is not bool.
          ValueError: if there are no pages, or a size or the capacity is below 1.
        """
        check_int("page_size", page_size, least=1)
        rows = BlockMask.from_blocks(  # one row of blocks, whose list is the one wanted
            jnp.asarray(kept)[..., None, :], (1, page_size), capacity=capacity
        )
        num, indices = rows.num[..., 0], rows.indices[..., 0, :]
        return cls(num, indices, rows.overflowed, page_size)

    def positions(self, length: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Gives the kept positions, and which of them count.

        Args:
          length: keys in the cache; an integer, or int32 of the first leading axes.

        Returns:
          int32 positions and bools, both `[..., capacity * page_size]`. A position
          counts if its page is listed and it lies below `length`; those that do not
          count are within the pages of the cache.
        """
        ndim = self.indices.ndim
        in_page = along_last(self.page_size, ndim + 1, jnp.int32)
        positions = self.page_size * self.indices[..., None] + in_page
        places = along_last(self.indices.shape[-1], ndim)
        listed = places < self.num[..., None]
        length = _trailing(length, positions.ndim)
        valid = listed[..., None] & (positions < length)
        # one length each for sequences that share a list makes more of `valid`
        return _pages_merged(positions), _pages_merged(valid)

    def density(self, length: ArrayLike) -> jax.Array:
        """Computes the share of the keys that are kept, float32 `[...]`.

        Args:
          length: keys in the cache, see `positions`; a last page counts the keys that
            it has. Of an empty cache the share is 0.

        Example:
          >>> kept = jnp.array([True, False, True])
          >>> lists = sj.formats.KeyLists.from_mask(kept, page_size=2)
          >>> print(lists.density(5))
          0.6
        """
        _, valid = self.positions(length)
        length = jnp.maximum(_trailing(length, self.num.ndim), 1)
        return jnp.sum(valid, axis=-1).astype(jnp.float32) / length

    def to_mask(self, num_keys: int) -> jax.Array:
        """Gives one bool a key, `[..., num_keys]`.

        Args:
          num_keys: slots of the cache.
        """
        positions, valid = self.positions(num_keys)
        to = jnp.where(valid, positions, num_keys)  # beyond the mask: dropped
        return put_in_rows(to, True, num_keys)


def _pages_merged(a: jax.Array) -> jax.Array:
    *lead, pages, tokens = a.shape
    return a.reshape(*lead, pages * tokens)


def _trailing(length: ArrayLike, ndim: int) -> jax.Array:
    """`length` with axes of size 1 behind its own."""
    length = jnp.asarray(length)
    return length.reshape(length.shape + (1,) * (ndim - length.ndim))

"""`BlockMask`: which blocks of a matrix are kept, as lists by row and by column.

One type serves weights and attention. A kernel walks the list of a block row, or of a
block column, and never meets the blocks that are not in it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Self, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax._bits import WORD, bit_of_rank, count_bits, to_words
from sparsejax._blocks import kept_blocks
from sparsejax._indexing import put_in_rows
from sparsejax._ints import check_int
from sparsejax._pairs import count_if_few
from sparsejax._promotion import along_last
from sparsejax._reshape import reshape_stepwise

Capacity: TypeAlias = int | tuple[int | None, int | None] | None
"""Room for kept blocks: `(in a block row, in a block column)`, one number for a block
row alone, None for all."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which blocks `(height, width)` of a matrix `[..., rows, columns]` are kept.

    A block is kept or dropped whole. For weights rows are d_in and columns d_out; for
    attention rows are queries and columns keys, and leading axes are batch and heads,
    of size 1 where all share one mask. Rules about single elements (causal, windows,
    segments) are arguments of the operation and never stored here.

    Built by `from_dense`, `from_blocks` or `from_scores`: on the device, inside `jit`,
    in O(blocks). Lists have a static length, so a new topology needs no new trace.
    Entries beyond a count repeat the last index (0 in an empty list).

    Attributes:
      num: int32 `[..., block_rows]`, kept blocks of each block row.
      indices: int32 `[..., block_rows, capacity]`, their block columns, ascending.
      num_t: int32 `[..., block_columns]`, kept blocks of each block column.
      indices_t: int32 `[..., block_columns, capacity_t]`, their block rows, ascending.
      overflowed: bool `[...]`, whether blocks had to be dropped for want of room.
      block_shape: `(height, width)`, elements of a block.

    Example:
      >>> mask = BlockMask.from_blocks(jnp.array([[True, False], [True, True]]), (2, 4))
      >>> print(mask.num, mask.indices[1], mask.indices_t[1], mask.density())
      [1 2] [0 1] [1 1] 0.75
      >>> mask.shape
      (4, 8)
    """

    num: jax.Array
    indices: jax.Array
    num_t: jax.Array
    indices_t: jax.Array
    overflowed: jax.Array
    block_shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_blocks(
        cls,
        kept: Bool[Array, "*lead block_rows block_columns"],
        block_shape: tuple[int, int],
        *,
        capacity: Capacity = None,
    ) -> Self:
        """Builds the lists from one bool a block.

        Args:
          kept: True = kept.
          block_shape: `(height, width)`.
          capacity: room of the lists. A row that has more keeps its first blocks, then
            a column likewise; `overflowed` tells.

        Returns:
          The mask, of `lead`.

        Raises:
          TypeError: if `kept` is not bool, or a size or capacity is no whole number.
          ValueError: if it has no rows or columns, or a size or capacity is below 1.

        Example:
          >>> mask = BlockMask.from_blocks(jnp.ones((1, 3), bool), (8, 8), capacity=2)
          >>> print(mask.indices, mask.overflowed)
          [[0 1]] True
        """
        kept = jnp.asarray(kept)
        if kept.dtype != jnp.bool_:
            raise TypeError(
                f"a mask must be bool; got {jax.typeof(kept)}. Compare first, as in "
                "`mask != 0`."
            )
        if kept.ndim < 2 or 0 in kept.shape[-2:]:
            raise ValueError(
                f"a mask must have rows and columns; got shape {kept.shape}."
            )
        block_shape = check_block_shape(block_shape)
        row_room, column_room = _rooms(capacity, kept.shape[-2:])
        # the lists by row take nothing from the rest, which is compiled to nothing in a
        # forward, as that reads no more
        num, indices = _lists(kept, row_room)
        fitting = _first(kept, row_room)
        if column_room < kept.shape[-2]:
            fitting = _first(fitting.mT, column_room).mT
            num, indices = _lists(fitting, row_room)
        num_t, indices_t = _lists(fitting.mT, column_room)
        overflowed = jnp.any(kept != fitting, axis=(-2, -1))
        return cls(num, indices, num_t, indices_t, overflowed, block_shape)

    @classmethod
    def from_dense(
        cls,
        mask: Bool[Array, "*lead rows columns"],
        block_shape: tuple[int, int],
        *,
        capacity: Capacity = None,
    ) -> Self:
        """Keeps each block that holds a True.

        Args:
          mask: elementwise, True = kept.
          block_shape: `(height, width)`; must divide rows and columns.
          capacity: as in `from_blocks`.

        Returns:
          The mask, of `lead`.

        Raises:
          TypeError: as in `from_blocks`.
          ValueError: as in `from_blocks`, or if a block does not divide its axis.

        Example:
          >>> mask = BlockMask.from_dense(jnp.eye(4, dtype=bool), (2, 2))
          >>> print(mask.to_blocks())
          [[ True False]
           [False  True]]
        """
        mask = jnp.asarray(mask)
        height, width = check_block_shape(block_shape)
        if mask.dtype != jnp.bool_ or mask.ndim < 2:
            return cls.from_blocks(mask, block_shape)  # says which, and raises
        if mask.shape[-2] % height or mask.shape[-1] % width:
            raise ValueError(
                f"blocks of {block_shape} must divide the last two axes; got shape "
                f"{mask.shape}. Pad the mask or choose other blocks."
            )
        *lead, rows, columns = mask.shape
        kept = kept_blocks(mask, (*lead, rows // height, columns // width))
        return cls.from_blocks(kept, block_shape, capacity=capacity)

    @classmethod
    def from_scores(
        cls,
        scores: Float[Array, "*lead block_rows block_columns"],
        block_shape: tuple[int, int],
        num_kept: int,
        *,
        capacity: Capacity = None,
    ) -> Self:
        """Keeps the blocks of highest score in each block row.

        `sj.ops.keep_highest` and `from_blocks` do so faster where that has a kernel.

        Args:
          scores: one a block, higher is kept; -inf and NaN are never kept.
          block_shape: `(height, width)`.
          num_kept: blocks to keep in each block row; of equal scores the one further
            left wins.
          capacity: as in `from_blocks`; by default `num_kept` blocks in a row. A row
            that has room for fewer keeps its highest.

        Returns:
          The mask, of `lead`. It has no gradient.

        Raises:
          TypeError: as in `from_blocks`, or if `scores` are not floating or `num_kept`
            is no whole number.
          ValueError: as in `from_blocks`, or if `num_kept` is out of range.

        Example:
          >>> scores = jnp.array([[3.0, 1.0, 2.0], [-jnp.inf, 0.0, -jnp.inf]])
          >>> print(BlockMask.from_scores(scores, (64, 64), 2).to_blocks())
          [[ True False  True]
           [False  True False]]
        """
        scores = jax.lax.stop_gradient(jnp.asarray(scores))
        if not jnp.issubdtype(scores.dtype, jnp.floating):
            raise TypeError(f"`scores` must be floating; got {jax.typeof(scores)}.")
        check_int("num_kept", num_kept)
        columns = scores.shape[-1] if scores.ndim else 0
        if not 1 <= num_kept <= columns:
            raise ValueError(
                f"`num_kept` must be in [1, {columns}], the block columns; got "
                f"{num_kept}."
            )
        if scores.ndim < 2:
            cls.from_blocks(scores == 0, block_shape)  # says what must hold, and raises
        usable = scores > -jnp.inf  # False for NaN too
        scores = jnp.where(scores == 0, 0, scores)  # top_k ranks -0.0 below 0.0
        capacity = num_kept if capacity is None else capacity
        room = min(num_kept, _rooms(capacity, scores.shape[-2:])[0])
        _, best = jax.lax.top_k(jnp.where(usable, scores, -jnp.inf), room)
        kept = put_in_rows(best, True, columns) & usable
        mask = cls.from_blocks(kept, block_shape, capacity=capacity)
        if room == num_kept:
            return mask
        lost = jnp.any(jnp.sum(usable, axis=-1) > room, axis=-1)
        return dataclasses.replace(mask, overflowed=mask.overflowed | lost)

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Shape in blocks: `(*lead, block_rows, block_columns)`."""
        return (*self.num.shape, self.num_t.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements: `(*lead, rows, columns)`."""
        *lead, rows, columns = self.blocks_shape
        height, width = self.block_shape
        return (*lead, rows * height, columns * width)

    @property
    def T(self) -> "BlockMask":
        """The mask of the transposed matrix; the lists change their roles."""
        return BlockMask(
            self.num_t,
            self.indices_t,
            self.num,
            self.indices,
            self.overflowed,
            (self.block_shape[1], self.block_shape[0]),
        )

    def density(self) -> jax.Array:
        """Computes the share of kept blocks, float32 `[...]`."""
        rows, columns = self.blocks_shape[-2:]
        return jnp.sum(self.num, axis=-1).astype(jnp.float32) / (rows * columns)

    def to_blocks(self) -> jax.Array:
        """Gives one bool a block, `[..., block_rows, block_columns]`."""
        places = along_last(self.indices.shape[-1], self.indices.ndim)
        listed = places < self.num[..., None]
        columns = self.blocks_shape[-1]
        # an entry beyond the count goes to a column that is dropped
        return put_in_rows(jnp.where(listed, self.indices, columns), True, columns)

    def to_dense(self) -> jax.Array:
        """Gives the elementwise mask: each block whole, `[..., rows, columns]`."""
        *lead, rows, columns = self.blocks_shape
        height, width = self.block_shape
        tiled = (*lead, rows, height, columns, width)
        blocks = self.to_blocks()[..., :, None, :, None]
        return reshape_stepwise(jnp.broadcast_to(blocks, tiled), self.shape)

    def __and__(self, other: "BlockMask") -> "BlockMask":
        """The blocks that both keep."""
        return self._combine(other, jnp.logical_and, min)

    def __or__(self, other: "BlockMask") -> "BlockMask":
        """The blocks that either keeps, with room for the lists of both."""
        return self._combine(other, jnp.logical_or, sum)

    def _combine(self, other, operation, room) -> "BlockMask":
        if not isinstance(other, BlockMask):
            return NotImplemented
        mine = (self.block_shape, self.blocks_shape[-2:])
        theirs = (other.block_shape, other.blocks_shape[-2:])
        if mine != theirs:
            raise ValueError(
                "two block masks must have equal blocks, and as many; got "
                f"{mine[1]} blocks of {mine[0]} and {theirs[1]} blocks of {theirs[0]}."
            )
        kept = operation(self.to_blocks(), other.to_blocks())
        capacity = (
            room([self.indices.shape[-1], other.indices.shape[-1]]),
            room([self.indices_t.shape[-1], other.indices_t.shape[-1]]),
        )
        made = BlockMask.from_blocks(kept, self.block_shape, capacity=capacity)
        overflowed = made.overflowed | self.overflowed | other.overflowed
        return dataclasses.replace(made, overflowed=overflowed)


def check_block_shape(block_shape: tuple[int, int]) -> tuple[int, int]:
    """The height and width of a block, as Python integers.

    Args:
      block_shape: `(height, width)`, any integers.

    Returns:
      The two, at least 1.

    Raises:
      TypeError: unless they are two whole numbers.
      ValueError: if one is below 1.

    Example:
      >>> check_block_shape((64, 128))
      (64, 128)
    """
    sizes = tuple(block_shape) if isinstance(block_shape, Iterable) else ()
    if len(sizes) != 2:
        raise TypeError(
            "`block_shape` must be `(height, width)`, as in (128, 128); got "
            f"{block_shape!r}."
        )
    for size in sizes:
        check_int("block_shape", size)
    if min(sizes) < 1:
        raise ValueError(f"`block_shape` must be positive; got {block_shape}.")
    return int(sizes[0]), int(sizes[1])


def _rooms(capacity: Capacity, blocks: tuple[int, ...]) -> tuple[int, int]:
    """The lengths of the lists of a row and of a column."""
    rows, columns = blocks
    asked = capacity if isinstance(capacity, tuple) else (capacity, None)
    if len(asked) != 2:
        raise TypeError(
            f"`capacity` must be one number, or `(of a row, of a column)`; got {asked}."
        )
    for room in asked:
        if room is None:
            continue
        check_int("capacity", room, least=1)
    row_room, column_room = (math.inf if room is None else room for room in asked)
    return int(min(row_room, columns)), int(min(column_room, rows))


def _first(kept: jax.Array, room: int) -> jax.Array:
    """The first `room` True entries along the last axis."""
    if room >= kept.shape[-1]:
        return kept
    return kept & (jnp.cumsum(kept, axis=-1, dtype=jnp.int32) <= room)


def _lists(kept: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
    """Counts and ascending indices of the first `room` True entries of each row."""
    *lead, size = kept.shape
    rows = kept.reshape(math.prod(lead), size)
    total, lists = count_if_few(
        rows,
        len(rows) * room * -(-size // WORD),
        count=functools.partial(_lists_by_bits, room=room),
        otherwise=functools.partial(_lists_by_scatter, room=room),
    )
    num = jnp.minimum(total, room)
    return num.reshape(lead), lists.reshape(*lead, room)


def _lists_by_scatter(rows: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
    """O(blocks), by about ten programs, half of them for the cumulative maximum."""
    slot = jnp.cumsum(rows, axis=-1, dtype=jnp.int32) - 1
    slot = jnp.where(rows, slot, room)  # beyond the list: dropped
    lists = put_in_rows(slot, jnp.arange(rows.shape[-1], dtype=jnp.int32), room)
    lists = jax.lax.cummax(lists, axis=1)  # ascending, so the rest repeats the last
    return jnp.sum(rows, axis=-1, dtype=jnp.int32), lists


def _lists_by_bits(rows: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
    """Each entry by a search, first for the word of 32 bits that has it, then there."""
    words = to_words(rows)
    num_bits = count_bits(words)
    upto = jnp.cumsum(num_bits, axis=-1)
    before, total = upto - num_bits, upto[:, -1]
    # which of the row's True entries; the rest repeats the last
    places = jnp.arange(room, dtype=jnp.int32)[None]
    rank = jnp.minimum(places, total[:, None] - 1)
    words, before, upto = (a[:, None, :] for a in (words, before, upto))
    passed = upto <= rank[..., None]
    here = ~passed & (before <= rank[..., None])
    # sums, not a gather: one program for all three
    index = WORD * jnp.sum(passed, axis=-1, dtype=jnp.int32)
    word = jnp.sum(jnp.where(here, words, 0), axis=-1, dtype=jnp.uint32)
    rank -= jnp.sum(jnp.where(here, before, 0), axis=-1, dtype=jnp.int32)
    return total, index + bit_of_rank(word, rank)

"""`BlockSparse`: a matrix of which only the kept blocks are stored."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from sparsejax._ints import check_int
from sparsejax.formats._block_mask import BlockMask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """The kept blocks of a matrix `[rows, columns]`, one after the other.

    Memory follows what is kept: hold `values` as the parameter, and gradients and
    moments are as small. Blocks stand in row-major order; `values` beyond the kept
    ones are 0 at first, and no operation reads them.

    Attributes:
      values: `[capacity, height, width]`, the kept blocks.
      mask: which blocks they are; without leading axes.

    Example:
      >>> kept = jnp.array([[False, True], [True, False]])
      >>> mask = BlockMask.from_blocks(kept, (1, 2))
      >>> w = BlockSparse.from_dense(jnp.arange(8.0).reshape(2, 4), mask)
      >>> print(w.values)
      [[[2. 3.]]
      <BLANKLINE>
       [[4. 5.]]]
      >>> print(w.to_dense())
      [[0. 0. 2. 3.]
       [4. 5. 0. 0.]]
    """

    values: jax.Array
    mask: BlockMask

    @classmethod
    def from_dense(
        cls,
        matrix: Float[Array, "rows columns"],
        mask: BlockMask,
        *,
        capacity: int | None = None,
    ) -> Self:
        """Stores the kept blocks of a matrix.

        Args:
          matrix: of `mask.shape`.
          mask: which blocks are kept; without leading axes.
          capacity: blocks to make room for. By default the number of kept blocks, or
            of all blocks where that number is traced. Blocks of a traced mask for
            which there is no room are lost: they count as 0.

        Returns:
          The kept blocks, of the dtype of `matrix`.

        Raises:
          TypeError: if the mask is no `BlockMask`.
          ValueError: if the shapes differ, the mask has leading axes, or a concrete
            mask keeps more blocks than there is room for.

        Example:
          See `BlockSparse`.
        """
        matrix = jnp.asarray(matrix)
        if not isinstance(mask, BlockMask):
            raise TypeError(
                f"`mask` must be a BlockMask; got {type(mask).__name__}. Build one by "
                "`sj.BlockMask.from_dense`."
            )
        if len(mask.shape) != 2 or matrix.shape != mask.shape:
            raise ValueError(
                "`matrix` must have the shape of a mask without leading axes; got "
                f"{matrix.shape} and a mask of {mask.shape}."
            )
        total = jnp.sum(mask.num)
        traced = isinstance(total, Tracer)
        if capacity is None:
            rows, columns = mask.blocks_shape
            capacity = rows * columns if traced else max(int(total), 1)
        check_int("capacity", capacity)
        if capacity < 1 or (not traced and int(total) > capacity):
            raise ValueError(
                f"`capacity` must hold all kept blocks; got capacity={capacity} and "
                f"{total} blocks."
            )
        rows, columns = block_positions(mask, capacity)
        used = jnp.arange(capacity) < total
        tiles = _tiles(matrix, mask)[rows, columns]
        return cls(jnp.where(used[:, None, None], tiles, 0), mask)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, `(rows, columns)`."""
        return self.mask.shape

    @property
    def dtype(self):
        """Of the values."""
        return self.values.dtype

    def to_dense(self) -> jax.Array:
        """Gives the matrix, with zeros where a block is not kept."""
        rows, columns = block_positions(self.mask, len(self.values))
        blocks_shape = self.mask.blocks_shape
        used = jnp.arange(len(self.values)) < jnp.sum(self.mask.num)
        rows = jnp.where(used, rows, blocks_shape[0])  # dropped
        tiles = jnp.zeros((*blocks_shape, *self.mask.block_shape), self.values.dtype)
        tiles = tiles.at[rows, columns].set(self.values, mode="drop")
        return tiles.swapaxes(1, 2).reshape(self.shape)


def block_positions(mask: BlockMask, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Where the kept blocks are, in row-major order.

    Args:
      mask: without leading axes.
      capacity: length of the lists; entries beyond the kept blocks are positions too,
        but of no stored block.

    Returns:
      Block rows and block columns, int32 `[capacity]`.

    Example:
      >>> mask = BlockMask.from_blocks(jnp.array([[True, False], [True, True]]), (8, 8))
      >>> rows, columns = block_positions(mask, 3)
      >>> print(rows, columns)
      [0 1 1] [0 0 1]
    """
    ends = jnp.cumsum(mask.num)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.searchsorted(ends, slot, side="right").astype(jnp.int32)
    row = jnp.minimum(row, len(ends) - 1)
    within = slot - (ends - mask.num)[row]
    within = jnp.clip(within, 0, mask.indices.shape[1] - 1)
    return row, jnp.asarray(mask.indices)[row, within]  # it may be of NumPy


def block_slots(mask: BlockMask) -> tuple[jax.Array, jax.Array]:
    """Where in `values` the blocks of each list stand.

    Args:
      mask: without leading axes.

    Returns:
      int32, of the shapes of `mask.indices` and `mask.indices_t`; entries beyond a
      count repeat the last.

    Example:
      >>> mask = BlockMask.from_blocks(jnp.array([[True, False], [True, True]]), (8, 8))
      >>> slots, slots_t = block_slots(mask)
      >>> print(slots[1], slots_t[0])
      [1 2] [0 1]
    """
    starts = (jnp.cumsum(mask.num) - mask.num)[:, None]
    within = jnp.arange(mask.indices.shape[1], dtype=jnp.int32)[None]
    slots = starts + jnp.clip(within, 0, jnp.maximum(mask.num - 1, 0)[:, None])
    position = jnp.zeros(mask.blocks_shape, jnp.int32)
    rows = jnp.arange(len(slots))[:, None]
    # an entry beyond the count goes to a column that is dropped
    to = jnp.where(within < mask.num[:, None], mask.indices, mask.blocks_shape[1])
    position = position.at[rows, to].set(slots, mode="drop")
    columns = jnp.arange(len(mask.num_t))[:, None]
    return slots, position[mask.indices_t, columns]


def _tiles(matrix: jax.Array, mask: BlockMask) -> jax.Array:
    """`[block_rows, block_columns, height, width]`."""
    (rows, columns), (height, width) = mask.blocks_shape, mask.block_shape
    return matrix.reshape(rows, height, columns, width).swapaxes(1, 2)

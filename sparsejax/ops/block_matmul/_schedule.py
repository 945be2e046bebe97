"""Who computes what: the tiles of a product with lists of unequal length, shared out.

Pure jnp on a few hundred numbers, so that a new topology needs no host.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.formats import BlockMask

_REGION = 16  # blocks along either side of a region that is finished before the next


def shares(costs: jax.Array, *, copies: int, windows: int, programs: int) -> jax.Array:
    """Cuts the tiles of every window into consecutive shares of about equal cost.

    A window holds `copies` tiles of each list, list after list; all windows are alike,
    and all programs work on one window at a time, so that they read the same rows. A
    share ends at a whole tile. The rounding differs from window to window by
    `1 / windows` of a tile: over all windows the error of a program is below one tile,
    since `sum_g floor(y + g / windows) = floor(windows * y)`.

    Args:
      costs: float32 `[lists]`, positive: of one tile of each list.
      copies: tiles of a list in a window.
      windows: number of windows.
      programs: to share among.

    Returns:
      int32 `[windows, programs + 1]`: program p has the tiles `[s[g, p], s[g, p + 1])`
      of window g, of `len(costs) * copies`.

    Example:
      >>> costs = jnp.array([3.0, 1.0, 1.0, 1.0])
      >>> print(shares(costs, copies=2, windows=1, programs=4))
      [[0 1 2 5 8]]
    """
    ends = jnp.cumsum(costs)
    targets = ends[-1] / programs * jnp.arange(programs + 1, dtype=jnp.float32)
    index = jnp.sum(ends[None, :] <= targets[:, None], axis=1)
    index = jnp.minimum(index, len(costs) - 1)
    within = (targets - (ends - costs)[index]) / costs[index]
    tiles = (index + jnp.clip(within, 0, 1)) * copies
    shift = (jnp.arange(windows, dtype=jnp.float32) + 0.5) / windows
    cut = jnp.floor(tiles[None, :] + shift[:, None]).astype(jnp.int32)
    last = len(costs) * copies
    edge = jnp.arange(programs + 1)
    return jnp.where(edge == 0, 0, jnp.where(edge == programs, last, cut))


def kept_first(mask: BlockMask) -> tuple[jax.Array, jax.Array]:
    """All blocks in an order in which the kept ones come first, region by region.

    Blocks that are worked on at a time lie in a region of few rows and few columns, so
    that what they read of either operand is read by many of them.

    Args:
      mask: without leading axes.

    Returns:
      int32 `[block_rows * block_columns]`, `row * block_columns + column` of each; and
      the number of kept blocks, int32.

    Example:
      >>> mask = BlockMask.from_blocks(jnp.array([[False, True], [True, True]]), (8, 8))
      >>> print(*kept_first(mask))
      [1 2 3 0] 3
    """
    rows, columns = mask.blocks_shape
    ids = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    by_region = np.concatenate(
        [
            ids[r : r + _REGION, c : c + _REGION].reshape(-1)
            for r in range(0, rows, _REGION)
            for c in range(0, columns, _REGION)
        ]
    )
    kept = mask.to_blocks().reshape(-1)[by_region]
    num_kept = jnp.sum(kept, dtype=jnp.int32)
    rank = jnp.cumsum(kept, dtype=jnp.int32)
    other = num_kept + jnp.arange(len(by_region), dtype=jnp.int32) - rank
    place = jnp.where(kept, rank - 1, other)
    order = jnp.zeros(len(by_region), jnp.int32).at[place].set(by_region)
    return order, num_kept

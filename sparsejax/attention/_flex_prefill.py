"""FlexPrefill: vertical-slash with as many lines as a share of the attention takes."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax.attention import _arguments
from sparsejax.attention._vertical_slash import (
    blocks_of_lines,
    highest_lines,
    line_sums,
)
from sparsejax.formats import BlockMask


def flex_prefill(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    alpha: ArrayLike = 0.65,
    min_budget: int = 512,
    window: int = 512,
    sink: int = 4,
    local: int = 64,
    block_shape: tuple[int, int] = (64, 64),
    per_head: bool = True,
    causal: Literal[True] = True,
    lengths: ArrayLike | None = None,
) -> BlockMask:
    """Keeps the columns and diagonals that hold a share `alpha` of the last weights.

    As `vertical_slash`, with budgets that differ by head and input: the highest means
    over the window, in descending order, are kept while their sum is at most `alpha`,
    and the one after these; at least `min_budget` are. Columns and diagonals are
    budgeted apart, before the sink and the local distances take their places.

    Args:
      query: see `vertical_slash`.
      key: likewise.
      alpha: share of the weights, in [0, 1]; may be traced.
      min_budget: least number of columns, and of diagonals; at most `seq`.
      window: how many of the last queries are asked.
      sink: first keys that are always kept; they count in the budget.
      local: shortest distances that are always kept, at least 1; they count too.
      block_shape: `(height, width)`, queries and keys of a block.
      per_head: see `vertical_slash`.
      causal: there is no other form; taken as `sj.nn.BlockAttention` passes it.
      lengths: see `vertical_slash`.

    Returns:
      As `vertical_slash`. The lists have room for all blocks, since no shape may depend
      on the data.

    Raises:
      ValueError: as `vertical_slash`, or if `alpha` is out of range.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> for alpha in (0.1, 0.3):
      ...     mask = sj.attention.flex_prefill(
      ...         x, x, alpha=alpha, min_budget=4, window=8, local=4, block_shape=(8, 8)
      ...     )
      ...     print(f"{sj.attention.pair_density(mask, 64)[0, 0]:.3f}")
      0.538
      0.877

    References:
      Lai et al., 2025, https://arxiv.org/abs/2502.20766, without its query-aware
      branch, as in Nawrot et al., 2025, https://arxiv.org/abs/2504.17768.
    """
    _arguments.check_causal(causal)
    _arguments.check_square(query, key, block_shape)
    _arguments.check_prompt(query, key, window)
    keys = key.shape[1]
    _arguments.check_ends(local, sink, keys, least_local=1)
    _arguments.check_count("min_budget", min_budget, max(sink, local), keys, "keys")
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], a share; got {alpha}.")
    lengths = _arguments.prompt_lengths(query, key, lengths)
    asked = window
    if lengths is not None:
        asked = jnp.minimum(lengths, window).astype(jnp.float32)[:, None, None]
    vertical, slash = line_sums(query, key, window, per_head, lengths)

    def kept(sums, num_first):
        budget = _budget(sums / asked, alpha, min_budget)
        return highest_lines(sums, budget, num_first, lengths)

    columns, offsets = kept(vertical, sink), kept(slash, local)
    return blocks_of_lines(columns, offsets, block_shape, lengths)


def _budget(shares: jax.Array, alpha: ArrayLike, min_budget: int) -> jax.Array:
    """How many of the `shares`, which sum to 1, are kept; int32 `[...]`."""
    highest = jnp.sort(shares, axis=-1, descending=True)
    below = jnp.cumsum(highest, axis=-1) <= alpha
    needed = jnp.sum(below, axis=-1, dtype=jnp.int32) + 1
    return jnp.clip(needed, min_budget, shares.shape[-1])

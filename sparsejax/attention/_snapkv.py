"""SnapKV and Ada-SnapKV: which keys of a prompt stay in the cache."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax import ops
from sparsejax.attention import _arguments, _window
from sparsejax.attention._ranking import ends, keep_highest, nan_last
from sparsejax.formats import KeyLists


def snapkv(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    *,
    num_kept: int = 1024,
    window: int = 256,
    pool_size: int = 21,
    local: int = 128,
    sink: int = 4,
    lengths: ArrayLike | None = None,
) -> KeyLists:
    """Keeps the keys that the last queries of a prompt attend to most.

    A key's importance is the sum of the causal weights of the last `window` queries,
    a mean over the query heads that share its key head, then smoothed along the keys.
    Evict once, after the prefill: later queries never see the dropped keys.

    Args:
      query: rotated queries, the last of the prompt; only `window` of them are read.
        With `lengths` all of the prompt.
      key: rotated keys, all of the prompt; `kv_heads` divides `heads`.
      num_kept: keys that each key head keeps, exactly, those at the ends among them;
        all of a prompt that has fewer. At most `keys`. Of equal importances the earlier
        key wins; a NaN is kept last.
      window: how many of the last queries are asked; all of a prompt that has fewer.
      pool_size: keys of the moving average, odd. Beyond the ends lie zeros, which count
        in its divisor.
      local: last keys that are always kept.
      sink: first keys that are always kept.
      lengths: int32 `[batch]` or one integer, in `[1, keys]`: tokens of each prompt;
        what lies behind them is not read. All by default.

    Returns:
      Lists of single keys, `[batch, kv_heads, num_kept]`. No gradient.

    Raises:
      ValueError: if shapes disagree, `window` is longer than the queries, `pool_size`
        is even, or `num_kept` is more than the keys or below what is always kept; or if
        `lengths` are not integers in their range that fit, or there are fewer queries
        than keys beside them.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> lists = sj.attention.snapkv(
      ...     x, x, num_kept=6, window=8, pool_size=3, local=2, sink=1
      ... )
      >>> print(lists.indices[0], lists.density(64)[0, 0])
      [[ 0 57 60 61 62 63]
       [ 0 58 59 60 62 63]] 0.09375

    References:
      Li et al., 2024, https://arxiv.org/abs/2404.14469, as in Nawrot et al., 2025,
      https://arxiv.org/abs/2504.17768 (The Sparse Frontier).
    """
    _check(query, key, lengths, window, pool_size, local, sink)
    least = max(1, min(local + sink, key.shape[1]))
    _arguments.check_count(
        "num_kept", num_kept, least, key.shape[1], "keys", always=_arguments.ENDS
    )
    lengths = _arguments.prompt_lengths(query, key, lengths)
    there, always = ends(key.shape[1], lengths, sink=sink, local=local)
    weights = _window.window_weights(query, key, window, lengths)
    importance = _smoothed(weights.mean(axis=2).sum(axis=2), pool_size)
    kept = keep_highest(nan_last(importance, there), num_kept, always=always)
    return KeyLists.from_mask(kept & there, capacity=num_kept)


def ada_snapkv(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    *,
    num_kept: int = 1024,
    min_share: float = 0.2,
    window: int = 256,
    pool_size: int = 21,
    local: int = 128,
    sink: int = 4,
    lengths: ArrayLike | None = None,
) -> KeyLists:
    """Keeps the keys of highest importance in all heads together, some in each.

    As `snapkv`, but a key's importance is the highest weight of any asked query and of
    any head that shares it. Each key head first keeps its own best; the rest of the
    budget goes to the best pairs of head and key that are left.

    Args:
      query: see `snapkv`.
      key: likewise.
      num_kept: mean number of keys of a key head: together they keep `kv_heads *
        num_kept`, exactly; all of a prompt that has fewer. At most `keys`. Of equal
        importances the earlier head wins, then the earlier key.
      min_share: of `num_kept`, what each head keeps at least, rounded down; the keys at
        the ends are always kept, and count.
      window: see `snapkv`.
      pool_size: likewise.
      local: likewise.
      sink: likewise.
      lengths: likewise.

    Returns:
      Lists of single keys, `[batch, kv_heads, capacity]`, of unlike lengths `num`. The
      capacity is static: the most that one head can get.

    Raises:
      ValueError: as `snapkv`, or if `min_share` is not in [0, 1].

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> lists = sj.attention.ada_snapkv(
      ...     x, x, num_kept=6, window=8, pool_size=3, local=2, sink=1
      ... )
      >>> print(lists.num, lists.indices.shape)
      [[5 7]] (1, 2, 9)

    References:
      Feng et al., 2024, https://arxiv.org/abs/2407.11550, as in Nawrot et al., 2025,
      https://arxiv.org/abs/2504.17768 (The Sparse Frontier).
    """
    _check(query, key, lengths, window, pool_size, local, sink)
    keys, kv_heads = key.shape[1:3]
    least = max(1, min(local + sink, keys))
    _arguments.check_count(
        "num_kept", num_kept, least, keys, "keys", always=_arguments.ENDS
    )
    if not 0 <= min_share <= 1:
        raise ValueError(f"`min_share` must be in [0, 1], a share; got {min_share}.")
    lengths = _arguments.prompt_lengths(query, key, lengths)
    there, always = ends(key.shape[1], lengths, sink=sink, local=local)
    weights = _window.window_weights(query, key, window, lengths)
    importance = nan_last(_smoothed(weights.max(axis=(2, 3)), pool_size), there)
    own = max(int(min_share * num_kept), least)
    kept = keep_highest(importance, own, always=always)
    if shared := kv_heads * (num_kept - own):
        left = jnp.where(kept, -jnp.inf, importance)
        left = left.reshape(len(kept), kv_heads * keys)
        best = ops.keep_highest(left, shared)
        kept |= best.reshape(kept.shape)
    # a prompt of no more than `num_kept` has no more left than is shared
    return KeyLists.from_mask(kept & there, capacity=min(keys, own + shared))


def _check(query, key, lengths, window, pool_size, local, sink) -> None:
    _arguments.check_prompt(query, key, window)
    queries, keys = query.shape[1], key.shape[1]
    if lengths is not None and queries != keys:
        raise ValueError(
            "`query` must be of all the prompt where there are `lengths`, for the last "
            f"of each; got {queries} queries and {keys} keys."
        )
    _arguments.check_ends(local, sink, keys)
    if pool_size < 1 or pool_size % 2 == 0:
        raise ValueError(
            f"`pool_size` must be odd and at least 1; got {pool_size}. Take one more "
            "or one less: an even number of keys has no middle one."
        )


def _smoothed(x: jax.Array, size: int) -> jax.Array:
    """The mean of `size` neighbours along the last axis, of zeros beyond its ends."""
    ones = (1,) * (x.ndim - 1)
    padding = ((0, 0),) * (x.ndim - 1) + ((size // 2, size // 2),)
    sums = jax.lax.reduce_window(
        x, 0.0, jax.lax.add, (*ones, size), (1,) * x.ndim, padding
    )
    return sums / size

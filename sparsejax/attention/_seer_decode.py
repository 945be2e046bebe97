"""The SeerAttention gate in decoding: one query, one choice for each key head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sparsejax._promotion import along_last, to_rank
from sparsejax.attention._arguments import (
    cache_lengths,
    check_next,
    check_sequences,
    check_tokens,
)
from sparsejax.attention._seer import (
    KEY_POOLS,
    Rotate,
    check_sizes,
    check_weights,
    key_features,
)
from sparsejax.attention._seer_select import most_kept, threshold_kept, topk_kept
from sparsejax.attention._slots import change_slots
from sparsejax.formats import KeyLists


class SeerDecodeGate(NamedTuple):
    """Weights of the decoding gate of one layer.

    Attributes:
      query: `[kv_heads, group, head_dim, d_gate]`: the query heads that share a key
        head are projected together.
      key: `[kv_heads, 3 head_dim, d_gate]`.
      query_norm: `[d_gate]`, scale of an RMSNorm of the projected; None for none.
      key_norm: likewise.
    """

    query: jax.Array
    key: jax.Array
    query_norm: jax.Array | None
    key_norm: jax.Array | None


class SeerCache(NamedTuple):
    """What the gate keeps of the keys so far; a pytree of constant shapes.

    Built by `seer_cache`, kept up by `append_to_seer_cache`.

    Attributes:
      gated_keys: `[batch, blocks, kv_heads, d_gate]`, of each finished block, rotated.
      tail: `[batch, block, kv_heads, head_dim]`, keys of the block that is not.
      lengths: int32 `[batch]`, tokens so far.
    """

    gated_keys: jax.Array
    tail: jax.Array
    lengths: jax.Array


def init_seer_decode_gate(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    key: jax.Array,
    d_gate: int = 128,
    norm: bool = True,
) -> SeerDecodeGate:
    """Draws a decoding gate, Xavier-uniform in each key head.

    Args:
      num_heads: query heads.
      num_kv_heads: key heads; divides `num_heads`.
      head_dim: width of queries and keys.
      key: random key.
      d_gate: width of what the gate compares; even, for the rotation.
      norm: whether the projected have an RMSNorm.

    Returns:
      float32 weights.

    Raises:
      ValueError: if a size is below 1, `d_gate` is odd, or the heads do not divide.
    """
    check_sizes(num_heads, num_kv_heads, head_dim, d_gate)
    of_query, of_key = jax.random.split(key)

    def draw(key: jax.Array, d_in: int) -> jax.Array:
        reach = (6 / (d_in + d_gate)) ** 0.5
        shape = (num_kv_heads, d_in, d_gate)
        return jax.random.uniform(key, shape, jnp.float32, -reach, reach)

    group = num_heads // num_kv_heads
    query = draw(of_query, group * head_dim)
    query = query.reshape(num_kv_heads, group, head_dim, d_gate)
    scale = jnp.ones(d_gate, jnp.float32) if norm else None
    return SeerDecodeGate(query, draw(of_key, len(KEY_POOLS) * head_dim), scale, scale)


def seer_decode_scores(
    gate: SeerDecodeGate,
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    block: int,
    rotate: Rotate,
) -> Float[Array, "batch kv_heads seq blocks"]:
    """Scores for each token the blocks before its own: the form for training.

    Args:
      gate: weights.
      query: before rotation; not pooled, and rotated to their own position.
      key: before rotation; pooled as in `seer_scores`.
      block: tokens of a block, in `[1, seq]`.
      rotate: see `Rotate`.

    Returns:
      float32; -inf for a token's own block and those after it. Gradients reach `gate`
      alone.

    Raises:
      ValueError: if shapes disagree, also those of `gate`, or `block` is out of range.

    References:
      Gao et al., 2025, https://arxiv.org/abs/2506.08889 (SeerAttention-R), and the code
      released with it.
    """
    check_sequences(query, key, block)
    _check_gate(gate, query.shape[2:], key.shape[2])
    query, key = jax.lax.stop_gradient((query, key))
    length = query.shape[1]
    gated_query = _gated_query(gate, query, jnp.arange(length)[None], rotate)
    starts = jnp.arange(0, length, block)[None]
    gated_key = _gated_key(gate, key_features(key, block), starts, rotate)
    return _scores(gated_query, gated_key, _own(block, jnp.arange(length)[None]))


def seer_cache(
    gate: SeerDecodeGate,
    key: Float[Array, "batch slots kv_heads head_dim"],
    *,
    block: int,
    rotate: Rotate,
    lengths: ArrayLike | None = None,
) -> SeerCache:
    """Pools and projects the finished blocks of a cache of keys.

    Scores are as if the keys were appended one by one.

    Args:
      gate: weights.
      key: keys before rotation, or a cache of them with slots for more; what is
        appended beyond its slots is not scored.
      block: tokens of a block, in `[1, slots]`.
      rotate: see `Rotate`.
      lengths: int32 `[batch]` or one integer, in `[0, slots]`: keys that are there;
        what lies in the slots behind them is not read. All by default.

    Raises:
      ValueError: if `key` has other axes or does not fit `gate`, `lengths` are not
        integers in their range that fit it, or `block` is out of range.
    """
    check_tokens("key", key)
    num_slots = key.shape[1]
    want = gate.key.shape[0], gate.key.shape[1] // len(KEY_POOLS)
    if key.shape[2:] != want:
        raise ValueError(
            f"`key` must be [batch, slots, {want[0]}, {want[1]}], by `gate`; got shape "
            f"{key.shape}. Is it the gate of another model?"
        )
    if not 1 <= block <= num_slots:
        raise ValueError(
            f"`block` must be in [1, {num_slots}], the slots of the cache; got "
            f"{block}. Choose smaller blocks or a longer cache."
        )
    lengths = cache_lengths(key, lengths)
    whole, finished = num_slots // block, (lengths // block)[:, None]
    features = key_features(key[:, : whole * block], block)
    gated = _gated_key(gate, features, block * jnp.arange(whole)[None], rotate)
    is_whole = jnp.arange(whole)[None] < finished
    gated = jnp.where(is_whole[..., None, None], gated, 0)
    rest = -(-num_slots // block) - whole
    gated = jnp.pad(gated, [(0, 0), (0, rest), (0, 0), (0, 0)])
    at = block * finished + jnp.arange(block)[None]
    in_key = jnp.minimum(at, num_slots - 1)[..., None, None]
    tail = jnp.take_along_axis(key, in_key, axis=1)
    tail = jnp.where((at < lengths[:, None])[..., None, None], tail, 0)
    return SeerCache(gated, tail, lengths)


def append_to_seer_cache(
    gate: SeerDecodeGate,
    cache: SeerCache,
    key: Float[Array, "batch 1 kv_heads head_dim"],
    *,
    rotate: Rotate,
) -> SeerCache:
    """Appends the key of one token; a block that it finishes is pooled and projected.

    Args:
      gate: weights.
      cache: of the tokens before.
      key: before rotation.
      rotate: see `Rotate`.

    Returns:
      The cache with the token; same shapes, for `jax.lax.scan`.

    Raises:
      ValueError: if `key` does not fit the cache.
    """
    batch, block, kv_heads, head_dim = cache.tail.shape
    check_next("key", key, batch, kv_heads, head_dim)
    row, slot = jnp.divmod(cache.lengths, block)
    tail = change_slots(cache.tail, slot, lambda _: key)
    gated = _gated_key(gate, key_features(tail, block), (row * block)[:, None], rotate)
    beyond = cache.gated_keys.shape[1]  # of a block that is not finished
    finished = jnp.where(slot == block - 1, row, beyond)
    gated_keys = change_slots(cache.gated_keys, finished, lambda _: gated)
    return SeerCache(gated_keys, tail, cache.lengths + 1)


def seer_cached_scores(
    gate: SeerDecodeGate,
    cache: SeerCache,
    query: Float[Array, "batch 1 heads head_dim"],
    *,
    rotate: Rotate,
) -> Float[Array, "batch kv_heads 1 blocks"]:
    """Scores the blocks before that of the last token: a row of `seer_decode_scores`.

    Args:
      gate: weights.
      cache: with the token's own key appended.
      query: of that token, before rotation.
      rotate: see `Rotate`.

    Returns:
      float32; -inf for the token's own block and those after it.

    Raises:
      ValueError: if `query` or `gate` do not fit.

    Example:
      >>> import functools
      >>> rotate = functools.partial(sj.nn.apply_rope, base=1e4)
      >>> gate = init_seer_decode_gate(2, 2, 8, d_gate=8, key=jax.random.key(0))
      >>> x = jax.random.normal(jax.random.key(1), (1, 10, 2, 8))
      >>> slots = jnp.pad(x, [(0, 0), (0, 6), (0, 0), (0, 0)])
      >>> cache = seer_cache(gate, slots, lengths=9, block=4, rotate=rotate)
      >>> cache = append_to_seer_cache(gate, cache, x[:, 9:], rotate=rotate)
      >>> scores = seer_cached_scores(gate, cache, x[:, 9:], rotate=rotate)
      >>> print(jnp.isfinite(scores[0, 0]))  # the token is in the third block
      [[ True  True False False]]
    """
    if query.ndim != 4 or query.shape[1] != 1:
        raise ValueError(f"`query` must be of one token; got shape {query.shape}.")
    _check_gate(gate, query.shape[2:], cache.tail.shape[2])
    positions = cache.lengths[:, None] - 1
    gated_query = _gated_query(gate, query, positions, rotate)
    own = _own(cache.tail.shape[1], positions)
    return _scores(gated_query, cache.gated_keys, own)


def seer_decode_topk(
    scores: Float[Array, "batch kv_heads 1 blocks"],
    *,
    num_kept: ArrayLike,
    block: int,
    positions: Int[Array, "#batch 1"],
) -> KeyLists:
    """Keeps the blocks of highest score for a token, and its own.

    Args:
      scores: of `seer_cached_scores`, or those of `seer_decode_scores` for one token.
      num_kept: blocks of a token, its own among them: a budget in tokens over `block`.
        One number, or one for each key head; may be traced.
      block: tokens of a block.
      positions: of the token of each sequence, or of all.

    Returns:
      Lists of blocks, `[batch, kv_heads, num_kept]`; the most of them where heads
      differ, and room for all where it is traced. The token's own block is kept whole:
      `sj.ops.listed_attention` leaves out what lies behind the token. No gradient.

    Raises:
      ValueError: as `seer_topk`, or if `scores` are not of one token.

    Example:
      >>> scores = jnp.array([3.0, 1.0, 2.0, -jnp.inf, -jnp.inf])[None, None, None]
      >>> lists = seer_decode_topk(
      ...     scores, num_kept=3, block=64, positions=jnp.array([[200]])
      ... )
      >>> print(lists.indices[0, 0], lists.page_size)
      [0 2 3] 64
    """
    _check_one_token(scores)
    kept = topk_kept(scores, _own(block, positions), num_kept)
    return _listed(kept, block, capacity=most_kept(num_kept))


def seer_decode_threshold(
    scores: Float[Array, "batch kv_heads 1 blocks"],
    *,
    threshold: ArrayLike,
    block: int,
    positions: Int[Array, "#batch 1"],
) -> KeyLists:
    """Keeps the blocks whose softmax of scores is above a threshold, and its own.

    Args:
      scores: see `seer_decode_topk`.
      threshold: of a row's softmax; may be traced.
      block: tokens of a block.
      positions: of the token of each sequence, or of all.

    Returns:
      As `seer_decode_topk`, with room for all blocks.

    Raises:
      ValueError: if `scores` are not of one token.
    """
    _check_one_token(scores)
    return _listed(threshold_kept(scores, _own(block, positions), threshold), block)


def _listed(kept: jax.Array, block: int, capacity: int | None = None) -> KeyLists:
    """The blocks of the one token, `[batch, kv_heads, 1, blocks]`, as lists."""
    return KeyLists.from_mask(kept[:, :, 0], page_size=block, capacity=capacity)


def _own(block: int, positions: jax.Array) -> jax.Array:
    """The block of each query, `[1 | batch, 1, queries]`."""
    return (positions // block)[:, None]


def _check_one_token(scores: jax.Array) -> None:
    if scores.ndim != 4 or scores.shape[2] != 1:
        raise ValueError(
            "`scores` must be of one token, [batch, kv_heads, 1, blocks]; got shape "
            f"{scores.shape}."
        )


def _check_gate(gate: SeerDecodeGate, of_query: tuple[int, ...], kv_heads: int) -> None:
    heads, dim = of_query
    d_gate = gate.key.shape[-1]
    wanted = {
        "query": (kv_heads, heads // kv_heads, dim, d_gate),
        "key": (kv_heads, len(KEY_POOLS) * dim, d_gate),
    }
    check_weights(gate, wanted, (heads, kv_heads), dim)


def _gated_query(gate, query, positions, rotate: Rotate) -> jax.Array:
    kv_heads, group = gate.query.shape[:2]
    query = query.reshape(*query.shape[:2], kv_heads, group, -1).astype(jnp.float32)
    projected = jnp.einsum("bskgi,kgio->bsko", query, gate.query)
    return rotate(_normed(projected, gate.query_norm), positions)


def _gated_key(gate, features, starts, rotate: Rotate) -> jax.Array:
    projected = jnp.einsum("bnki,kio->bnko", features, gate.key)
    return rotate(_normed(projected, gate.key_norm), starts)


def _normed(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    if scale is None:
        return x
    norm = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x * norm * to_rank(scale, x.ndim)


def _scores(gated_query, gated_key, own) -> jax.Array:
    scores = jnp.einsum("bskd,bnkd->bksn", gated_query, gated_key)
    scores *= gated_key.shape[-1] ** -0.5
    earlier = along_last(scores.shape[-1], own.ndim + 1) < own[..., None]
    return jnp.where(earlier, scores, -jnp.inf)

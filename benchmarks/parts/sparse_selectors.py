"""Selectors of `sparsejax.attention` by name, each set to keep a share of the keys.

A new one is one more entry. Budgets are what comes nearest to a density from below, but
at least what a selector always keeps; what is really kept is measured.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import attention
from sparsejax.attention import LabelChannels
from sparsejax.formats import BlockMask, KeyLists

SINK, LOCAL = 4, 8  # first and last keys that are always kept, where a method does
WINDOW = 32  # last queries that are asked
PSA_LEVELS = (1, 2, 4)
LABEL = 4  # a head's channels over those of a label of Double Sparsity


class Seen(NamedTuple):
    """What a selector of a prefill may look at in one layer.

    Attributes:
      query: rotated, `[batch, seq, heads, head_dim]`.
      key: rotated, `[batch, seq, kv_heads, head_dim]`.
      gate: scores of SeerAttention's gate, `[batch, heads, blocks, blocks]`.
    """

    query: jax.Array
    key: jax.Array
    gate: jax.Array

    @property
    def num_blocks(self) -> int:
        return self.gate.shape[-1]

    @property
    def side(self) -> int:
        """Tokens of a block."""
        return self.query.shape[1] // self.num_blocks

    @property
    def shape(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def pooling(self) -> dict[str, Any]:
        """Settings of those that compare pooled queries and keys."""
        return {"block_shape": self.shape, "causal": True, "per_head": True}

    @property
    def asking(self) -> dict[str, Any]:
        """Settings of those that ask the last queries."""
        budgets = {"window": WINDOW, "sink": SINK, "local": LOCAL}
        return budgets | {"block_shape": self.shape}

    def count(self, density: float, least: int = 1) -> int:
        """The most blocks of a row that keep no more than that share of the pairs.

        Causality leaves the block of the queries half in sight, early rows have fewer.
        """
        n, side, kept = self.num_blocks, self.side, np.arange(1, self.num_blocks + 1)
        whole = kept * n - kept * (kept - 1) // 2 - n
        pairs = whole * side**2 + n * side * (side + 1) // 2
        fitting = pairs <= density * pairs[-1]
        return max(int(fitting.sum()), min(least, n))


class Cached(NamedTuple):
    """What a selector of decoding may look at in one layer.

    Attributes:
      asked: rotated last queries of the prompt, `[batch, WINDOW, heads, head_dim]`.
      query: rotated query at hand, `[batch, 1, heads, head_dim]`.
      key: cache of rotated keys, `[batch, slots, kv_heads, head_dim]`.
      prompt: static, how many of them are the prompt's.
      length: how many there are.
      channels: of this layer's labels, found on other sequences.
      gate: scores of SeerAttention's gate for decoding, `[batch, kv_heads, 1, blocks]`.
    """

    asked: jax.Array
    query: jax.Array
    key: jax.Array
    prompt: int
    length: jax.Array
    channels: LabelChannels
    gate: jax.Array


def topk_blocks(seen: Seen, density: float) -> BlockMask:
    return attention.topk_blocks(
        seen.query,
        seen.key,
        num_kept=seen.count(density),
        **seen.pooling,
    )


def statistical_topk_blocks(seen: Seen, density: float) -> BlockMask:
    return attention.statistical_topk_blocks(
        seen.query,
        seen.key,
        k=seen.count(density),
        **seen.pooling,
    )


def block_sparse(seen: Seen, density: float) -> BlockMask:
    return attention.block_sparse(
        seen.query,
        seen.key,
        num_kept=seen.count(density, least=3),
        block_shape=seen.shape,
    )


def vertical_slash(seen: Seen, density: float) -> BlockMask:
    """Of the pairs that are in sight a line holds one in `seq`, on average."""
    length = seen.query.shape[1]
    lines = max(LOCAL, int(density * length / 2))
    return attention.vertical_slash(
        seen.query,
        seen.key,
        num_vertical=lines,
        num_slash=lines,
        **seen.asking,
    )


def flex_prefill(seen: Seen, density: float) -> BlockMask:
    """Its budget is a share of the attention, not of the keys: the density is that."""
    return attention.flex_prefill(
        seen.query,
        seen.key,
        alpha=density,
        min_budget=LOCAL,
        **seen.asking,
    )


def seer(seen: Seen, density: float) -> BlockMask:
    return attention.seer_topk(
        seen.gate, num_kept=seen.count(density), block=seen.side, dense_last_rows=0
    )


def oracle(seen: Seen, density: float) -> BlockMask:
    """The blocks with the highest single weights of the true map: no method."""
    peaks = attention.seer_target(seen.query, seen.key, block=seen.side)
    return seer(seen._replace(gate=_in_sight(peaks)), density)


def random(seen: Seen, density: float) -> BlockMask:
    """Drawn blocks, and the queries' own: what a method must beat."""
    draw = jax.random.uniform(jax.random.key(0), seen.gate.shape)
    return seer(seen._replace(gate=_in_sight(draw)), density)


def psa(
    seen: Seen, density: float, width: int | None = None, stride: int = 16
) -> jax.Array:
    """Half of the density at level 1, a quarter at 2, a quarter at 4: levels.

    Blocks have `width` keys; by default as many as queries, or so many more that pooled
    ones fill the tiles of the kernels, whose least side is 128. Of the scores one in
    `stride` is computed.
    """
    width = width or seen.side * (PSA_LEVELS[-1] if seen.side >= 128 else 1)
    importance = attention.antidiagonal_importance(
        seen.query,
        seen.key,
        stride=min(stride, seen.side),
        block_shape=(seen.side, width),
        causal=True,
    )
    shares = (density / 2, density, min(1.0, 2 * density))
    last_query = seen.side * (1 + jnp.arange(seen.num_blocks)[:, None]) - 1
    return attention.quota_levels(
        importance,
        bounds=tuple(zip(PSA_LEVELS, shares, strict=True)),
        full=jnp.arange(importance.shape[-1]) == last_query // width,
    )


def quest(cached: Cached, density: float, page_size: int = 16) -> KeyLists:
    bounds = attention.page_bounds(
        cached.key, lengths=cached.length, page_size=page_size
    )
    pages = bounds.low.shape[1]
    num_kept = min(max(round(density * pages), 1), pages) - 1  # and the query's own
    return attention.quest(cached.query, bounds, num_kept=num_kept)


def double_sparsity(cached: Cached, density: float) -> KeyLists:
    labels = attention.key_labels(cached.key, cached.channels, lengths=cached.length)
    num_slots = cached.key.shape[1]
    num_kept = min(max(round(density * num_slots), SINK + LOCAL), num_slots)
    return attention.double_sparsity(
        cached.query, labels, num_kept=num_kept, sink=SINK, local=LOCAL
    )


def seer_decode(cached: Cached, density: float) -> KeyLists:
    blocks = cached.gate.shape[-1]
    return attention.seer_decode_topk(
        cached.gate,
        num_kept=max(round(density * blocks), 1),
        block=-(-cached.key.shape[1] // blocks),
        positions=cached.length[None, None] - 1,
    )


def evicted(
    select: Callable[..., KeyLists], cached: Cached, density: float
) -> KeyLists:
    """What a selector leaves of the prompt, and all that was decoded since."""
    num_slots = cached.key.shape[1]
    least = min(SINK + LOCAL, cached.prompt)
    lists = select(
        cached.asked,
        cached.key[:, : cached.prompt],
        num_kept=min(max(int(density * cached.prompt), least), cached.prompt),
        window=cached.asked.shape[1],
        pool_size=3,
        local=LOCAL,
        sink=SINK,
    )
    kept = lists.to_mask(num_slots) | (jnp.arange(num_slots) >= cached.prompt)
    capacity = lists.indices.shape[-1] + num_slots - cached.prompt
    return KeyLists.from_mask(kept, capacity=min(capacity, num_slots))


def recent(cached: Cached, density: float) -> KeyLists:
    """The first keys and the last ones: what a method must beat."""
    num_slots = cached.key.shape[1]
    num_kept = max(int(density * num_slots), SINK + LOCAL)
    at = jnp.arange(num_slots)
    kept = (at < SINK) | (at >= cached.length - (num_kept - SINK))
    lists = KeyLists.from_mask(kept & (at < cached.length), capacity=num_kept)
    return jax.tree.map(lambda a: a[None, None], lists)


PREFILL: Mapping[str, Callable[[Seen, float], BlockMask | jax.Array]] = {
    "random": random,
    "topk_blocks": topk_blocks,
    "statistical_topk_blocks": statistical_topk_blocks,
    "block_sparse": block_sparse,
    "vertical_slash": vertical_slash,
    "flex_prefill": flex_prefill,
    "seer": seer,
    "psa": psa,
    "oracle": oracle,
}
DECODE: Mapping[str, Callable[[Cached, float], KeyLists]] = {
    "recent": recent,
    "snapkv": functools.partial(evicted, attention.snapkv),
    "ada_snapkv": functools.partial(evicted, attention.ada_snapkv),
    "quest": quest,
    "double_sparsity": double_sparsity,
    "seer": seer_decode,
}


def _in_sight(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.tri(scores.shape[-1], dtype=jnp.bool_), scores, -jnp.inf)

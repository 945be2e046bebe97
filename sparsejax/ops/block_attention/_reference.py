"""The definition: softmax over the keys that are kept and seen, all scores computed."""

import jax
import jax.numpy as jnp

from sparsejax.formats import BlockMask
from sparsejax.ops.block_attention._rules import Rules, blocks_read, elementwise


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_mask: BlockMask,
    rules: Rules,
    bias: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """As the public function; its autodiff is the oracle of the kernels.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`.
      v: like `k`.
      block_mask: `[batch|1, heads|kv_heads|1, queries, keys]`, queries and keys rounded
        up to whole blocks.
      rules: on positions.
      bias: float32, of each block, `[batch|1, heads|kv_heads|1, block_rows,
        block_columns]`, or None.
      scale: of the products.

    Returns:
      `[batch, queries, heads, head_dim]` and float32 `[batch, heads, queries]`.
    """
    batch, num_queries, heads, _ = q.shape
    num_keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads

    def cut(by_pair):  # from whole blocks, and to all heads
        by_pair = by_pair[..., :num_queries, :num_keys]
        return of_heads(by_pair, heads)

    kept = cut(block_mask.to_dense()) & elementwise(rules, num_queries, num_keys)
    height, width = block_mask.block_shape
    read = of_heads(blocks_read(block_mask, rules), heads)
    q = _used(q, read.any(axis=-1), height)
    k, v = (_used(a, read.any(axis=-2), width) for a in (k, v))
    q = q.reshape(batch, num_queries, kv_heads, group, q.shape[-1])
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, num_queries, num_keys) * scale
    if bias is not None:
        spread = jnp.repeat(jnp.repeat(bias, height, axis=-2), width, axis=-1)
        scores += cut(spread)
    weights, lse = softmax_of_kept(scores, kept)
    weights = weights.astype(v.dtype)
    weights = weights.reshape(batch, kv_heads, group, num_queries, num_keys)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
    return out.reshape(batch, num_queries, heads, v.shape[-1]), lse


def softmax_of_kept(scores: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the kept entries of the last axis, and its log-sum-exp.

    Args:
      scores: float32.
      kept: bool, to be broadcast; where none is, or all of those are at -inf, weights
        are 0 and lse is -inf.
    """
    top = jax.lax.stop_gradient(
        jnp.max(scores, axis=-1, keepdims=True, where=kept, initial=-jnp.inf)
    )
    empty = top == -jnp.inf
    top = jnp.where(empty, 0, top)
    powers = jnp.exp(jnp.where(kept, scores - top, -jnp.inf))
    total = jnp.where(empty, 1, powers.sum(axis=-1, keepdims=True))
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    return powers / total, lse


def _used(array: jax.Array, used: jax.Array, size: int) -> jax.Array:
    """0 for the tokens of no block that a kernel reads: 0 * NaN is NaN.

    Not for others that a rule hides: they poison what a kernel makes of their block.

    Args:
      array: `[batch, tokens, heads|kv_heads, head_dim]`.
      used: bool `[batch|1, heads|1, blocks]`.
      size: tokens of a block.
    """
    batch, given, blocks = used.shape
    own = min(given, array.shape[2])  # a key head is used by all that share it
    used = used.reshape(batch, own, given // own, blocks).any(axis=2)
    used = jnp.repeat(used, size, axis=-1)[..., : array.shape[1]]
    return jnp.where(used.swapaxes(1, 2)[..., None], array, 0)


def of_heads(per_head: jax.Array, heads: int) -> jax.Array:
    """Repeats what each key head has, on axis 1, for the query heads that share it."""
    given = per_head.shape[1]
    return per_head if given in (1, heads) else jnp.repeat(per_head, heads // given, 1)

"""Listed keys on Hopper: the forward of block attention, a list cut into parts.

What few queries read is read by few programs; so each list is cut into parts, one for a
program, and the parts are merged by their log-sum-exp. To the kernel a part is a block
row: 128 queries, of which those of the heads that share a key head are real.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparsejax.formats import BlockMask, KeyLists
from sparsejax.ops.block_attention import _mosaic_gpu
from sparsejax.ops.block_attention._gradients import Lists
from sparsejax.ops.block_attention._rules import Rules
from sparsejax.ops.block_attention._walk import TILE, Tiles

_NUM_SMS = 132
_NOWHERE = -(2**30)  # no key is as far before its query


def unsupported_reason(q, k, v, key_lists, length) -> str | None:
    """Why this kernel cannot take these operands; None if it can.

    Args:
      q: `[batch, queries, heads, head_dim]`; of all operands shapes and dtypes are
        read.
      k: `[batch, slots, kv_heads, head_dim]`.
      v: like `k`.
      key_lists: with leading axes of batch and heads.
      length: int32 `[batch]`.

    Returns:
      The reason, or None.
    """
    del length
    num_queries, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    rows = num_queries * (heads // _heads(q, k, key_lists))
    if rows > TILE:
        return (
            f"queries times heads that share a list must be at most {TILE}; got "
            f"{num_queries} * {heads // kv_heads}"
        )
    size = key_lists.page_size
    if size % TILE or k.shape[1] % size:
        return (
            f"pages must be a multiple of {TILE} keys and divide the slots; got "
            f"{size} and {k.shape[1]} slots"
        )
    mask = jax.eval_shape(lambda lists: _parts(lists, k.shape[1], 1), key_lists)
    return _mosaic_gpu.unsupported_reason(q, k, v, mask, None, None)


# jitted: layers of equal shapes share the lowered kernel
@functools.partial(jax.jit, static_argnames=("scale", "num_parts", "tiles"))
def listed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_lists: KeyLists,
    length: jax.Array,
    *,
    scale: float,
    num_parts: int | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """See the public function.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, slots, kv_heads, head_dim]`.
      v: like `k`.
      key_lists: with leading axes of batch and heads.
      length: int32 `[batch]`.
      scale: of the products.
      num_parts: of a list; by default as many as run side by side.
      tiles: of the forward kernel.
    """
    batch, num_queries, _, dim = q.shape
    groups = _heads(q, k, key_lists)
    room = key_lists.indices.shape[-1]
    if num_parts is None:
        num_parts = max(1, _NUM_SMS // (batch * groups))
    num_parts = min(num_parts, room)
    mask = _parts(key_lists, k.shape[1], num_parts)
    # [batch, parts * 128, groups, dim], the heads of a group beside the queries
    rows = q.reshape(batch, num_queries, groups, -1, dim).swapaxes(2, 3)
    rows = rows.reshape(batch, -1, groups, dim)
    num_rows = rows.shape[1]
    tile = jnp.pad(rows, ((0, 0), (0, TILE - num_rows), (0, 0), (0, 0)))
    queries = jnp.tile(tile, (1, num_parts, 1, 1))
    # keys below `length` are seen, and no others
    rules = Rules(length, None, None, None, _NOWHERE, k.shape[1])
    nothing = dataclasses.replace(mask, num=jnp.zeros_like(mask.num))
    lists = Lists(nothing, mask, rules, None)
    out, lse = _mosaic_gpu.forward(
        queries, k, v, lists, scale, in_order=True, tiles=tiles
    )
    out = out.reshape(batch, num_parts, TILE, groups, dim)[:, :, :num_rows]
    lse = lse.reshape(batch, groups, num_parts, TILE)[..., :num_rows]
    lse = lse.transpose(0, 2, 3, 1)  # [batch, parts, rows, groups]
    top = jnp.max(lse, axis=1, keepdims=True)
    shares = jnp.exp(lse - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(shares, axis=1, keepdims=True)
    shares /= jnp.where(total > 0, total, 1)
    merged = jnp.sum(out.astype(jnp.float32) * shares[..., None], axis=1)
    merged = merged.reshape(batch, num_queries, -1, groups, dim).swapaxes(2, 3)
    return merged.reshape(q.shape).astype(q.dtype)


def _heads(q, k, key_lists: KeyLists) -> int:
    """Heads of the kernel: those that have lists, at least the key heads."""
    return max(k.shape[2], key_lists.num.shape[1])


def _parts(key_lists: KeyLists, slots: int, num_parts: int) -> BlockMask:
    """Block rows that each have a part of a list; without lists by column."""
    size, (*lead, room) = key_lists.page_size, key_lists.indices.shape
    of_part = -(-room // num_parts)
    pad = of_part * num_parts - room
    indices = jnp.pad(key_lists.indices, ((0, 0), (0, 0), (0, pad)))
    first = of_part * jnp.arange(num_parts, dtype=jnp.int32)
    num = jnp.clip(key_lists.num[..., None] - first, 0, of_part)
    pages = slots // size
    return BlockMask(
        num,
        indices.reshape(*lead, num_parts, of_part),
        jnp.zeros((*lead, pages), jnp.int32),
        jnp.zeros((*lead, pages, 1), jnp.int32),
        key_lists.overflowed,
        (TILE, size),
    )

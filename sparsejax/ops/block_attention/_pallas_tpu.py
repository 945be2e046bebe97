"""The kernels for TPU, forward and backward: a grid step for each block that is seen.

Tiles of scores are transposed, `[keys, queries]`: what there is one of for each query
(maximum, log-sum-exp, delta) then lies along the lanes, as it does in memory. Queries,
and what is shaped like them, come as `[head_dim, queries]`: no tile of them is turned.
"""

import jax
import jax.numpy as jnp

from sparsejax.ops._tpu import dot, result
from sparsejax.ops.block_attention._gradients import Kernels, Lists, differentiable
from sparsejax.ops.block_attention._pallas_tpu_walk import (
    INDEX_BITS,
    MAX_WORDS,
    launch,
    max_steps,
)
from sparsejax.ops.block_attention._rules import LOWEST

_DTYPES = (jnp.bfloat16, jnp.float32)
_VMEM_BYTES = 12 * 2**20  # of the 16 MiB that a kernel is given where least


def unsupported_reason(q, k, v, block_mask, rules, bias) -> str | None:
    """Why these kernels cannot take these operands; None if they can.

    Args:
      q: `[batch, queries, heads, head_dim]`; of all operands shapes and dtypes are
        read.
      k: `[batch, keys, kv_heads, head_dim]`.
      v: like `k`.
      block_mask: `[batch|1, heads|kv_heads|1, queries, keys]`.
      rules: on positions.
      bias: of each block, or None.

    Returns:
      The reason, or None.
    """
    del v
    if q.dtype not in _DTYPES:
        return f"`q`, `k` and `v` must be bfloat16 or float32; got {q.dtype}"
    heads, dim = q.shape[2:]
    if not dim or dim % 64:
        return f"`head_dim` must be a multiple of 64; got {dim}"
    height, width = block_mask.block_shape
    if height % 128 or width % 128:
        return f"the sides of a block must be multiples of 128; got {(height, width)}"
    if not q.size or not k.size:
        return f"there must be queries and keys; got {q.shape} and {k.shape}"
    if _vmem_bytes(height, width, dim, q.dtype) > _VMEM_BYTES:
        return (
            "a block must fit into VMEM with its queries, keys and sums; got blocks of "
            f"{(height, width)} with head_dim={dim} in {q.dtype}"
        )
    group, (rows, columns) = heads // k.shape[2], block_mask.blocks_shape[2:]
    if max(rows, columns * group) > 1 << INDEX_BITS:
        return (
            f"there must be at most {1 << INDEX_BITS} block rows, and as many block "
            "columns times query heads of a key head; got "
            f"{rows} rows and {columns} * {group}"
        )
    own_heads = block_mask.blocks_shape[1]
    if bias is not None:
        own_heads = max(own_heads, bias.shape[1])
    in_lists = group if own_heads == heads else 1
    by_row = max_steps(block_mask, 1)
    by_column = max_steps(block_mask.T, in_lists)
    words = max(in_lists * by_row, by_column) * (1 if bias is None else 2)
    if words > MAX_WORDS:
        return (
            f"the lists of a key head must fit into {MAX_WORDS} words of scalar memory "
            f"(larger blocks have shorter ones), counting their capacity; got {words}"
        )
    return None


def _vmem_bytes(height: int, width: int, dim: int, dtype) -> int:
    """What the kernel for dk and dv holds, the largest; tiles twice, for the copies."""
    scores = 4 * 4 * height * width  # float32: scores, weights, dP and dS
    tiles = 2 * jnp.dtype(dtype).itemsize * dim * (2 * height + 4 * width)
    sums = 2 * 2 * 4 * dim * width  # and once more, for the product that is added
    return scores + tiles + sums


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, lists: Lists, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Outputs and log-sum-exp; see `Kernels`."""
    num_queries, dim = q.shape[1::2]
    height, length = lists.whole.block_shape[0], lists.whole.shape[2]
    q, (k, v) = _by_query(q, lists), (_by_key(a, lists) for a in (k, v))

    def visit(refs, bias, seen):
        scores = _scores(refs, scale, bias)
        if seen is not None:
            scores = jnp.where(seen, scores, LOWEST)
        top = jnp.maximum(refs["top"][...], jnp.max(scores, axis=0, keepdims=True))
        shrink = jnp.exp(refs["top"][...] - top)
        powers = jnp.exp(scores - top)
        if seen is not None:  # where a query has seen no key yet, these are 1
            powers = jnp.where(seen, powers, 0.0)
        refs["top"][...] = top
        refs["total"][...] *= shrink
        refs["total"][...] += jnp.sum(powers, axis=0, keepdims=True)
        values = refs["v"][...]
        refs["sum"][...] *= shrink
        refs["sum"][...] += dot(values, powers.astype(values.dtype), (0, 0))

    def finish(refs):
        total = refs["total"][...]
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        lse = jnp.where(empty, -jnp.inf, refs["top"][...] + jnp.log(total))
        refs["lse"][...] = lse
        refs["out"][...] = (refs["sum"][...] / total).astype(q.dtype)

    per_query = result((*q.shape[:2], 1, length), jnp.float32, q)
    out, lse = launch(
        visit,
        finish,
        {"q": q, "k": k, "v": v},
        {"out": result(q.shape, q.dtype, q), "lse": per_query},
        {
            "top": ((1, height), LOWEST),
            "total": ((1, height), 0.0),
            "sum": ((dim, height), 0.0),
        },
        lists,
        by_key=False,
    )
    return out.transpose(0, 3, 1, 2)[:, :num_queries], lse[:, :, 0, :num_queries]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: Lists,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients: dq over the lists by row, dk and dv by column; see `Kernels`."""
    num_queries, num_keys, dim = q.shape[1], k.shape[1], q.shape[3]
    (height, width), dtype = lists.whole.block_shape, q.dtype
    short = lists.whole.shape[2] - num_queries
    padding = ((0, 0), (0, 0), (0, short))
    operands = {
        "q": _by_query(q, lists),
        "k": _by_key(k, lists),
        "v": _by_key(v, lists),
        "do": _by_query(do.astype(dtype), lists),
        # of a query that is padding: no weights
        "lse": jnp.pad(lse, padding, constant_values=jnp.inf)[:, :, None],
        "delta": jnp.pad(delta, padding)[:, :, None],
    }
    like_q, like_k = (result(operands[name].shape, dtype, q) for name in ("q", "k"))

    def weights_and_ds(refs, bias, seen):
        powers = jnp.exp(_scores(refs, scale, bias) - refs["lse"][...])
        if seen is not None:
            powers = jnp.where(seen, powers, 0.0)
        dp = dot(refs["v"][...], refs["do"][...], (1, 0))
        ds = powers * (dp - refs["delta"][...])
        return powers.astype(dtype), ds.astype(dtype)

    def visit_row(refs, bias, seen):
        _, ds = weights_and_ds(refs, bias, seen)
        refs["sum"][...] += dot(refs["k"][...], ds, (0, 0))

    def finish_row(refs):
        refs["dq"][...] = (refs["sum"][...] * scale).astype(dtype)

    def visit_column(refs, bias, seen):
        powers, ds = weights_and_ds(refs, bias, seen)
        refs["dv_sum"][...] += dot(powers, refs["do"][...], (1, 1))
        refs["dk_sum"][...] += dot(ds, refs["q"][...], (1, 1))

    def finish_column(refs):
        refs["dk"][...] = (refs["dk_sum"][...] * scale).astype(dtype)
        refs["dv"][...] = refs["dv_sum"][...].astype(dtype)

    zeros = ((dim, height), 0.0)
    (dq,) = launch(
        visit_row,
        finish_row,
        operands,
        {"dq": like_q},
        {"sum": zeros},
        lists,
        by_key=False,
    )
    zeros = ((width, dim), 0.0)
    dk, dv = launch(
        visit_column,
        finish_column,
        operands,
        {"dk": like_k, "dv": like_k},
        {"dk_sum": zeros, "dv_sum": zeros},
        lists,
        by_key=True,
    )
    dk, dv = (a.swapaxes(1, 2)[:, :num_keys] for a in (dk, dv))
    return dq.transpose(0, 3, 1, 2)[:, :num_queries], dk, dv


def _scores(refs, scale: float, bias) -> jax.Array:
    """Of a tile, `[keys, queries]`, float32."""
    scores = dot(refs["k"][...], refs["q"][...], (1, 0)) * scale
    return scores if bias is None else scores + bias


def _by_query(a: jax.Array, lists: Lists) -> jax.Array:
    """`[batch, heads, dim, queries]`, of whole blocks."""
    a = a.transpose(0, 2, 3, 1)
    return jnp.pad(a, ((0, 0),) * 3 + ((0, lists.whole.shape[2] - a.shape[3]),))


def _by_key(a: jax.Array, lists: Lists) -> jax.Array:
    """`[batch, kv_heads, keys, dim]`, of whole blocks."""
    a = a.swapaxes(1, 2)
    short = lists.whole.shape[3] - a.shape[2]
    return jnp.pad(a, ((0, 0), (0, 0), (0, short), (0, 0)))


block_attention = differentiable(Kernels(forward, backward))

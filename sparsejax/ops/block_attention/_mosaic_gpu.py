"""The kernels for Hopper; here the forward, with a softmax that is updated by tile."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.ops._warpgroups import COMPUTING, launch, smem
from sparsejax.ops.block_attention import _mosaic_gpu_backward
from sparsejax.ops.block_attention._gradients import Kernels, Lists, differentiable
from sparsejax.ops.block_attention._rules import LOWEST
from sparsejax.ops.block_attention._walk import (
    LOG2_E,
    ROWS,
    TILE,
    ByQuery,
    Tiles,
    add_product,
    constant,
    lead_of,
    list_operands,
    longest_first,
    padded,
    product,
    spread,
    visible,
    walk,
)

_DTYPES = (jnp.bfloat16, jnp.float16)
_HEAD_DIMS = (64, 128)


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
    del v, rules, bias
    height, width = block_mask.block_shape
    if height % TILE or width % TILE:
        return (
            f"the sides of a block must be multiples of {TILE}; got "
            f"{block_mask.block_shape}"
        )
    return unsupported_operands(q, k)


def unsupported_operands(q, k) -> str | None:
    """Why no kernel here can take these queries and keys; None if some can."""
    if q.dtype not in _DTYPES:
        return (
            "`q`, `k` and `v` must be bfloat16 or float16, which the tensor cores "
            f"multiply exactly; got {q.dtype}"
        )
    if q.shape[-1] not in _HEAD_DIMS:
        return f"`head_dim` must be one of {_HEAD_DIMS}; got {q.shape[-1]}"
    if not q.size or not k.size:
        return f"there must be queries and keys; got {q.shape} and {k.shape}"
    return None


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: Lists,
    scale: float,
    *,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs and log-sum-exp; see `Kernels`."""
    tiles = tiles or Tiles(columns=128)
    batch, num_queries, heads, dim = q.shape
    kv_heads, mask = k.shape[2], lists.whole
    height, width = mask.block_shape
    rows, columns = mask.blocks_shape[2:]
    q = padded(q, rows * height)
    k, v = (padded(a, columns * width) for a in (k, v))
    tile_shape, to_log2 = (ROWS, tiles.columns), scale * LOG2_E
    by_query = ByQuery(lists, batch, heads, kv_heads, tiles)

    def computing(refs, warpgroup):
        here, lead = by_query.place(refs)
        first_query = here.tile * TILE + warpgroup * ROWS
        at = here.batch, pl.ds(first_query, ROWS), here.head
        mine = refs["q_tile"].at[warpgroup]
        plgpu.copy_gmem_to_smem(refs["q"].at[at], mine, refs["q_full"].at[warpgroup])
        plgpu.barrier_wait(refs["q_full"].at[warpgroup])
        staging = refs["staging"].at[warpgroup] if "staging" in refs else None

        def turn():  # the other warpgroup's, then this one's
            if tiles.take_turns:
                plgpu.barrier_arrive(refs["turn"])
                plgpu.barrier_wait(refs["turn"])

        def visit(step, column, substep, partial, carry):
            sums, top, total = carry
            slot = jax.lax.rem(step, tiles.stages)
            plgpu.barrier_wait(refs["k_full"].at[slot])
            keys = refs["k_ring"].at[slot]
            scores = product(mine, keys.T, tile_shape, between=turn)
            plgpu.barrier_arrive(refs["k_empty"].at[slot])
            factor = to_log2
            if "bias" in refs:
                of_bias = lead_of(refs["bias"], here.batch, here.head, batch, heads)
                bias = refs["bias"][*of_bias, here.row, column]
                scores, factor = scores * to_log2 + bias * LOG2_E, 1.0
            if partial:
                seen = visible(
                    lists.rules,
                    refs,
                    here.batch,
                    first_query,
                    by_query.first_key(column, substep),
                    tile_shape,
                    queries_along=0,
                )
                scores = jnp.where(seen, scores, LOWEST)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
            shrink = jnp.exp2(top - new_top)
            powers = jnp.exp2(scores * factor - spread(new_top, tile_shape))
            if partial:  # where a query has seen no key yet, these are 1
                powers = jnp.where(seen, powers, 0.0)
            total = total * shrink + jnp.sum(powers, axis=1)
            sums *= spread(shrink, sums.shape)
            weights = powers.astype(v.dtype)
            turn()
            plgpu.barrier_wait(refs["v_full"].at[slot])
            sums = add_product(sums, weights, refs["v_ring"].at[slot], staging)
            plgpu.barrier_arrive(refs["v_empty"].at[slot])
            return sums, new_top, total

        pl.when(warpgroup == 1)(turn)
        start = (
            constant(0.0, (ROWS, dim)),
            constant(LOWEST, (ROWS,)),
            constant(0.0, (ROWS,)),
        )
        carry, _ = walk(refs, lead, here.row, by_query.substeps, visit, start)
        sums, top, total = carry
        pl.when(warpgroup == 0)(turn)

        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        lse = jnp.where(empty, -jnp.inf, top / LOG2_E + jnp.log(total))
        mine[...] = (sums / spread(total, sums.shape)).astype(q.dtype)
        refs["lse_tile"][warpgroup] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, refs["out"].at[at])
        plgpu.copy_smem_to_gmem(
            refs["lse_tile"].at[warpgroup],
            refs["lse"].at[here.batch, here.head, pl.ds(first_query, ROWS)],
        )

    scratch = {
        "q_tile": smem((COMPUTING, ROWS, dim), q.dtype),
        "lse_tile": plgpu.SMEM((COMPUTING, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=COMPUTING),
        "turn": plgpu.Barrier(num_arrivals=COMPUTING),
        **by_query.rings(dim, q.dtype),
    }
    found = launch(
        by_query.copying,
        computing,
        operands={
            "q": q,
            "k": k,
            "v": v,
            "order": longest_first(lists.whole, lists.partial),
            **list_operands(lists),
        },
        results={
            "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
            "lse": jax.ShapeDtypeStruct((batch, heads, q.shape[1]), jnp.float32),
        },
        scratch=scratch,
        programs=batch * heads * (q.shape[1] // TILE),
        approx_math=True,
    )
    return found["out"][:, :num_queries], found["lse"][:, :, :num_queries]


block_attention = differentiable(Kernels(forward, _mosaic_gpu_backward.backward))

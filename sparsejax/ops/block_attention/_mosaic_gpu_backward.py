"""The backward for Hopper: dq over the lists by row, dk and dv over those by column.

Both compute the weights anew from the log-sum-exp, P = exp(S - lse), and with
dP = dO V^T they have dS = P * (dP - delta). Two passes execute seven products where one
would execute five, but no program adds to what another writes: the gradients are the
same in every run.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax.ops._warpgroups import COMPUTING, launch, smem
from sparsejax.ops.block_attention._gradients import Lists
from sparsejax.ops.block_attention._walk import (
    LOG2_E,
    ROWS,
    TILE,
    ByQuery,
    Tiles,
    add_product,
    constant,
    copy_tiles,
    lead_of,
    list_operands,
    locate,
    longest_first,
    padded,
    product,
    ring,
    spread,
    staging_for,
    visible,
    walk,
)

_TILES = Tiles(columns=64)  # with more columns registers run short
_TILES_Q_WHOLE = Tiles(columns=128)  # where no rule is looked at


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: Lists,
    scale: float,
    *,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv; see `Kernels`."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    length_q, length_k = lists.whole.shape[2:]
    q, do = (padded(a, length_q) for a in (q, do.astype(q.dtype)))
    k, v = (padded(a, length_k) for a in (k, v))
    # in powers of two, as the kernels count; no weights where there is no query
    lse = padded(lse * LOG2_E, length_q, axis=2, value=jnp.inf)
    delta = padded(delta, length_q, axis=2)
    operands = {"q": q, "k": k, "v": v, "do": do, "lse": lse, "delta": delta}
    tiles_q = tiles or (_TILES_Q_WHOLE if lists.partial is None else _TILES)
    dq = _grad_q(operands, lists, scale, tiles_q)
    dk, dv = _grad_kv(operands, lists, scale, tiles or _TILES)
    return dq[:, :num_queries], dk[:, :num_keys], dv[:, :num_keys]


def _grad_q(operands, lists, scale, tiles):
    batch, length, heads, dim = operands["q"].shape
    kv_heads, dtype = operands["k"].shape[2], operands["q"].dtype
    tile_shape = (ROWS, tiles.columns)
    by_query = ByQuery(lists, batch, heads, kv_heads, tiles)

    def computing(refs, warpgroup):
        here, lead = by_query.place(refs)
        first_query = here.tile * TILE + warpgroup * ROWS
        queries = pl.ds(first_query, ROWS)
        at = here.batch, queries, here.head
        tile = {name: refs[f"{name}_tile"].at[warpgroup] for name in ("q", "do")}
        full = refs["rows_full"].at[warpgroup]
        for name, to in tile.items():
            plgpu.copy_gmem_to_smem(refs[name].at[at], to, full)
        lse, delta = (
            _compat.mosaic_gpu_load(
                plgpu,
                refs[name].at[here.batch, here.head, queries],
                plgpu.Layout.WGMMA.reduce(1),
            )
            for name in ("lse", "delta")
        )
        plgpu.barrier_wait(full)
        staging = refs["staging"].at[warpgroup] if "staging" in refs else None

        def visit(step, column, substep, partial, dq):
            slot = jax.lax.rem(step, tiles.stages)
            keys, values = refs["k_ring"].at[slot], refs["v_ring"].at[slot]
            plgpu.barrier_wait(refs["k_full"].at[slot])
            plgpu.barrier_wait(refs["v_full"].at[slot])
            scores, dp = _two_products(
                (tile["q"], keys.T), (tile["do"], values.T), tile_shape
            )
            plgpu.barrier_arrive(refs["v_empty"].at[slot])
            first_key = by_query.first_key(column, substep)
            powers = _powers(
                scores, lists, refs, here, (batch, heads), partial,
                (here.row, column), first_query, first_key,
                scale=scale, lse=spread(lse, tile_shape), queries_along=0,
            )  # fmt: skip
            ds = powers * (dp - spread(delta, tile_shape))
            dq = add_product(dq, ds.astype(dtype), keys, staging)
            plgpu.barrier_arrive(refs["k_empty"].at[slot])
            return dq

        start = constant(0.0, (ROWS, dim))
        dq, _ = walk(refs, lead, here.row, by_query.substeps, visit, start)
        tile["q"][...] = (dq * scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile["q"], refs["dq"].at[at])

    scratch = {
        "q_tile": smem((COMPUTING, ROWS, dim), dtype),
        "do_tile": smem((COMPUTING, ROWS, dim), dtype),
        "rows_full": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTING),
        **by_query.rings(dim, dtype),
    }
    order = longest_first(lists.whole, lists.partial)
    return launch(
        by_query.copying,
        computing,
        operands=operands | {"order": order} | list_operands(lists),
        results={"dq": jax.ShapeDtypeStruct(operands["q"].shape, dtype)},
        scratch=scratch,
        programs=batch * heads * (length // TILE),
        approx_math=True,
    )["dq"]


def _grad_kv(operands, lists, scale, tiles):
    batch, length, kv_heads, dim = operands["k"].shape
    heads, dtype = operands["q"].shape[2], operands["q"].dtype
    group = heads // kv_heads
    by_key = Lists(
        lists.whole.T,
        None if lists.partial is None else lists.partial.T,
        lists.rules,
        lists.bias,
    )
    height, width = by_key.whole.block_shape
    rows = by_key.whole.blocks_shape[2]
    substeps, tile_shape = width // tiles.columns, (ROWS, tiles.columns)

    def place(refs):
        of_block = height // TILE
        return locate(
            refs["order"], batch=batch, heads=kv_heads, rows=rows, of_block=of_block
        )

    def over_group(refs, here, visit, carry):
        """Walks the list of each query head that uses this key head."""

        def of_head(i, carry_and_done):
            head = here.head * group + i
            lead = lead_of(refs["whole_num"], here.batch, head, batch, heads)

            def visit_head(*step_and_carry):
                return visit(head, *step_and_carry)

            return walk(refs, lead, here.row, substeps, visit_head, *carry_and_done)

        return jax.lax.fori_loop(0, group, of_head, (carry, jnp.int32(0)))[0]

    def copying(refs):
        here = place(refs)

        def visit(head, step, column, substep, partial, carry):
            queries = pl.ds(column * width + substep * tiles.columns, tiles.columns)
            at, row_at = (here.batch, queries, head), (here.batch, head, queries)
            sources = {
                "q": (refs["q"].at[at], refs["lse"].at[row_at]),
                "do": (refs["do"].at[at], refs["delta"].at[row_at]),
            }
            copy_tiles(refs, step, tiles.stages, sources)
            return carry

        over_group(refs, here, visit, None)

    def computing(refs, warpgroup):
        here = place(refs)
        first_key = here.tile * TILE + warpgroup * ROWS
        at = here.batch, pl.ds(first_key, ROWS), here.head
        tile = {name: refs[f"{name}_tile"].at[warpgroup] for name in ("k", "v")}
        full = refs["rows_full"].at[warpgroup]
        for name, to in tile.items():
            plgpu.copy_gmem_to_smem(refs[name].at[at], to, full)
        plgpu.barrier_wait(full)
        staging = refs["staging"].at[warpgroup] if "staging" in refs else None

        def per_query(name, slot):
            values = _compat.mosaic_gpu_load(
                plgpu,
                refs[f"{name}_rows_ring"].at[slot],
                plgpu.Layout.WGMMA.reduce(0),
            )
            return spread(values, tile_shape, axis=1)

        def visit(head, step, column, substep, partial, carry):
            dk, dv = carry
            slot = jax.lax.rem(step, tiles.stages)
            queries, grads = refs["q_ring"].at[slot], refs["do_ring"].at[slot]
            plgpu.barrier_wait(refs["q_full"].at[slot])
            scores = product(tile["k"], queries.T, tile_shape)
            first_query = column * width + substep * tiles.columns
            powers = _powers(
                scores, lists, refs, dataclasses.replace(here, head=head),
                (batch, heads), partial, (column, here.row), first_query, first_key,
                scale=scale, lse=per_query("q", slot), queries_along=1,
            )  # fmt: skip
            plgpu.barrier_wait(refs["do_full"].at[slot])
            # one after the other: registers for both at once are not to be had
            dv = add_product(dv, powers.astype(dtype), grads, staging)
            dp = product(tile["v"], grads.T, tile_shape)
            ds = powers * (dp - per_query("do", slot))
            plgpu.barrier_arrive(refs["do_empty"].at[slot])
            dk = add_product(dk, ds.astype(dtype), queries, staging)
            plgpu.barrier_arrive(refs["q_empty"].at[slot])
            return dk, dv

        start = constant(0.0, (ROWS, dim)), constant(0.0, (ROWS, dim))
        dk, dv = over_group(refs, here, visit, start)
        tile["k"][...] = (dk * scale).astype(dtype)
        tile["v"][...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile["k"], refs["dk"].at[at])
        plgpu.copy_smem_to_gmem(tile["v"], refs["dv"].at[at])

    scratch = {
        "k_tile": smem((COMPUTING, ROWS, dim), dtype),
        "v_tile": smem((COMPUTING, ROWS, dim), dtype),
        "rows_full": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTING),
        **ring("q", (tiles.columns, dim), dtype, tiles.stages, with_rows=True),
        **ring("do", (tiles.columns, dim), dtype, tiles.stages, with_rows=True),
        **staging_for(tiles, dtype),
    }
    order = longest_first(by_key.whole, by_key.partial, heads=kv_heads)
    like = jax.ShapeDtypeStruct(operands["k"].shape, dtype)
    found = launch(
        copying,
        computing,
        operands=operands | {"order": order} | list_operands(by_key),
        results={"dk": like, "dv": like},
        scratch=scratch,
        programs=batch * kv_heads * (length // TILE),
        approx_math=True,
    )
    return found["dk"], found["dv"]


def _two_products(first, second, shape):
    """Both at once: the second is under way while the first is waited for."""

    def start(a, b):
        plgpu.wgmma(a, *first)
        plgpu.wgmma(b, *second)
        return a[...], b[...]

    acc = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
    return pl.run_scoped(start, acc, acc)


def _powers(
    scores, lists, refs, here, sizes, partial, block, first_query, first_key, *,
    scale, lse, queries_along,
):  # fmt: skip
    """The weights of a tile, exp(S - lse) with the bias; 0 where the rules say so."""
    exponents = scores * (scale * LOG2_E) - lse
    if "bias" in refs:
        lead = lead_of(refs["bias"], here.batch, here.head, *sizes)
        exponents += refs["bias"][*lead, *block] * LOG2_E
    if partial:
        seen = visible(
            lists.rules,
            refs,
            here.batch,
            first_query,
            first_key,
            scores.shape,
            queries_along=queries_along,
        )
        exponents = jnp.where(seen, exponents, -jnp.inf)
    return jnp.exp2(exponents)

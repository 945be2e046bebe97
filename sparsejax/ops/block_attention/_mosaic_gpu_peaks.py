"""The kernel for Hopper: scores of a tile, their maxima, and the softmax's sum.

What the forward of attention does without values: a program has 128 queries and walks
over the keys up to them, while a warpgroup copies tiles ahead. The maximum of each
query in a tile is written as it is found, in powers of two. Once the walk is over the
sum of the query is known, by which XLA then divides.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.ops._platform import jit_kernel
from sparsejax.ops._warpgroups import COMPUTING, launch, smem
from sparsejax.ops.block_attention import _mosaic_gpu
from sparsejax.ops.block_attention._rules import LOWEST
from sparsejax.ops.block_attention._walk import (
    LOG2_E,
    ROWS,
    TILE,
    constant,
    copy_tiles,
    padded,
    product,
    ring,
    spread,
)

_STAGES = 4


def unsupported_reason(q: jax.Array, k: jax.Array, *, block: int) -> str | None:
    """Why this kernel cannot take these operands; None if it can.

    Args:
      q: `[batch, seq, heads, head_dim]`; of both shapes and dtypes are read.
      k: `[batch, seq, kv_heads, head_dim]`.
      block: keys of a block.

    Returns:
      The reason, or None.
    """
    if block % ROWS:
        return f"blocks must be a multiple of {ROWS} keys; got {block}"
    return _mosaic_gpu.unsupported_operands(q, k)


@functools.partial(jit_kernel, static_argnames=("block", "scale"))
def attention_peaks(
    q: jax.Array, k: jax.Array, *, block: int, scale: float
) -> jax.Array:
    """See the public function.

    Args:
      q: `[batch, seq, heads, head_dim]`.
      k: `[batch, seq, kv_heads, head_dim]`.
      block: keys of a block.
      scale: of the products.
    """
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    columns = 128 if block % 128 == 0 else ROWS  # keys of a tile
    q, k = (padded(a, -(-length // TILE) * TILE) for a in (q, k))
    rows, tile_shape, to_log2 = q.shape[1] // TILE, (ROWS, columns), scale * LOG2_E

    def place():
        """Batch, head and tile of queries: those with most keys first."""
        program = jax.lax.axis_index("program")
        rank, program = jax.lax.rem(program, rows), jax.lax.div(program, rows)
        return jax.lax.div(program, heads), jax.lax.rem(program, heads), rows - 1 - rank

    def copying(refs):
        at, head, row = place()

        def step(i, carry):
            keys = pl.ds(i * columns, columns)
            source = refs["k"].at[at, keys, jax.lax.div(head, group)]
            copy_tiles(refs, i, _STAGES, {"k": (source,)})
            return carry

        jax.lax.fori_loop(0, (row + 1) * (TILE // columns), step, None)

    def computing(refs, warpgroup):
        at, head, row = place()
        first_query = row * TILE + warpgroup * ROWS
        queries = pl.ds(first_query, ROWS)
        mine = refs["q_tile"].at[warpgroup]
        full = refs["q_full"].at[warpgroup]
        plgpu.copy_gmem_to_smem(refs["q"].at[at, queries, head], mine, full)
        plgpu.barrier_wait(full)
        found = refs["found_tile"].at[warpgroup]

        def write(values, to):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            found[...] = values
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(found, to)

        def visit(i, carry, *, partial):
            top, total = carry
            slot = jax.lax.rem(i, _STAGES)
            plgpu.barrier_wait(refs["k_full"].at[slot])
            scores = product(mine, refs["k_ring"].at[slot].T, tile_shape)
            plgpu.barrier_arrive(refs["k_empty"].at[slot])
            if partial:
                iota = functools.partial(
                    plgpu.broadcasted_iota,
                    jnp.int32,
                    tile_shape,
                    layout=plgpu.Layout.WGMMA,
                )
                seen = i * columns + iota(1) <= first_query + iota(0)
                scores = jnp.where(seen, scores, LOWEST)
            highest = jnp.max(scores, axis=1) * to_log2
            write(highest, refs["highest"].at[at, head, i, queries])
            new_top = jnp.maximum(top, highest)
            powers = jnp.exp2(scores * to_log2 - spread(new_top, tile_shape))
            total = total * jnp.exp2(top - new_top) + jnp.sum(powers, axis=1)
            return new_top, total

        # the first tile has a key for every query, so that a sum of 0 is never left
        carry = constant(LOWEST, (ROWS,)), constant(0.0, (ROWS,))
        whole, stop = row * (TILE // columns), (row + 1) * (TILE // columns)
        kinds = [functools.partial(visit, partial=partial) for partial in (False, True)]
        carry = jax.lax.fori_loop(0, whole, kinds[0], carry)
        top, total = jax.lax.fori_loop(whole, stop, kinds[1], carry)
        log2_sum = top + jnp.log(total) * LOG2_E
        write(log2_sum, refs["log2_sum"].at[at, head, queries])

    tiles = q.shape[1] // columns
    found = launch(
        copying,
        computing,
        operands={"q": q, "k": k},
        results={
            "highest": jax.ShapeDtypeStruct(
                (batch, heads, tiles, q.shape[1]), jnp.float32
            ),
            "log2_sum": jax.ShapeDtypeStruct((batch, heads, q.shape[1]), jnp.float32),
        },
        scratch={
            "q_tile": smem((COMPUTING, ROWS, dim), q.dtype),
            "q_full": plgpu.Barrier(num_barriers=COMPUTING),
            "found_tile": plgpu.SMEM((COMPUTING, ROWS), jnp.float32),
            **ring("k", (columns, dim), k.dtype, _STAGES),
        },
        programs=batch * heads * rows,
        approx_math=True,
    )
    highest, log2_sum = found["highest"], found["log2_sum"]
    # tiles after a query were not written
    seen = columns * jnp.arange(tiles)[:, None] <= jnp.arange(q.shape[1])[None]
    peaks = jnp.where(seen, jnp.exp2(highest - log2_sum[:, :, None]), 0)
    if blocks_apart := -tiles % (block // columns):
        peaks = jnp.pad(peaks, ((0, 0), (0, 0), (0, blocks_apart), (0, 0)))
    peaks = peaks.reshape(batch, heads, -1, block // columns, q.shape[1]).max(axis=3)
    return peaks[:, :, : -(-length // block), :length]

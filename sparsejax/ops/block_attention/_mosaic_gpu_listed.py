"""Listed keys on Hopper: many programs share a list, and merge what they found.

What few queries read is read by few rows of programs; so the tiles of a list are dealt
out to the warpgroups of a cluster of programs. Each keeps a softmax of its own, the
keys of its next tiles on the way. At the end each writes its sums and their
log-sum-exp, the cluster waits for all of them, and the rows are merged, a row by each
warpgroup. One kernel, and no atomics: the order of the sum is that of the list.

The tensor cores take 64 rows, of which those of the queries and of the heads that share
a list are real. The others hold anything: no row of a softmax sees another.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax.formats import KeyLists
from sparsejax.ops._hopper import MOST_OF_CLUSTER, NUM_SMS, THREADS
from sparsejax.ops._platform import jit_kernel
from sparsejax.ops._warpgroups import smem
from sparsejax.ops.block_attention._mosaic_gpu import unsupported_operands
from sparsejax.ops.block_attention._rules import LOWEST
from sparsejax.ops.block_attention._walk import (
    LOG2_E,
    ROWS,
    TILE,
    add_product,
    constant,
    lead_of,
    padded,
    product,
    spread,
)

_EIGHT = 8  # rows of a tile of shared memory


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      parts: programs that share a list, at most 16; they are one cluster.
      warpgroups: of a program; each reads tiles of its own.
      columns: keys of a tile, 64 or 128.
      stages: tiles of a warpgroup that are on the way or in use.
      in_registers: see `_walk.Tiles`.
    """

    parts: int
    warpgroups: int = 2
    columns: int = 64
    stages: int = 2
    in_registers: bool = True

    @classmethod
    def default(cls, lists: int, keys: int) -> "Tiles":
        """The tiles for so many lists of at most so many keys.

        Example:
          >>> Tiles.default(8, 4096)
          Tiles(parts=16, warpgroups=2, columns=64, stages=2, in_registers=True)
        """
        tiles = cls(1)
        of_part = tiles.warpgroups * tiles.columns
        # as many as run side by side, with a tile for each warpgroup
        most = min(MOST_OF_CLUSTER, NUM_SMS // lists, keys // of_part)
        parts = 2 ** (max(most, 1).bit_length() - 1)
        return dataclasses.replace(tiles, parts=parts)


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
    del v, length
    num_queries, heads = q.shape[1:3]
    sharing = heads // _num_lists(k, key_lists)
    if num_queries * sharing > ROWS:
        return (
            f"queries times heads that share a list must be at most {ROWS}; got "
            f"{num_queries} * {sharing}"
        )
    size = key_lists.page_size
    if size % TILE or k.shape[1] % size:
        return (
            f"pages must be a multiple of {TILE} keys and divide the slots; got "
            f"{size} and {k.shape[1]} slots"
        )
    return unsupported_operands(q, k)


def listed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_lists: KeyLists,
    length: jax.Array,
    *,
    scale: float,
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
      tiles: how the work is cut; None for the default.
    """
    batch, num_queries, _, dim = q.shape
    groups = _num_lists(k, key_lists)
    if tiles is None:
        keys = key_lists.indices.shape[-1] * key_lists.page_size
        tiles = Tiles.default(batch * groups, keys)
    # the rows of a list lie together; for one query nothing moves
    rows = q.reshape(batch, num_queries, groups, -1, dim).swapaxes(1, 2)
    out = _of_rows(
        rows.reshape(batch * groups, -1, dim), k, v, key_lists, length, scale, tiles
    )
    return out.reshape(rows.shape).swapaxes(1, 2).reshape(q.shape)


@functools.partial(jit_kernel, static_argnames=("scale", "tiles"))
def _of_rows(q, k, v, key_lists, length, scale, tiles):
    """Attention of `[batch * groups, rows, dim]`: the rows of each list."""
    (lists, rows, dim), (batch, _, kv_heads, _) = q.shape, k.shape
    groups, size, columns = lists // batch, key_lists.page_size, tiles.columns
    room, of_page = key_lists.indices.shape[-1], size // columns
    workers = tiles.parts * tiles.warpgroups
    whole_rows = -(-rows // _EIGHT) * _EIGHT
    width = max(dim, THREADS)  # each thread merges an entry of a row
    flat = q.reshape(-1, dim)
    flat = padded(flat, max(len(flat), whole_rows), axis=0)
    tile_shape, to_log2 = (ROWS, columns), scale * LOG2_E

    def body(*refs):
        refs = dict(zip(names, refs, strict=True))
        this, warpgroup = (jax.lax.axis_index(name) for name in ("list", "warpgroup"))
        at, group = jax.lax.div(this, groups), jax.lax.rem(this, groups)
        kv_head = jax.lax.div(group, groups // kv_heads)
        lead = lead_of(refs["num"], at, group, batch, groups)
        worker = jax.lax.axis_index("part") * tiles.warpgroups + warpgroup

        def first_key(step):
            """Of this warpgroup's tile; of some tile, if it has no more."""
            tile = worker + step * workers
            entry = jnp.minimum(jax.lax.div(tile, of_page), room - 1)
            page = refs["indices"][*lead, entry]
            return page * size + jax.lax.rem(tile, of_page) * columns

        def load(first_key, slot):
            keys = at, pl.ds(first_key, columns), kv_head
            for name in ("k", "v"):
                plgpu.copy_gmem_to_smem(
                    refs[name].at[keys],
                    refs[f"{name}_ring"].at[warpgroup, slot],
                    refs[f"{name}_full"].at[warpgroup * tiles.stages + slot],
                )

        # all at once: each of these reads waits for memory
        first = [first_key(jnp.int32(i)) for i in range(tiles.stages)]
        left = refs["num"][*lead] * of_page - worker
        mine = jax.lax.div(jnp.maximum(left, 0) + (workers - 1), workers)
        limit = refs["length"][at]
        # whole tiles of rows, so the last list's may begin before its own
        first_row = jnp.minimum(this * rows, len(flat) - whole_rows)

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_gmem_to_smem(
                refs["q"].at[pl.ds(first_row, whole_rows)],
                refs["q_tile"].at[pl.ds(0, whole_rows)],
                refs["q_full"],
            )

        for i, key in enumerate(first):

            @pl.when(i < mine)
            def _(i=i, key=key):
                load(key, i)

        plgpu.barrier_wait(refs["q_full"])
        staging = refs["staging"].at[warpgroup] if "staging" in refs else None

        def step(i, carry):
            sums, top, total = carry
            slot = jax.lax.rem(i, tiles.stages)
            full = warpgroup * tiles.stages + slot
            here, upcoming = first_key(i), first_key(i + tiles.stages)
            plgpu.barrier_wait(refs["k_full"].at[full])
            keys = refs["k_ring"].at[warpgroup, slot]
            scores = product(refs["q_tile"], keys.T, tile_shape)
            column = plgpu.broadcasted_iota(
                jnp.int32, tile_shape, 1, layout=plgpu.Layout.WGMMA
            )
            seen = here + column < limit
            scores = jnp.where(seen, scores, LOWEST)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1) * to_log2)
            shrink = jnp.exp2(top - new_top)
            powers = jnp.exp2(scores * to_log2 - spread(new_top, tile_shape))
            powers = jnp.where(seen, powers, 0.0)  # 1 where no key was seen yet
            total = total * shrink + jnp.sum(powers, axis=1)
            sums *= spread(shrink, sums.shape)
            plgpu.barrier_wait(refs["v_full"].at[full])
            values = refs["v_ring"].at[warpgroup, slot]
            sums = add_product(sums, powers.astype(v.dtype), values, staging)

            @pl.when(i + tiles.stages < mine)
            def _():
                plgpu.commit_smem()  # all threads are done with the slot
                load(upcoming, slot)

            return sums, new_top, total

        start = (
            constant(0.0, (ROWS, dim)),
            constant(LOWEST, (ROWS,)),
            constant(0.0, (ROWS,)),
        )
        sums, top, total = jax.lax.fori_loop(0, mine, step, start)

        total = jnp.where(total == 0.0, 1.0, total)
        refs["sums_tile"][warpgroup] = sums / spread(total, sums.shape)
        refs["lse_tile"][warpgroup] = top + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            refs["sums_tile"].at[warpgroup, pl.ds(0, whole_rows)],
            refs["sums"].at[this, worker, :, pl.ds(0, dim)],
        )
        plgpu.copy_smem_to_gmem(
            refs["lse_tile"].at[warpgroup], refs["lse"].at[this, worker]
        )
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(refs["done"])
        plgpu.barrier_wait(refs["done"])

        for turn in range(-(-rows // workers)):
            row = worker + turn * workers

            @pl.when(row < rows)
            def _(row=row):
                of_tile = row + this * rows - first_row
                merged = _merged(refs, this, of_tile, workers)
                refs["out"][this, row] = merged.astype(q.dtype)

    operands = {
        "q": flat,
        "k": k,
        "v": v,
        "num": key_lists.num,
        "indices": key_lists.indices,
        "length": length,
    }
    results = {
        "out": jax.ShapeDtypeStruct((lists, rows, width), q.dtype),
        "sums": jax.ShapeDtypeStruct((lists, workers, whole_rows, width), jnp.float32),
        "lse": jax.ShapeDtypeStruct((lists, workers, ROWS), jnp.float32),
    }
    ring = (tiles.warpgroups, tiles.stages, columns, dim)
    slots = plgpu.Barrier(num_barriers=tiles.warpgroups * tiles.stages)
    float32_tile = (
        plgpu.TilingTransform((_EIGHT, 32)),
        plgpu.SwizzleTransform(128),
    )
    scratch = {
        "q_tile": smem((ROWS, dim), q.dtype),
        "k_ring": smem(ring, q.dtype),
        "v_ring": smem(ring, q.dtype),
        "sums_tile": plgpu.SMEM(
            (tiles.warpgroups, ROWS, dim), jnp.float32, transforms=float32_tile
        ),
        "lse_tile": plgpu.SMEM((tiles.warpgroups, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(),
        "k_full": slots,
        "v_full": slots,
        "done": plgpu.ClusterBarrier(
            collective_axes=("part",), num_arrivals=tiles.warpgroups
        ),
    }
    if not tiles.in_registers:
        scratch["staging"] = smem((tiles.warpgroups, *tile_shape), q.dtype)
    names = [*operands, *results, *scratch]
    kernel = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=tuple(scratch.values()),
        grid=(lists,),
        grid_names=("list",),
        cluster=(tiles.parts,),
        cluster_names=("part",),
        num_threads=tiles.warpgroups,
        thread_name="warpgroup",
        compiler_params=_compat.mosaic_gpu_params(plgpu, approx_math=True),
    )
    return kernel(*operands.values())[0][..., :dim]


def _merged(refs, this, row, workers) -> jax.Array:
    """One row of the attention over all that the workers have read."""
    sums = [refs["sums"][this, i, row] for i in range(workers)]
    lse = [refs["lse"][this, i, row] for i in range(workers)]
    top = functools.reduce(jnp.maximum, lse)
    shares = [jnp.exp2(one - top) for one in lse]
    total = sum(shares[1:], shares[0])
    terms = [of_one * share for of_one, share in zip(sums, shares, strict=True)]
    return sum(terms[1:], terms[0]) / total


def _num_lists(k, key_lists: KeyLists) -> int:
    """Lists of a sequence, as the kernel walks them: one a key head, or more."""
    return max(k.shape[2], key_lists.num.shape[1])

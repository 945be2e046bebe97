"""The kernel for Hopper: a cluster of programs scores, ranks and lists the pages.

A program has 64 pages. It scores them and tells the cluster; it ranks them among all
and counts those that it keeps; then a program has 64 entries of the list, of which each
is the number of pages that come before it. What the cluster is told goes through device
memory, and is waited for by a barrier of the cluster.
"""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax._order import ordered
from sparsejax.formats import KeyLists
from sparsejax.ops._hopper import MOST_OF_CLUSTER, THREADS
from sparsejax.ops._platform import jit_kernel
from sparsejax.ops._warpgroups import smem

_ROWS = 64  # pages of a program, or entries
_MOST_HEADS = 16
_FOUR = 4  # entries of a list are copied by 16 bytes
_DTYPES = (jnp.bfloat16, jnp.float16)
_HEAD_DIMS = (64, 128)


def unsupported_reason(query, low, high, lengths) -> str | None:
    """Why this kernel cannot take these operands; None if it can.

    Args:
      query: `[batch, heads, dim]`; of all operands shapes and dtypes are read.
      low: `[batch, pages, kv_heads, dim]`.
      high: like `low`.
      lengths: int32 `[batch]`.

    Returns:
      The reason, or None.
    """
    del lengths
    if not query.dtype == low.dtype == high.dtype or query.dtype not in _DTYPES:
        return (
            "`query`, `low` and `high` must be bfloat16 or float16, all of them; got "
            f"{query.dtype}, {low.dtype} and {high.dtype}"
        )
    if not query.size:
        return f"there must be a query; got shape {query.shape}"
    if query.shape[-1] not in _HEAD_DIMS:
        return f"`head_dim` must be one of {_HEAD_DIMS}; got {query.shape[-1]}"
    pages, kv_heads = low.shape[1:3]
    most = MOST_OF_CLUSTER * _ROWS
    if pages % _ROWS or pages > most:
        return f"pages must be a multiple of {_ROWS}, and at most {most}; got {pages}"
    if query.shape[1] > _MOST_HEADS * kv_heads:
        return (
            f"at most {_MOST_HEADS} heads may share a key head; got {query.shape[1]} "
            f"heads and {kv_heads} key heads"
        )
    return None


@functools.partial(jit_kernel, static_argnames=("page_size", "num_kept", "per_head"))
def highest_pages(
    query: jax.Array,
    low: jax.Array,
    high: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
    num_kept: int,
    per_head: bool,
) -> KeyLists:
    """As the reference.

    Args:
      query: `[batch, heads, dim]`.
      low: `[batch, pages, kv_heads, dim]`.
      high: like `low`.
      lengths: int32 `[batch]`.
      page_size: keys of a page.
      num_kept: pages of a list.
      per_head: a list for each query head.
    """
    (batch, heads, dim), (_, pages, kv_heads, _) = query.shape, low.shape
    groups = heads if per_head else kv_heads
    sharing, parts = heads // groups, pages // _ROWS
    query = query.reshape(batch, groups, sharing, dim)
    room = -(-num_kept // _FOUR) * _FOUR
    tile, square = (_ROWS, dim), (_ROWS, _ROWS)
    layout = plgpu.Layout.WGMMA
    of_query = (
        plgpu.Layout.WG_STRIDED((dim,), vec_size=1)
        if dim % THREADS == 0
        else layout.reduce(0)
    )
    load = functools.partial(_compat.mosaic_gpu_load, plgpu)

    def along(values, axis, shape=square):
        return jax.lax.broadcast_in_dim(values, shape, [axis])

    def positions(axis):
        return plgpu.broadcasted_iota(jnp.int32, square, axis, layout=layout)

    def sums_of_rows(of_chunk):
        """Sums over all pages of what a function of 64 of them gives, `[64, 64]`."""
        return jnp.sum(total(map(of_chunk, range(parts))), axis=1)

    def total(terms):
        return functools.reduce(operator.add, terms)

    def ones(which):
        return jnp.where(which, 1.0, 0.0)

    def body(*refs):
        refs = dict(zip(names, refs, strict=True))
        this, part = jax.lax.axis_index("list"), jax.lax.axis_index("part")
        at, group = jax.lax.div(this, groups), jax.lax.rem(this, groups)
        kv_head = jax.lax.div(group, groups // kv_heads)
        mine = pl.ds(part * _ROWS, _ROWS)
        for name, source in (
            ("query", refs["query"].at[at, group]),
            ("low", refs["low"].at[at, mine, kv_head]),
            ("high", refs["high"].at[at, mine, kv_head]),
        ):
            plgpu.copy_gmem_to_smem(source, refs[f"{name}_tile"], refs["full"])
        length = refs["lengths"][at]
        current = jax.lax.div(length + (page_size - 1), page_size) - 1

        def tell(name, values):
            """Gives the cluster one number of each page of this program."""
            refs[f"{name}_tile"][...] = values
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs[f"{name}_tile"], refs[name].at[this, part])
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(refs[f"{name}_told"])
            plgpu.barrier_wait(refs[f"{name}_told"])

        def told(name, chunk):
            return load(refs[name].at[this, chunk], layout.reduce(0))

        plgpu.barrier_wait(refs["full"])
        # an entry a thread, if there are so many; laid out anew along the pages
        rows = [
            load(refs["query_tile"].at[i], of_query).astype(jnp.float32)
            for i in range(sharing)
        ]
        for name, half in (("high", jnp.maximum), ("low", jnp.minimum)):
            refs[f"{name}_factor"][...] = total(half(row, 0.0) for row in rows)
        plgpu.commit_smem()
        products = total(
            load(refs[f"{name}_tile"], layout).astype(jnp.float32)
            * along(load(refs[f"{name}_factor"], layout.reduce(0)), 1, tile)
            for name in ("high", "low")
        )
        row = plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=layout.reduce(1))
        page = part * _ROWS + row
        scores = jnp.sum(products, axis=1)
        scores = jnp.where(page < current, scores, -jnp.inf)
        keys = ordered(jnp.where(page == current, jnp.inf, scores))
        tell("keys", keys)

        def before(chunk):  # which pages of a chunk rank before each of these
            # no key is the least integer, and equal ones count if further left
            bound = keys - jnp.where(chunk < part, 1, 0)
            return ones(along(told("keys", chunk), 1) > along(bound, 0))

        tied = along(told("keys", part), 1) == along(keys, 0)
        tied = ones(tied & (positions(1) < positions(0)))
        rank = sums_of_rows(before) + jnp.sum(tied, axis=1)
        kept = (rank < num_kept) & (page <= current)
        refs["kept_tile"][...] = ones(kept)
        plgpu.commit_smem()
        row_of_kept = along(load(refs["kept_tile"], layout.reduce(0)), 1)
        upto = jnp.where(positions(1) <= positions(0), row_of_kept, 0.0)
        tell("upto", jnp.sum(upto, axis=1))

        def write(start, size):
            counts = [refs["upto"][this, j, _ROWS - 1] for j in range(parts)]
            first = list(itertools.accumulate(counts, initial=jnp.float32(0)))
            if start == 0:
                refs["num"][this] = first[-1].astype(jnp.int32)
            entry = (start + positions(0)).astype(jnp.float32)
            entry = jnp.minimum(entry, first[-1] - 1.0)  # the rest repeats the last

            def passed(chunk):
                return ones(along(told("upto", chunk) + first[chunk], 1) <= entry)

            index = sums_of_rows(passed).astype(jnp.int32)
            refs["indices_tile"][...] = index
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                refs["indices_tile"].at[pl.ds(0, size)],
                refs["indices"].at[this, pl.ds(start, size)],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        for i, start in enumerate(range(0, room, _ROWS)):
            pl.when(part == i)(
                functools.partial(write, start, min(_ROWS, room - start))
            )

    lists = batch * groups
    operands = {"query": query, "low": low, "high": high, "lengths": lengths}
    results = {
        "num": jax.ShapeDtypeStruct((lists,), jnp.int32),
        "indices": jax.ShapeDtypeStruct((lists, room), jnp.int32),
        "keys": jax.ShapeDtypeStruct((lists, parts, _ROWS), jnp.int32),
        "upto": jax.ShapeDtypeStruct((lists, parts, _ROWS), jnp.float32),
    }
    told_to_all = plgpu.ClusterBarrier(collective_axes=("part",))
    scratch = {
        "query_tile": plgpu.SMEM((sharing, dim), query.dtype),
        "low_tile": smem(tile, low.dtype),
        "high_tile": smem(tile, low.dtype),
        "low_factor": plgpu.SMEM((dim,), jnp.float32),
        "high_factor": plgpu.SMEM((dim,), jnp.float32),
        "keys_tile": plgpu.SMEM((_ROWS,), jnp.int32),
        "kept_tile": plgpu.SMEM((_ROWS,), jnp.float32),
        "upto_tile": plgpu.SMEM((_ROWS,), jnp.float32),
        "indices_tile": plgpu.SMEM((_ROWS,), jnp.int32),
        "full": plgpu.Barrier(num_arrivals=3),
        "keys_told": told_to_all,
        "upto_told": told_to_all,
    }
    names = [*operands, *results, *scratch]
    num, indices, *_ = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=tuple(scratch.values()),
        grid=(lists,),
        grid_names=("list",),
        cluster=(parts,),
        cluster_names=("part",),
        compiler_params=_compat.mosaic_gpu_params(plgpu),
    )(*operands.values())
    lead = batch, groups
    return KeyLists(
        num.reshape(lead),
        indices[:, :num_kept].reshape(*lead, num_kept),
        jnp.zeros(lead, jnp.bool_),
        page_size,
    )

"""The kernel for Hopper: each row is read once and searched in registers.

A program is one warpgroup with 64 rows. The number that splits a row is found bit by
bit, a count over the row for each; then, in the same way, the index that splits those
that are equal to it. What is kept follows from the two, wherever it is used. Counts
compare floats, for which the device has one instruction where integers take two.

Where integers are chosen, a constant comes second, as in `_order`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat
from sparsejax._order import below, mirrored, ordered
from sparsejax.ops._platform import jit_kernel

_ROWS = 64  # of a program
_COLUMNS = 64  # rows are padded to a multiple
_MOST_COLUMNS = 256  # more would not fit into the registers
_BELOW = below(jnp.int32)  # every key
_TINY = 2**23  # the key of the least normal number


def unsupported_reason(x: jax.Array) -> str | None:
    """Why this kernel cannot take these rows, by shape and dtype; None if it can."""
    if x.dtype.itemsize > 4:
        return f"`x` must be float32 or narrower; got {x.dtype}"
    if not x.size or x.shape[-1] > _MOST_COLUMNS:
        return (
            f"there must be rows, of at most {_MOST_COLUMNS} entries; got shape "
            f"{x.shape}"
        )
    return None


def keep_highest(x: jax.Array, num_kept: int | jax.Array) -> jax.Array:
    """As the reference."""
    columns = x.shape[-1]
    values = x.astype(jnp.float32).reshape(-1, columns)
    # subnormals, which not every device compares, count as 0
    values = jnp.where(jnp.abs(values) < jnp.finfo(jnp.float32).tiny, 0, values)
    wanted = jnp.broadcast_to(jnp.int32(num_kept), x.shape[:-1]).reshape(-1)
    rows = len(values)
    # what is added at the right is below every number, and last among its equals
    pads = (0, -rows % _ROWS), (0, -columns % _COLUMNS)
    padded = jnp.pad(values, pads, constant_values=jnp.nan)
    split, last = _search(padded, jnp.pad(wanted, pads[:1]))
    keys, split, last = ordered(values), split[:rows, None], last[:rows, None]
    kept = (keys > split) | ((keys == split) & (jnp.arange(columns) <= last))
    return kept.reshape(x.shape)


@jit_kernel
def _search(x: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key that splits each row, and the last index at which it is kept."""
    num_rows, columns = x.shape
    shape = (_ROWS, columns)
    of_row = plgpu.Layout.WGMMA.reduce(1)

    def spread(values):
        return jax.lax.broadcast_in_dim(values, shape, [0])

    def count(which):
        return jnp.sum(jnp.where(which, 1.0, 0.0), axis=1)

    def constant(value):
        return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.int32), of_row)

    def bisect(start, highest_bit, fits):
        """The most that fits, as `start` does, by adding bits from the highest on."""

        def step(_, carry):
            value, bit = carry
            more = value + bit
            return jnp.where(fits(more), more, value), jax.lax.div(bit, 2)

        bits = highest_bit.bit_length()
        return jax.lax.fori_loop(0, bits, step, (start, jnp.int32(highest_bit)))[0]

    def body(x_gmem, wanted_gmem, split_gmem, last_gmem):
        here = pl.ds(jax.lax.axis_index("program") * _ROWS, _ROWS)
        load = functools.partial(_compat.mosaic_gpu_load, plgpu)
        x = load(x_gmem.at[here], plgpu.Layout.WGMMA)
        wanted = load(wanted_gmem.at[here], of_row).astype(jnp.float32)

        def enough(key):  # a key beyond the infinities is a NaN, and nothing reaches it
            key = jnp.where((key <= 0) | (key >= _TINY), key, _TINY)
            bound = jax.lax.bitcast_convert_type(mirrored(key), jnp.float32)
            return count(x >= spread(bound)) >= wanted

        zero = constant(0)
        split = bisect(jnp.where(enough(zero), zero, constant(_BELOW)), 2**30, enough)
        # too few numbers: NaN are kept too
        split = jnp.where(split != _BELOW, split, _BELOW + 1)
        keys = ordered(x)
        left = wanted - count(keys > spread(split))
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        tied = jnp.where(keys == spread(split), column.astype(jnp.float32), columns)

        def too_few(index):  # to the left of it
            return count(tied < spread(index.astype(jnp.float32))) < left

        last = bisect(zero, 2 ** ((columns - 1).bit_length() - 1), too_few)
        split_gmem[here] = split
        last_gmem[here] = last

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((num_rows,), jnp.int32),) * 2,
        grid=(num_rows // _ROWS,),
        grid_names=("program",),
        compiler_params=_compat.mosaic_gpu_params(plgpu),
    )(x, wanted)

"""Zeros for the blocks that are not kept, written between the loads of a kernel.

A program's share of them is spread over its steps: they then take no time of their own,
where the memory has any to spare.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax.ops.block_matmul._pipeline import Aside

_EVERY = 8  # steps


def spread_out(
    zeros: Any,
    write: Callable[[jax.Array], None],
    *,
    num: jax.Array,
    num_steps: jax.Array,
) -> Aside:
    """Writes some pieces every few steps, and at the end those that are left.

    Args:
      zeros: shared memory `[rows, columns]`, to be filled with zeros.
      write: starts the copies of piece i from `zeros`.
      num: pieces, int32.
      num_steps: of the program, int32.
    """
    chunks = jnp.maximum(jax.lax.div(num_steps + _EVERY - 1, _EVERY), 1)
    in_chunk = jax.lax.div(num + chunks - 1, chunks)

    def write_some(first, last):
        jax.lax.fori_loop(first, last, lambda i, _: write(i), None)

    def begin():
        filling = jnp.zeros(zeros.shape, zeros.dtype)
        zeros[...] = plgpu.layout_cast(filling, plgpu.Layout.WGMMA)
        plgpu.commit_smem()

    def after(step):
        @pl.when(jax.lax.rem(step, _EVERY) == 0)
        def _():
            first = jax.lax.div(step, _EVERY) * in_chunk
            write_some(first, jnp.minimum(first + in_chunk, num))

    def end():
        write_some(jnp.where(num_steps > 0, chunks * in_chunk, 0), num)
        plgpu.wait_smem_to_gmem(0)

    return Aside(begin, after, end)


def is_listed(
    entry: Callable[[jax.Array], jax.Array],
    length: jax.Array,
    capacity: int,
    wanted: jax.Array,
) -> jax.Array:
    """Whether a list has a number, by bisection.

    Args:
      entry: takes an index below `capacity` and gives a number; ascending.
      length: of the list, int32.
      capacity: most that it may be.
      wanted: int32.
    """

    def read(i):
        return entry(jnp.minimum(i, capacity - 1))

    def halve(bounds):
        low, high = bounds
        middle = jax.lax.div(low + high, 2)
        below = read(middle) < wanted
        return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

    # what is read varies over a mesh, what is computed in a kernel does not
    bounds = jnp.int32(0), jnp.minimum(length, capacity)
    at, _ = jax.lax.while_loop(lambda b: b[0] < b[1], halve, bounds)
    return (at < length) & (read(at) == wanted)

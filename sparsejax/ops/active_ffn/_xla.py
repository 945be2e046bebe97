"""`active_ffn` as a loop over a few rows at a time: the fast form on a CPU.

A gather of all rows writes them to memory and reads them back. Here a step of the loop
reads `_ROWS` rows of `up`, and as many of `down`, where they lie; the trip count
follows `num_active`, so that padding costs nothing.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from sparsejax.ops._varying import zeros_beside

# Rows that one step reads side by side. A core waits for a single row, which lies on
# pages of its own; with 8 rows in flight `down` is read three times faster than a
# gather reads it. Beyond 8, XLA splits the small sums over threads, which costs more.
_ROWS = 8
# A row of `up` is read in this many pieces side by side, as its products all end in
# one number. XLA vectorizes sums of pieces, not the sum over a row.
_PIECES = 4
# Up to here a loop of vector products beats two matrix products of gathered rows.
MAX_BATCH = 32


# jitted: a loop that is called eagerly is compiled each time
@jax.jit
def active_ffn(
    x: jax.Array,
    gate: jax.Array,
    indices: jax.Array,
    num_active: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """As the public function, by a loop."""
    batch, d_in = x.shape
    num_active = jnp.clip(num_active, 0, indices.size)
    num_steps = (num_active + _ROWS - 1) // _ROWS
    slots = jnp.arange(-(-indices.size // _ROWS) * _ROWS)
    valid = slots < num_active
    # the last step may be padded: it reads the last active row again, which is cached
    rows = indices[jnp.clip(slots, 0, jnp.maximum(num_active - 1, 0))]
    gates = jnp.pad(gate.T, ((0, slots.size - indices.size), (0, 0)))
    gates = jnp.where(valid[:, None], gates.astype(jnp.float32), 0)

    pieces = next(n for n in (_PIECES, 2, 1) if d_in % n == 0)
    length = d_in // pieces
    ones = jnp.ones(length, jnp.float32)
    x_pieces = jnp.split(x.astype(jnp.float32), pieces, axis=1)

    def row_of(matrix, row, start, size):
        at = row, jnp.int32(start)  # both int32, also where ints are int64
        return jax.lax.dynamic_slice(matrix, at, (1, size)).astype(jnp.float32)

    def products(row):
        """What sums to the dot products of one row: `[batch, length]`."""
        terms = (
            row_of(up, row, i * length, length) * x_piece
            for i, x_piece in enumerate(x_pieces)
        )
        return functools.reduce(operator.add, terms)

    def step(i, out):
        at = jax.lax.dynamic_slice_in_dim(rows, i * _ROWS, _ROWS)
        dots = jnp.dot(
            jnp.stack([products(at[r]) for r in range(_ROWS)]),
            ones,
            precision="highest",
        )
        hidden = dots * jax.lax.dynamic_slice_in_dim(gates, i * _ROWS, _ROWS)
        for r in range(_ROWS):
            out += hidden[r][:, None] * row_of(down, at[r], 0, down.shape[1])
        return out

    like = jnp.broadcast_to(x[:, :1], (batch, down.shape[1]))
    out = zeros_beside(like, gate, up, down)
    return jax.lax.fori_loop(0, num_steps, step, out).astype(x.dtype)

"""The sparse layers on one token a sequence: only what is active is read."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax import attention, nn, ops
from sparsejax._indexing import map_rows
from sparsejax.decode._model import expected_neurons

# With more of the neurons in use, the dense products are faster: two CPU cores at 49 %
# take 57 ms densely and 68 ms row by row, at 29 % 51 ms and 34 ms.
_MOST = 0.4
# What an H100 reads in the 30 us in which a `cond` waits for the host.
_WAIT_BYTES = 64 * 2**20


def active_ffn(
    ffn: nn.SparkFFN,
    up: Float[Array, "d_ff d_in"],
    x: Float[Array, "batch d_model"],
    *,
    factor: float,
) -> tuple[Float[Array, "batch d_model"], Int[Array, ""]]:
    """The Spark FFN, reading the rows of `up` and `down` that any token needs.

    Args:
      ffn: the layer.
      up: the kernel of its `up`, a row for each neuron.
      x: its input.
      factor: room for active neurons over the expected number.

    Returns:
      What the layer gives, and 1 if there was no room, so that all was read. Where the
      batch is expected to use most neurons anyway, all are read from the start.
    """
    expected = expected_neurons(ffn, len(x))
    if expected > _MOST * up.shape[0]:
        return ffn(x), jnp.int32(0)
    # a kernel would get its part as a slice of `x`, made whole beside the gate's part
    rest = jax.lax.optimization_barrier(ffn.parts(x)[1])
    down = ffn.down.kernel[...]
    # The time of a kernel follows what is active. At a `cond` a GPU waits for the host,
    # for as long as the layer takes.
    has_kernel = functools.partial(ops.has_gated_ffn_kernel, rest, up, down)
    if has_kernel(activation=ffn.activation):
        scores, threshold = ffn.gate_scores(x)
        y = ops.gated_ffn(
            *(rest, scores, up, down), threshold=threshold, activation=ffn.activation
        )
        return y, jnp.int32(0)
    gate = ffn.gate_values(x)
    if has_kernel():
        return ops.gated_ffn(rest, gate, up, down), jnp.int32(0)
    active = (gate != 0).any(axis=0)
    capacity = math.ceil(min(active.size, factor * expected))

    def sparse():
        indices, num_active, _ = ops.active_indices(active, capacity)
        gates = jnp.take(gate, indices, axis=1)
        return ops.active_ffn(rest, gates, indices, num_active, up, down)

    def dense():
        return ffn.down(gate * ffn.up(rest))

    overflowed = jnp.sum(active) > capacity
    y = jax.lax.cond(overflowed, dense, sparse)
    return y, overflowed.astype(jnp.int32)


def gathered_attention(
    layer: nn.SparkAttention,
    query: Float[Array, "batch 1 heads head_dim"],
    key: Float[Array, "batch slots kv_heads head_dim"],
    value: Float[Array, "batch slots kv_heads head_dim"],
    valid: Bool[Array, "batch 1 1 slots"],
    *,
    factor: float,
) -> tuple[Float[Array, "batch 1 heads head_dim"], Int[Array, ""]]:
    """Spark attention of one query a sequence, reading the selected keys and values.

    The predictor's part of every key is read; of the others' part and of the values,
    the rows of the selected keys alone. Where the heads that share a key head would
    together gather as many rows as it has, all are read at once instead; on a GPU also
    where that takes less time than the host needs to choose by the number of rows.

    Args:
      layer: of which the settings are used.
      query: rotated.
      key: rotated, in the cache.
      value: in the cache.
      valid: slots that the query sees.
      factor: room for attended keys over `layer.k`.

    Returns:
      What `layer.attend` gives, and 1 if there was no room, so that all was read.
    """
    # a gather reads a row for each head, the dense products for each key head
    capacity = math.ceil(min(key.shape[1], factor * layer.k))
    rows = capacity * (layer.num_heads // layer.num_kv_heads)

    def dense(query, key, value, valid):
        y, _ = layer.attend(query, key, value, valid)
        return y, jnp.zeros_like(y, jnp.int32, shape=())  # varies as that of the other

    def sparse(query, key, value, valid):
        scores = attention.scaled_scores(
            query[..., : layer.split], key[..., : layer.split]
        )[..., 0, :]
        attended = attention.spark_selection(scores, valid, k=layer.k)
        overflowed = jnp.any(jnp.sum(attended, axis=-1) > capacity)

        def gathered():
            rest = query[:, 0, :, layer.split :].reshape(*scores.shape[:3], -1)
            top = ops.highest(scores, where=valid)
            return _gathered(layer, scores, attended, top, rest, key, value, capacity)

        def all_read():
            return dense(query, key, value, valid)[0]

        y = jax.lax.cond(overflowed, all_read, gathered)
        return y, overflowed.astype(jnp.int32)

    operands = query, key, value, valid
    if rows >= key.shape[1]:
        return dense(*operands)
    if key.nbytes + value.nbytes >= _WAIT_BYTES:
        return sparse(*operands)
    return jax.lax.platform_dependent(*operands, cuda=dense, default=sparse)


def _gathered(layer, scores, attended, top, rest, key, value, capacity):
    """The softmax over `capacity` gathered keys of each head."""
    batch, kv_heads, group, num_slots = scores.shape
    indices, num, _ = jax.vmap(ops.active_indices, in_axes=(0, None))(
        attended.reshape(-1, num_slots), capacity
    )
    indices = indices.reshape(batch, kv_heads, group, capacity)
    num = num.reshape(batch, kv_heads, group, 1)
    kept = jnp.arange(capacity)[None, None, None] < num

    def listed(row, indices):
        return row[indices, jnp.arange(kv_heads)[:, None, None]]

    products = jnp.einsum(
        "bhgd,bhgcd->bhgc",
        rest,
        map_rows(listed, key[..., layer.split :], indices),
        preferred_element_type=jnp.float32,
    )
    scores = jnp.take_along_axis(scores, indices, axis=-1)
    weights = ops.kept_weights(scores, products * rest.shape[-1] ** -0.5, kept, top)
    values = map_rows(listed, value, indices)
    out = jnp.einsum("bhgc,bhgcd->bhgd", weights.astype(value.dtype), values)
    return out.reshape(batch, kv_heads * group, -1)[:, None]

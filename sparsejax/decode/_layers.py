"""The sparse layers on one token a sequence: only what is active is read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax import attention, nn, ops
from sparsejax.decode._model import key_capacity, neuron_capacity


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
      What the layer gives, and 1 if there was no room, so that all was read.
    """
    gate = ffn.gate_values(x)
    _, rest = ffn.parts(x)
    capacity = neuron_capacity(ffn, len(x), factor)
    indices, num_active, overflowed = ops.active_indices(
        (gate != 0).any(axis=0), capacity
    )

    def sparse():
        return ops.active_ffn(
            rest,
            jnp.take(gate, indices, axis=1),
            indices,
            num_active,
            up,
            ffn.down.kernel[...],
        )

    def dense():
        return ffn.down(gate * ffn.up(rest))

    return jax.lax.cond(overflowed, dense, sparse), overflowed.astype(jnp.int32)


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
    together gather as many rows as it has, all are read at once instead.

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
    capacity = key_capacity(layer, factor)
    if capacity * (layer.num_heads // layer.num_kv_heads) >= key.shape[1]:
        return layer.attend(query, key, value, valid)[0], jnp.int32(0)
    scores = attention.scaled_scores(
        query[..., : layer.split], key[..., : layer.split]
    )[..., 0, :]
    attended = attention.spark_selection(scores, valid, k=layer.k)
    overflowed = jnp.any(jnp.sum(attended, axis=-1) > capacity)

    def sparse():
        rest = query[:, 0, :, layer.split :].reshape(*scores.shape[:3], -1)
        return _gathered(layer, scores, attended, rest, key, value, capacity)

    def dense():
        return layer.attend(query, key, value, valid)[0]

    return jax.lax.cond(overflowed, dense, sparse), overflowed.astype(jnp.int32)


def _gathered(layer, scores, attended, rest, key, value, capacity):
    """The softmax over `capacity` gathered keys of each head."""
    batch, kv_heads, group, slots = scores.shape
    indices, num, _ = jax.vmap(ops.active_indices, in_axes=(0, None))(
        attended.reshape(-1, slots), capacity
    )
    indices = indices.reshape(batch, kv_heads, group, capacity)
    num = num.reshape(batch, kv_heads, group, 1)
    kept = jnp.arange(capacity) < num
    rows = (
        jnp.arange(batch)[:, None, None, None],
        indices,
        jnp.arange(kv_heads)[:, None, None],
    )
    products = jnp.einsum(
        "bhgd,bhgcd->bhgc",
        rest,
        key[..., layer.split :][rows],
        preferred_element_type=jnp.float32,
    )
    weights = attention.masked_softmax(
        jnp.take_along_axis(scores, indices, axis=-1), kept, num > 0
    )
    weights *= jax.nn.softplus(products * rest.shape[-1] ** -0.5)
    out = jnp.einsum("bhgc,bhgcd->bhgd", weights.astype(value.dtype), value[rows])
    return out.reshape(batch, 1, kv_heads * group, -1)

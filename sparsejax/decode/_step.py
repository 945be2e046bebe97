"""Prefill and one step of decoding: the decoder's layers over a cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from sparsejax import attention, ops
from sparsejax.decode._cache import Cache
from sparsejax.decode._layers import active_ffn, gathered_attention
from sparsejax.decode._model import DecodeModel, is_sparse_attention
from sparsejax.decode._selector import in_slots, layer_tokens


class Overflows(NamedTuple):
    """How often more was active than there was room for: int32 `[num_layers]` each.

    The layer was then computed densely, with the same result. Where a `KeySelector` had
    chosen keys that its lists had no room for, in any sequence, they were not read:
    that step counts in `attention` too, and a larger cache has more room.
    """

    ffn: jax.Array
    attention: jax.Array


def prefill(
    model: DecodeModel,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    *,
    num_slots: int,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Reads the prompts.

    All layers are computed densely: over many tokens nearly every neuron is used.

    Args:
      model: from `prepare`.
      tokens: prompts, filled up at the end with anything.
      lengths: of the prompts, in `[1, seq]`.
      num_slots: of the cache, at least `seq`: prompt and what is to come.

    Returns:
      float32 logits of the token after each prompt, and the cache.

    Raises:
      ValueError: if `num_slots` is below `seq`.
    """
    decoder = model.decoder()
    seq = tokens.shape[1]
    if num_slots < seq:
        raise ValueError(
            f"`num_slots` must be at least {seq}, those that the prompts fill; got "
            f"{num_slots}."
        )
    positions = jnp.broadcast_to(jnp.arange(seq), tokens.shape)
    lengths = jnp.array(lengths, jnp.int32)  # a copy: a step may be donated the cache
    # of what is no token the embedding is NaN, which no mask keeps from the others
    tokens = jnp.where(positions < lengths[:, None], tokens, 0)
    x = decoder.embed(tokens)
    keys, values, known = [], [], []
    for block, selector in zip(decoder.blocks, model.select_keys, strict=True):
        layer = block.attention
        seen, value = layer_tokens(layer, block.attention_norm(x), positions)
        y, _ = layer.attend(seen.query, seen.key, value, lengths=lengths)
        x = x + layer.combine(y)
        x = x + block.ffn(block.ffn_norm(x))
        keys.append(in_slots(seen.key, num_slots))
        values.append(in_slots(value, num_slots))
        known.append(
            None
            if selector is None
            else jax.tree.map(_own, selector.start(seen, lengths, num_slots))
        )
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
    cache = Cache(tuple(keys), tuple(values), lengths, tuple(known))
    return decoder.logits(last), cache


def _own(leaf: jax.Array) -> jax.Array:
    """A copy, since the model's or another leaf's buffer must not be donated."""
    return leaf if isinstance(leaf, Tracer) else jnp.copy(leaf)


def decode_step(
    model: DecodeModel, tokens: Int[Array, " batch"], cache: Cache
) -> tuple[Float[Array, "batch vocab"], Cache, Overflows]:
    """Appends one token to each sequence.

    Args:
      model: from `prepare`.
      tokens: the next token of each sequence.
      cache: of the tokens before, with a slot left in each sequence. Donate it, or
        carry it through `lax.scan`: it is then changed in place.

    Returns:
      float32 logits of the token after these, the cache, and what overflowed: 0 or 1
      for each layer.
    """
    decoder = model.decoder()
    positions = cache.lengths[:, None]
    slots = jnp.arange(cache.keys[0].shape[1])[None]
    x = decoder.embed(tokens)[:, None]
    keys, values, knowns, ffn_overflows, attention_overflows = [], [], [], [], []
    for layer, block in enumerate(decoder.blocks):
        seen, value = layer_tokens(block.attention, block.attention_norm(x), positions)
        key = _written(cache.keys[layer], cache.lengths, seen.key)
        value = _written(cache.values[layer], cache.lengths, value)
        known, selector = cache.known[layer], model.select_keys[layer]
        if selector is not None:
            known = selector.append(known, seen)
            lists = selector.select(known, seen)
            y = ops.listed_attention(seen.query, key, value, lists, cache.lengths + 1)
            overflow = jnp.any(lists.overflowed).astype(jnp.int32)
        else:
            window = block.attention.window
            valid = attention.causal_mask(positions, slots, window=window)
            y, overflow = _attend(model, block.attention, seen.query, key, value, valid)
        attention_overflows.append(overflow)
        x = x + block.attention.combine(y)
        y, overflow = _feed_forward(model, layer, block.ffn, block.ffn_norm(x)[:, 0])
        ffn_overflows.append(overflow)
        x = x + y[:, None]
        keys.append(key)
        values.append(value)
        knowns.append(known)
    cache = Cache(tuple(keys), tuple(values), cache.lengths + 1, tuple(knowns))
    overflows = Overflows(jnp.stack(ffn_overflows), jnp.stack(attention_overflows))
    return decoder.logits(x[:, 0]), cache, overflows


def _written(cached: jax.Array, lengths: jax.Array, new: jax.Array) -> jax.Array:
    """The cache with `new[b, 0]` in slot `lengths[b]`."""
    return attention.change_slots(cached, lengths, lambda _: new)


def _attend(model, layer, query, key, value, valid):
    if model.sparse and is_sparse_attention(layer):
        return gathered_attention(
            layer, query, key, value, valid, factor=model.capacity_factor
        )
    return layer.attend(query, key, value, valid)[0], jnp.int32(0)


def _feed_forward(model, layer, ffn, x):
    if model.up[layer] is None:
        return ffn(x[:, None])[:, 0], jnp.int32(0)  # as a user's own layer has it
    return active_ffn(ffn, model.up[layer], x, factor=model.capacity_factor)

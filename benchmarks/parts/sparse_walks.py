"""A trained decoder whose layers, but for the local one, read what a selector keeps."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from benchmarks.parts import long_context_model, sparse_selectors
from benchmarks.parts import long_context_tasks as tasks
from sparsejax import attention, formats, models, nn, ops

Pair = tuple[jax.Array, jax.Array]  # queries and keys
Selection = formats.BlockMask | jax.Array  # a mask, or PSA's levels


def attend(
    query,
    key,
    value,
    selection: Selection,
    *,
    block_shape: tuple[int, int],
    implementation: ops.Implementation | None = None,
) -> jax.Array:
    """Causal attention to what is selected."""
    options: dict[str, Any] = {"causal": True, "implementation": implementation}
    if isinstance(selection, formats.BlockMask):
        return ops.block_attention(query, key, value, selection, **options)
    return attention.pyramid_attention(
        query,
        key,
        value,
        selection,
        block_shape=block_shape,
        levels=sparse_selectors.PSA_LEVELS,
        **options,
    )


def density(
    selection: Selection, num_queries: int, *, block_shape: tuple[int, int]
) -> jax.Array:
    """The share of the pairs in sight that is read; of pooled keys one is one."""
    if isinstance(selection, formats.BlockMask):
        return attention.pair_density(selection, num_queries).mean()
    of_query = attention.pyramid_density(
        selection,
        num_queries,
        block_shape=block_shape,
        levels=sparse_selectors.PSA_LEVELS,
    )
    in_sight = 1 + jnp.arange(num_queries, dtype=jnp.float32)
    return jnp.average(of_query.mean(axis=0), weights=in_sight)


def shape_of_blocks(selection: Selection, length: int) -> tuple[int, int]:
    """Of queries and keys; levels say how many blocks they are for."""
    if isinstance(selection, formats.BlockMask):
        return selection.block_shape
    rows, columns = selection.shape[-2:]
    return -(-length // rows), -(-length // columns)


def measure(query, key, selection: Selection) -> jax.Array:
    """Realised density and recalled mass `[2]`, means over batch, heads and queries."""
    shape = shape_of_blocks(selection, query.shape[1])
    if isinstance(selection, formats.BlockMask):
        kept = selection
    else:
        kept = formats.BlockMask.from_blocks(selection > 0, shape)
    read = functools.partial(ops.block_attention, causal=True, with_lse=True)
    (_, every), (_, some) = read(query, key, key), read(query, key, key, kept)
    realised = density(selection, query.shape[1], block_shape=shape)
    return jnp.stack([realised, jnp.exp(some - every).mean()])


def look(
    layer: nn.SeerAttention, unrotated: Pair, rotated: Pair
) -> sparse_selectors.Seen:
    """What a selector sees in a layer, of its queries and keys."""
    gate = attention.seer_scores(
        layer.gate(), *unrotated, block=layer.block, rotate=layer.rotate
    )
    return sparse_selectors.Seen(*rotated, gate)


def project(layer: nn.Attention, x, positions) -> tuple[Pair, Pair, jax.Array]:
    """Queries and keys before and after their rotation, and values."""
    query, key, value = layer.unrotated(x)
    rotated = layer.rotate(query, positions), layer.rotate(key, positions)
    return (query, key), rotated, value


def prefill(model: models.Decoder, tokens, select, density):
    """Likeliest tokens after each of the last, density and mass, all layers sparse."""
    x = model.embed(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    found = []
    for block in model.blocks:
        layer = block.attention
        if not isinstance(layer, nn.SeerAttention):
            x = block(x, positions)
            continue
        pairs, rotated, value = project(layer, block.attention_norm(x), positions)
        selection = select(look(layer, pairs, rotated), density)
        shape = shape_of_blocks(selection, tokens.shape[1])
        y = attend(*rotated, value, selection, block_shape=shape)
        found.append(measure(*rotated, selection))
        x = x + layer.combine(y)
        x = x + block.ffn(block.ffn_norm(x))
    logits = model.logits(x[:, -tasks.ANSWER - 1 : -1])
    return logits.argmax(-1), *jnp.asarray(found).mean(0)


def calibrate(model: models.Decoder, tokens) -> list[attention.LabelChannels]:
    """The channels of each layer's labels, by its queries and keys of these tokens."""
    x = model.embed(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    channels = []
    for block in model.blocks:
        query, key, _ = block.attention.project(block.attention_norm(x), positions)
        scores = attention.channel_scores(query, key)
        size = query.shape[-1] // sparse_selectors.LABEL
        channels.append(attention.select_channels(scores, num_channels=size))
        x = block(x, positions)
    return channels


def decode(model: models.Decoder, tokens, select, density, channels):
    """As `prefill`, with a dense prompt and an answer that is read by listed keys.

    `channels` are of `calibrate`.
    """
    prompt = tokens.shape[1] - tasks.ANSWER
    x = model.embed(tokens[:, :prompt])
    positions = jnp.broadcast_to(jnp.arange(prompt), x.shape[:2])
    caches = []
    for block in model.blocks:
        layer = cast(nn.Attention, block.attention)
        normed = block.attention_norm(x)
        pairs, rotated, value = project(layer, normed, positions)
        asked = gated = None
        later = ((0, 0), (0, tasks.ANSWER), (0, 0), (0, 0))
        if isinstance(layer, long_context_model.Gated):
            asked = rotated[0][:, -sparse_selectors.WINDOW :]
            gated = gate_cache(layer, jnp.pad(pairs[1], later), prompt)
            y = ops.block_attention(*rotated, value, causal=True)
        else:
            y, _ = layer.mix(normed, positions)
        caches.append((asked, jnp.pad(rotated[1], later), jnp.pad(value, later), gated))
        x = x + layer.combine(y)
        x = x + block.ffn(block.ffn_norm(x))

    def step(caches, at):
        token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
        x, position = model.embed(token), jnp.broadcast_to(at, token.shape)
        new, found = [], []
        layers = zip(model.blocks, caches, channels, strict=True)
        for block, (asked, keys, values, gated), labels in layers:
            layer = cast(nn.Attention, block.attention)
            pairs, (q, k), v = project(layer, block.attention_norm(x), position)
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k, at, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v, at, axis=1)
            if isinstance(layer, long_context_model.Gated):
                gated = attention.append_to_seer_cache(
                    layer.decode_gate.get_value(), gated, pairs[1], rotate=layer.rotate
                )
                cached = sparse_selectors.Cached(
                    *(asked, q, keys, prompt, at + 1, labels),
                    gate=gate_scores(layer, gated, pairs[0]),
                )
                lists = select(cached, density)
                y = ops.listed_attention(q, keys, values, lists, at + 1)
                mass = listed_mass(q, keys, lists, at + 1)
                found.append((lists.density(at + 1).mean(), mass))
            else:
                ats = jnp.arange(keys.shape[1])
                valid = (ats <= at) & (ats > at - layer.window)
                y, _ = layer.attend(q, keys, values, valid[None, None, None])
            new.append((asked, keys, values, gated))
            x = x + layer.combine(y)
            x = x + block.ffn(block.ffn_norm(x))
        return new, (model.logits(x)[:, 0].argmax(-1), jnp.asarray(found).mean(0))

    ats = prompt + jnp.arange(tasks.ANSWER - 1)
    _, (predicted, found) = jax.lax.scan(step, caches, ats)
    predicted = jnp.pad(predicted.T, ((0, 0), (1, 0)))  # the first token is given
    return predicted, *found.mean(0)


def gate_cache(layer: long_context_model.Gated, key, length) -> attention.SeerCache:
    """What the gate keeps of a cache of keys before their rotation."""
    gate = layer.decode_gate.get_value()
    return attention.seer_cache(
        gate, key, block=layer.block, rotate=layer.rotate, lengths=length
    )


def gate_scores(layer: long_context_model.Gated, cache, query) -> jax.Array:
    return attention.seer_cached_scores(
        layer.decode_gate.get_value(), cache, query, rotate=layer.rotate
    )


def listed_mass(query, key, lists: formats.KeyLists, length) -> jax.Array:
    """The share of the dense weights on the listed keys."""
    scores = attention.scaled_scores(query, key)  # [batch, kv_heads, group, 1, slots]
    there = jnp.arange(key.shape[1]) < length
    weights = jax.nn.softmax(jnp.where(there, scores, -jnp.inf), axis=-1)
    kept = lists.to_mask(key.shape[1]) & there
    kept = jnp.broadcast_to(kept, (len(query), *kept.shape[1:]))
    if kept.shape[1] not in (1, weights.shape[1]):  # a list for each query head
        kept = kept.reshape(*weights.shape[:3], -1)
    else:
        kept = kept[:, :, None]
    return jnp.sum(weights * kept[..., None, :], axis=-1).mean()

"""A trained decoder whose layers, but for the local one, read what a selector keeps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import long_context_tasks as tasks
from benchmarks import sparse_selectors
from sparsejax import attention, formats, models, nn, ops

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
    cost = {1: selection}
    if not isinstance(selection, formats.BlockMask):
        cost = {
            h: formats.BlockMask.from_blocks(selection == h, block_shape)
            for h in sparse_selectors.PSA_LEVELS
        }
    shares = (
        attention.pair_density(mask, num_queries).mean() / h for h, mask in cost.items()
    )
    return sum(shares, jnp.zeros(()))


def measure(query, key, selection: Selection, block: int) -> jax.Array:
    """Realised density and recalled mass `[2]`, means over batch, heads and queries."""
    shape, kept = (block, block), selection
    if not isinstance(selection, formats.BlockMask):
        kept = formats.BlockMask.from_blocks(selection > 0, shape)
    read = functools.partial(ops.block_attention, causal=True, with_lse=True)
    (_, every), (_, some) = read(query, key, key), read(query, key, key, kept)
    realised = density(selection, query.shape[1], block_shape=shape)
    return jnp.stack([realised, jnp.exp(some - every).mean()])


def look(
    layer: nn.SeerAttention, x, positions
) -> tuple[sparse_selectors.Seen, jax.Array]:
    """What a selector sees in a layer, and the values."""
    query, key, value = layer.project(x, positions)
    return sparse_selectors.Seen(query, key, layer.scores(x, positions)), value


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
        seen, value = look(layer, block.attention_norm(x), positions)
        selection = select(seen, density)
        y = attend(seen.query, seen.key, value, selection, block_shape=seen.shape)
        found.append(measure(seen.query, seen.key, selection, layer.block))
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
    window = sparse_selectors.WINDOW
    x = model.embed(tokens[:, :prompt])
    positions = jnp.broadcast_to(jnp.arange(prompt), x.shape[:2])
    caches = []
    for block in model.blocks:
        query, key, value = block.attention.project(block.attention_norm(x), positions)
        room = ((0, 0), (0, tasks.ANSWER), (0, 0), (0, 0))
        caches.append((query[:, -window:], jnp.pad(key, room), jnp.pad(value, room)))
        y = ops.block_attention(
            query, key, value, causal=True, window=block.attention.window
        )
        x = x + block.attention.combine(y)
        x = x + block.ffn(block.ffn_norm(x))

    def step(caches, at):
        token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
        x, position = model.embed(token), jnp.broadcast_to(at, token.shape)
        new, found = [], []
        layers = zip(model.blocks, caches, channels, strict=True)
        for block, (asked, keys, values), labels in layers:
            q, k, v = block.attention.project(block.attention_norm(x), position)
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k, at, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v, at, axis=1)
            if window_of := block.attention.window:
                ats = jnp.arange(keys.shape[1])
                valid = (ats <= at) & (ats > at - window_of)
                y, _ = block.attention.attend(q, keys, values, valid[None, None, None])
            else:
                cached = sparse_selectors.Cached(asked, q, keys, prompt, at + 1, labels)
                lists = select(cached, density)
                y = ops.listed_attention(q, keys, values, lists, at + 1)
                mass = listed_mass(q, keys, lists, at + 1)
                found.append((lists.density(at + 1).mean(), mass))
            new.append((asked, keys, values))
            x = x + block.attention.combine(y)
            x = x + block.ffn(block.ffn_norm(x))
        return new, (model.logits(x)[:, 0].argmax(-1), jnp.asarray(found).mean(0))

    ats = prompt + jnp.arange(tasks.ANSWER - 1)
    _, (predicted, found) = jax.lax.scan(step, caches, ats)
    predicted = jnp.pad(predicted.T, ((0, 0), (1, 0)))  # the first token is given
    return predicted, *found.mean(0)


def listed_mass(query, key, lists: formats.KeyLists, length) -> jax.Array:
    """The share of the dense weights on the listed keys."""
    scores = attention.scaled_scores(query, key)  # [batch, kv_heads, group, 1, room]
    there = jnp.arange(key.shape[1]) < length
    weights = jax.nn.softmax(jnp.where(there, scores, -jnp.inf), axis=-1)
    kept = lists.to_mask(key.shape[1]) & there
    kept = jnp.broadcast_to(kept, (len(query), *kept.shape[1:]))
    if kept.shape[1] not in (1, weights.shape[1]):  # a list for each query head
        kept = kept.reshape(*weights.shape[:3], -1)
    else:
        kept = kept[:, :, None]
    return jnp.sum(weights * kept[..., None, :], axis=-1).mean()

"""Decoding by hand: one layer, one sequence, without a cache and without padding."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax import models

CONFIG = models.DecoderConfig(
    vocab_size=31,
    d_model=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=64,
)
_ROOM = 64  # tokens are computed by themselves, so that one program serves all lengths


class Seen(NamedTuple):
    """Of one sequence, float64 `[tokens, heads | kv_heads, head_dim]`."""

    query: np.ndarray
    key: np.ndarray
    unrotated_query: np.ndarray
    unrotated_key: np.ndarray
    value: np.ndarray


@functools.cache
def _made(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return nnx.split(nnx.jit(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))())


def make(**changes):
    return nnx.merge(*_made(**changes))


def prompts(batch=2, seq=24):
    return jax.random.randint(jax.random.key(5), (batch, seq), 0, 31)


@nnx.jit
def _projected(model, tokens):
    block, positions = model.blocks[0], jnp.arange(len(tokens))[None]
    x = model.embed(tokens[None])
    query, key, value = block.attention.unrotated(block.attention_norm(x))
    rotated = [block.attention.rotate(y, positions) for y in (query, key)]
    return x[0], Seen(*(y[0] for y in (*rotated, query, key, value)))


@nnx.jit
def _logits(model, x, attended):
    block = model.blocks[0]
    x = x[None, None] + block.attention.combine(attended[None, None])
    x = x + block.ffn(block.ffn_norm(x))
    return model.logits(x[:, 0])[0]


def logits(model, tokens, kept_by_loops):
    """Of the token after `tokens`, the last of which reads the kept keys alone.

    `kept_by_loops` gives them for each key head, from what is `Seen` of `tokens`.
    """
    num = len(tokens)
    x, seen = _projected(model, np.pad(np.asarray(tokens), (0, _ROOM - num)))
    seen = jax.tree.map(lambda y: np.asarray(y[:num], np.float64), seen)
    kept = kept_by_loops(seen)
    query = seen.query[-1]
    out = np.zeros_like(query)
    for head in range(len(query)):
        kv_head = head // (len(query) // seen.key.shape[1])
        at = sorted(kept[kv_head])
        scores = seen.key[at, kv_head] @ query[head] / query.shape[-1] ** 0.5
        weights = np.exp(scores - scores.max())
        out[head] = weights @ seen.value[at, kv_head] / weights.sum()
    return np.asarray(_logits(model, x[num - 1], jnp.asarray(out, jnp.float32)))


def every_key(seen):
    """Of each key head: full attention."""
    return [range(len(seen.key))] * seen.key.shape[1]


def greedy(model, prompt, num_tokens, kept_by_loops):
    """Continues a prompt; its last token reads every key, as in the prefill."""
    text = list(np.asarray(prompt))
    for i in range(num_tokens):
        kept = kept_by_loops if i else every_key
        text.append(int(logits(model, np.array(text), kept).argmax()))
    return text[len(prompt) :]

"""Decoding that reads selected pages of the cache alone."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax import attention, decode, models, nn

PAGE = 4
CONFIG = models.DecoderConfig(
    vocab_size=31,
    d_model=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=64,
)


def make(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return nnx.jit(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))()


def prompts(batch=2, seq=24):
    return jax.random.randint(jax.random.key(5), (batch, seq), 0, 31)


def pages_by_loops(query, key, num_kept):
    """Quest from its definition, for one sequence whose last key is the query's."""
    num_keys, kv_heads, _ = key.shape
    group = query.shape[0] // kv_heads
    last = (num_keys - 1) // PAGE
    kept = []
    for head in range(kv_heads):
        bounds = []
        for page in range(last):
            keys = key[page * PAGE : (page + 1) * PAGE, head]
            low, high = keys.min(axis=0), keys.max(axis=0)
            of_group = query[head * group : (head + 1) * group]
            bounds.append(np.maximum(of_group * low, of_group * high).sum())
        best = np.argsort(-np.array(bounds), kind="stable")[:num_kept]
        kept.append({*best.tolist(), last})
    return kept


def logits_by_loops(model, tokens, num_kept):
    """Of the token after `tokens`, the last of which reads its pages alone."""
    block = model.blocks[0]
    x = model.embed(tokens[None])
    positions = jnp.arange(len(tokens))[None]
    projected = block.attention.project(block.attention_norm(x), positions)
    query, key, value = (np.asarray(a[0], np.float64) for a in projected)
    query = query[-1]
    pages = pages_by_loops(query, key, num_kept)
    out = np.zeros_like(query)
    for head in range(len(query)):
        kv_head = head // (len(query) // key.shape[1])
        seen = [i for i in range(len(tokens)) if i // PAGE in pages[kv_head]]
        scores = key[seen, kv_head] @ query[head] / 8**0.5
        weights = np.exp(scores - scores.max())
        out[head] = weights @ value[seen, kv_head] / weights.sum()
    x = x[:, -1:] + block.attention.combine(jnp.asarray(out, jnp.float32)[None, None])
    x = x + block.ffn(block.ffn_norm(x))
    return model.logits(x[:, 0])[0]


def test_each_step_reads_the_pages_of_its_query():
    model, tokens, lengths = make(), prompts(), jnp.array([9, 13])
    ready = decode.prepare(model, select_keys=decode.Quest(2, page_size=PAGE))
    _, cache = jax.jit(decode.prefill, static_argnames="capacity")(
        ready, tokens, lengths, capacity=30
    )
    step = jax.jit(chex.assert_max_traces(decode.decode_step, n=1), donate_argnums=2)
    for i, row in enumerate((0, 1, 1)):  # the oracle is slow
        at = np.asarray(lengths) + i
        logits, cache, _ = step(ready, tokens[np.arange(2), at], cache)
        want = logits_by_loops(model, tokens[row, : at[row] + 1], num_kept=2)
        np.testing.assert_allclose(logits[row], want, atol=2e-5)


def test_with_room_for_all_pages_nothing_changes():
    """Two layers; one attends by blocks, and reads its prompt so."""
    select = functools.partial(
        attention.topk_blocks, num_kept=8, block_shape=(PAGE, PAGE)
    )
    by_blocks = functools.partial(nn.BlockAttention, select=select)
    model = make(num_layers=2, attention=(nn.Attention, by_blocks))
    tokens = prompts(seq=12)
    out = [
        decode.generate(
            decode.prepare(model, select_keys=keys), tokens, num_tokens=6
        ).tokens
        for keys in (None, decode.Quest(64, page_size=PAGE))
    ]
    np.testing.assert_array_equal(out[0], out[1])


def test_layers_with_a_rule_of_their_own_are_left_alone():
    windowed = functools.partial(nn.Attention, window=5)
    spark = functools.partial(nn.SparkAttention, k=4, split=4)
    model = make(num_layers=2, attention=(windowed, spark))
    tokens = prompts(seq=12)
    out = [
        decode.generate(
            decode.prepare(model, select_keys=keys), tokens, num_tokens=3
        ).tokens
        for keys in (None, decode.Quest(1, page_size=PAGE))
    ]
    np.testing.assert_array_equal(out[0], out[1])

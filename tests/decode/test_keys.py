"""Decoding that reads selected pages of the cache alone."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import attention, decode, nn
from tests.decode import by_loops
from tests.decode.by_loops import make, prompts

PAGE = 4


def pages_by_loops(seen, num_kept):
    """Quest from its definition, for one sequence whose last key is the query's."""
    query, key = seen.query[-1], seen.key
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
        pages = {*best.tolist(), last}
        kept.append([i for i in range(num_keys) if i // PAGE in pages])
    return kept


def labelled_by_loops(seen, num_kept, channels):
    """Double Sparsity likewise; no key is always kept by default."""
    query, key = seen.query[-1], seen.key
    kv_heads = key.shape[1]
    group = query.shape[0] // kv_heads
    kept = []
    for head in range(kv_heads):
        of_group = query[head * group : (head + 1) * group, channels[head]]
        scores = (key[:, head][:, channels[head]] @ of_group.T).sum(axis=1)
        best = np.argsort(-scores, kind="stable")[:num_kept]
        kept.append(sorted(best.tolist()))
    return kept


def channels_of(model, tokens, num_channels):
    scores = nnx.jit(decode.channel_scores)(model, tokens)
    return [attention.select_channels(s, num_channels=num_channels) for s in scores]


@pytest.mark.parametrize("method", ["quest", "double sparsity"])
def test_each_step_reads_the_keys_of_its_query(method):
    model, tokens, lengths = make(), prompts(), jnp.array([9, 13])
    if method == "quest":
        select = decode.Quest(2, page_size=PAGE)
        kept_by_loops = functools.partial(pages_by_loops, num_kept=2)
    else:
        channels = channels_of(model, tokens, num_channels=3)[0]
        select = [decode.DoubleSparsity(channels, num_kept=4)]
        kept_by_loops = functools.partial(
            labelled_by_loops, num_kept=4, channels=np.asarray(channels.indices)
        )
    ready = decode.prepare(model, select_keys=select)
    _, cache = jax.jit(decode.prefill, static_argnames="num_slots")(
        ready, tokens, lengths, num_slots=30
    )
    step = jax.jit(chex.assert_max_traces(decode.decode_step, n=1), donate_argnums=2)
    for i in range(3):
        at = np.asarray(lengths) + i
        logits, cache, _ = step(ready, tokens[np.arange(2), at], cache)
        for row in range(2):
            want = by_loops.logits(model, tokens[row, : at[row] + 1], kept_by_loops)
            np.testing.assert_allclose(logits[row], want, atol=2e-5)


def test_scores_of_channels_layer_by_layer():
    """And a sum over batches is that of both at once."""
    model, tokens = make(num_layers=2), prompts(seq=6)
    run = nnx.jit(lambda model, tokens: decode.channel_scores(model, tokens, kind="q"))
    scores = run(model, tokens)
    halves = [run(model, half) for half in (tokens[:1], tokens[1:])]
    chex.assert_trees_all_close(scores, jax.tree.map(jnp.add, *halves), rtol=1e-4)
    x, positions = model.embed(tokens), jnp.broadcast_to(jnp.arange(6), (2, 6))
    for block, got in zip(model.blocks, scores, strict=True):
        query, _, _ = block.attention.project(block.attention_norm(x), positions)
        want = np.abs(np.asarray(query, np.float64)).sum(axis=(0, 1))
        np.testing.assert_allclose(got.reshape(4, 8), want, rtol=1e-4)
        x = block(x, positions)


def test_another_calibration_needs_no_new_trace():
    model, tokens = make(), prompts(seq=8)
    found = channels_of(model, tokens, num_channels=2)[0]
    prefill = chex.assert_max_traces(decode.prefill, n=1)
    prefill = jax.jit(prefill, static_argnames="num_slots")
    knowns = []
    for indices in (found.indices, (found.indices + 1) % 8):
        select = [decode.DoubleSparsity(dataclasses.replace(found, indices=indices))]
        ready = decode.prepare(model, select_keys=select)
        _, cache = prefill(ready, tokens, jnp.array([8, 8]), num_slots=9)
        knowns.append(np.asarray(cache.known[0].values))
    assert np.abs(knowns[0] - knowns[1]).max() > 0


@pytest.mark.once
def test_with_room_for_all_pages_nothing_changes():
    """Two layers; one attends by blocks, and reads its prompt so."""
    select = functools.partial(
        attention.topk_blocks, num_kept=8, block_shape=(PAGE, PAGE)
    )
    by_blocks = functools.partial(nn.BlockAttention, select=select)
    model = make(num_layers=2, attention=(nn.Attention, by_blocks))
    tokens = prompts(seq=12)
    labels = channels_of(model, tokens, num_channels=2)
    out = [
        decode.generate(
            decode.prepare(model, select_keys=keys), tokens, num_tokens=6
        ).tokens
        for keys in (
            None,
            decode.Quest(64, page_size=PAGE),
            [None, decode.DoubleSparsity(labels[1], bits=4)],
        )
    ]
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(out[0], out[2])


@pytest.mark.once
@pytest.mark.parametrize("method", ["quest", "double sparsity"])
def test_one_model_serves_short_and_long_requests(method):
    """A setting may exceed a short cache, of which all is read then."""
    model, tokens = make(), prompts(seq=12)
    channels = channels_of(model, tokens, num_channels=2)[0]
    select = {
        "quest": decode.Quest(1, page_size=8),
        "double sparsity": decode.DoubleSparsity(channels, 20, sink=9, local=9),
    }[method]
    ready, dense = decode.prepare(model, select_keys=select), decode.prepare(model)
    for seq, steps in ((3, 4), (5, 3), (12, 12)):
        got, want = (
            decode.generate(x, tokens[:, :seq], num_tokens=steps).tokens
            for x in (ready, dense)
        )
        assert got.shape == (2, steps)
        if seq + steps <= 8:
            np.testing.assert_array_equal(got, want)


@pytest.mark.once
def test_selectors_of_another_model_raise():
    model, tokens = make(), prompts(seq=8)
    channels = channels_of(model, tokens, num_channels=2)[0]
    select = decode.DoubleSparsity(channels)
    with pytest.raises(ValueError, match="one for each of 1 layers; got 2"):
        decode.prepare(model, select_keys=[select, None])
    ready = decode.prepare(make(num_kv_heads=4), select_keys=[select])
    run = functools.partial(decode.prefill, num_slots=9)
    with pytest.raises(ValueError, match=r"2, 8\], of the model .*got shape \(2, 9, 4"):
        jax.eval_shape(run, ready, tokens, jnp.array([8, 8]))


SPARK = functools.partial(nn.SparkAttention, k=4, split=4)
WINDOW = functools.partial(nn.Attention, window=4)


class Own(nn.Attention):
    selects_keys = True


@pytest.mark.once
@pytest.mark.parametrize(
    ("attention", "rule"),
    [
        (SPARK, "SparkAttention chooses its keys"),
        (Own, "Own chooses its keys"),
        (WINDOW, "a window of 4 chooses"),
    ],
)
def test_a_selector_for_a_layer_with_a_rule_of_its_own_raises(attention, rule):
    quest = decode.Quest(2, page_size=PAGE)
    model = make(num_layers=2, attention=(nn.Attention, attention))
    for select in ([quest, quest], (None, quest)):
        with pytest.raises(ValueError, match=rf"Quest for blocks\.1, where {rule}"):
            decode.prepare(model, select_keys=select)
    assert decode.prepare(model, select_keys=[quest, None]).select_keys[1] is None
    # one for all is for those that can use it, and there must be some
    model = make(num_layers=2, attention=(attention, nn.Attention))
    assert decode.prepare(model, select_keys=quest).select_keys == (None, quest)
    model = make(attention=attention)
    with pytest.raises(ValueError, match=rf"blocks\.0, where {rule}.*for this model"):
        decode.prepare(model, select_keys=quest)
    assert decode.prepare(model, select_keys=quest, sparse=False).select_keys == (None,)


@pytest.mark.once
@pytest.mark.parametrize("select", [None, decode.Quest(4, page_size=PAGE)])
def test_float16_is_decoded(select):
    """JAX's own attention in float16 has no program for a CPU."""
    model = make(dtype=jnp.float16, param_dtype=jnp.float16)
    tokens = prompts(seq=8)
    ready = decode.prepare(model, select_keys=select)
    run = jax.jit(decode.generate, static_argnames="num_tokens")
    got = run(ready, tokens, num_tokens=3).tokens
    logits = nnx.jit(lambda model, tokens: model(tokens))(
        model, jnp.concatenate([tokens, got], axis=1)
    )
    # what was chosen is the best of the whole forward, up to rounding
    at = logits[:, 7:-1]
    chosen = jnp.take_along_axis(at, got[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, at.max(axis=-1), atol=0.02)


class ByLabels(NamedTuple):
    """A selector that is a tuple: no list of one for each layer."""

    channels: attention.LabelChannels

    def as_ours(self):
        return decode.DoubleSparsity(self.channels, num_kept=4)

    def start(self, *args):
        return self.as_ours().start(*args)

    def append(self, *args):
        return self.as_ours().append(*args)

    def select(self, *args):
        return self.as_ours().select(*args)


def test_a_named_tuple_may_be_a_selector():
    model, tokens = make(), prompts(seq=8)
    own = ByLabels(channels_of(model, tokens, num_channels=2)[0])
    logits = []
    for select in (own, own.as_ours()):
        ready = decode.prepare(model, select_keys=select)
        first, cache = decode.prefill(ready, tokens, jnp.array([8, 6]), num_slots=9)
        logits.append(decode.decode_step(ready, jnp.argmax(first, axis=-1), cache)[0])
    np.testing.assert_array_equal(*logits)


def test_a_selector_that_is_no_pytree_raises():
    with pytest.raises(TypeError, match=r"`select_keys` must be .*leaf of type object"):
        decode.prepare(make(), select_keys=object())


@pytest.mark.once
@pytest.mark.parametrize(
    "method", ["none", "quest", "double sparsity", "snapkv", "ada_snapkv"]
)
def test_a_donated_cache_takes_nothing_else_along(method):
    """The lengths are the caller's, the channels the model's, also without jit."""
    model, tokens, lengths = make(), prompts(seq=8), jnp.array([8, 5])
    channels = channels_of(model, tokens, num_channels=2)
    select = {
        "none": None,
        "quest": decode.Quest(4, page_size=PAGE),
        "double sparsity": [decode.DoubleSparsity(c, num_kept=4) for c in channels],
        "snapkv": decode.SnapKV(6, window=2, pool_size=3, local=2, sink=1),
        "ada_snapkv": decode.AdaSnapKV(6, window=2, pool_size=3, local=2, sink=1),
    }[method]
    ready = decode.prepare(model, select_keys=select)
    step = jax.jit(decode.decode_step, donate_argnums=2)
    found = []
    for _ in range(2):
        logits, cache = decode.prefill(ready, tokens, lengths, num_slots=10)
        logits, cache, _ = step(ready, jnp.argmax(logits, axis=-1), cache)
        found.append(np.asarray(logits))
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(lengths, [8, 5])

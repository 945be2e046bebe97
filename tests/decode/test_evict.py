"""Decoding after an eviction: the prompt's chosen keys and all later ones are read."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import decode
from tests.attention import prompts as of_attention
from tests.attention.snapkv_oracle import ada_oracle, importance_oracle
from tests.decode import by_loops
from tests.decode.by_loops import make, prompts

pytestmark = pytest.mark.usefixtures("compile_fast")

SMALL = dict(num_kept=6, window=5, pool_size=3, local=2, sink=1)
SELECTORS = (decode.SnapKV, decode.AdaSnapKV)
prefill = jax.jit(decode.prefill, static_argnames="num_slots")


def evicted_by_loops(make_selector, length):
    """What a query behind a prompt of `length` reads, for each key head."""
    num_kept, ends = min(6, length), {0, *range(max(0, length - 2), length)}

    def kept(seen):
        own = [x[None, :length] for x in (seen.query, seen.key)]
        if make_selector is decode.SnapKV:
            scores = importance_oracle(
                *own, min(5, length), 3, lambda own: own.mean(axis=0).sum(axis=0)
            )[0]
            of_prompt = [of_attention.highest_oracle(x, num_kept, ends) for x in scores]
        else:
            scores = importance_oracle(
                *own, min(5, length), 3, lambda own: own.max(axis=(0, 1))
            )[0]
            of_prompt = ada_oracle(scores, num_kept, min(3, length), ends)
        return [{*of_head, *range(length, len(seen.key))} for of_head in of_prompt]

    return kept


@pytest.mark.parametrize("make_selector", SELECTORS)
def test_each_step_reads_what_was_kept_and_all_since(make_selector):
    """One prompt has fewer keys than are kept, and fewer queries than are asked."""
    model, tokens, lengths = make(), prompts(batch=3), np.array([20, 11, 3])
    ready = decode.prepare(model, select_keys=make_selector(**SMALL))
    _, cache = prefill(ready, tokens[:, :20], jnp.array(lengths), num_slots=24)
    step = jax.jit(chex.assert_max_traces(decode.decode_step, n=1), donate_argnums=2)
    for i in range(4):
        at = lengths + i
        logits, cache, overflows = step(ready, tokens[np.arange(3), at], cache)
        assert overflows.attention.tolist() == [0]
        for row, length in enumerate(lengths):
            kept = evicted_by_loops(make_selector, length)
            want = by_loops.logits(model, tokens[row, : at[row] + 1], kept)
            np.testing.assert_allclose(logits[row], want, atol=2e-5)
    lists = cache.known[0]
    for row, head in np.ndindex(3, 2):
        num, indices = lists.num[row, head], lists.indices[row, head]
        assert (np.diff(indices[:num]) > 0).all()
        assert (indices[num:] == lengths[row] + 3).all()


@pytest.mark.parametrize("make_selector", SELECTORS)
def test_generated_tokens_are_those_by_hand(make_selector):
    model, tokens, lengths = make(), prompts(seq=20), np.array([20, 9])
    ready = decode.prepare(model, select_keys=make_selector(**SMALL))
    out = decode.generate(ready, tokens, jnp.array(lengths), num_tokens=6)
    for row, length in enumerate(lengths):
        kept = evicted_by_loops(make_selector, length)
        want = by_loops.greedy(model, tokens[row, :length], 6, kept)
        np.testing.assert_array_equal(out.tokens[row], want)
    assert out.overflows.attention.tolist() == [0]


@pytest.mark.once
def test_with_every_key_kept_nothing_changes():
    """By default more are kept than these prompts have; two layers."""
    model, lengths = make(num_layers=2), jnp.array([12, 5])
    out = [
        decode.generate(
            decode.prepare(model, select_keys=select),
            *(prompts(seq=12), lengths),
            num_tokens=6,
        ).tokens
        for select in (None, decode.SnapKV(), [decode.AdaSnapKV(), decode.SnapKV()])
    ]
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(out[0], out[2])


@pytest.mark.once
@pytest.mark.parametrize("make_selector", SELECTORS)
def test_neither_fillers_nor_others_matter(make_selector):
    ready = decode.prepare(make(), select_keys=make_selector(**SMALL))
    tokens, lengths = prompts(), jnp.array([24, 10])
    beyond = jnp.arange(24) >= lengths[:, None]
    knowns = []
    for other in (tokens, jnp.where(beyond, -1, tokens), (tokens + 3).at[1].add(-3)):
        _, cache = prefill(ready, other, lengths, num_slots=26)
        knowns.append(jax.tree.map(lambda x: x[1], cache.known))
    chex.assert_trees_all_equal(*knowns)


@pytest.mark.once
@pytest.mark.parametrize("make_selector", SELECTORS)
def test_tokens_beyond_the_room_of_the_lists_are_counted(make_selector):
    """A shorter prompt is continued by more tokens than lie behind the longest."""
    select = make_selector(**SMALL | dict(num_kept=4))
    ready = decode.prepare(make(), select_keys=select)
    _, cache = prefill(ready, prompts(seq=12), jnp.array([3, 4]), num_slots=13)
    room = cache.known[0].indices.shape[-1]
    step, overflows = jax.jit(decode.decode_step), []
    for _ in range(room - 1):
        _, cache, overflow = step(ready, jnp.array([1, 2]), cache)
        overflows.append(int(overflow.attention[0]))
    # the second prompt has 4 keys in each head, and `room - 4` more fit
    assert overflows == [0] * (room - 4) + [1] * 3
    np.testing.assert_array_equal(cache.known[0].num, room)
    np.testing.assert_array_equal(
        cache.known[0].indices, np.broadcast_to(np.arange(room), (2, 2, room))
    )


@pytest.mark.once
@pytest.mark.parametrize("make_selector", SELECTORS)
def test_bad_settings_raise(make_selector):
    for changed, message in (
        ({"pool_size": 4}, r"`pool_size` must be odd .*got 4"),
        ({"num_kept": 2}, r"`num_kept` must be at least 3, .*got 2"),
        ({"window": 0}, r"`window` must be at least 1, .*got 0"),
    ):
        ready = decode.prepare(make(), select_keys=make_selector(**SMALL | changed))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda ready: decode.prefill(
                    ready, prompts(), jnp.array([24, 3]), num_slots=25
                ),
                ready,
            )

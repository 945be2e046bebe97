"""Decoding by a gate that chooses blocks of the cache for each token."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax import attention, decode, nn
from tests.decode import by_loops
from tests.decode.by_loops import make, prompts

pytestmark = pytest.mark.usefixtures("compile_fast")

BLOCK, GATE = 4, 6
prefill = jax.jit(decode.prefill, static_argnames="num_slots")


def make_gate(seed=0, heads=4, kv_heads=2):
    gate = attention.init_seer_decode_gate(
        heads, kv_heads, 8, d_gate=GATE, key=jax.random.key(seed)
    )
    scale = 3 + jnp.arange(GATE) / GATE  # blocks differ more
    return gate._replace(query_norm=scale, key_norm=scale)


def rotated(x, position):
    half, out = len(x) // 2, np.zeros(len(x))
    for i in range(half):
        angle = position * by_loops.CONFIG.rope_base ** (-i / half)
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def normed(x, scale):
    return x / np.sqrt((x**2).mean() + 1e-6) * scale


def gated_by_loops(gate, choose):
    """Keys of the blocks that `choose` picks from scores, and of the last one."""
    gate = jax.tree.map(lambda w: np.asarray(w, np.float64), gate)

    def kept(seen):
        last, kept = len(seen.key) - 1, []
        for head in range(2):
            group = seen.unrotated_query[last, 2 * head : 2 * head + 2]
            query = sum(q @ w for q, w in zip(group, gate.query[head], strict=True))
            query = rotated(normed(query, gate.query_norm), last)
            scores = np.zeros(last // BLOCK)
            for block in range(last // BLOCK):
                keys = seen.unrotated_key[BLOCK * block : BLOCK * (block + 1), head]
                pools = [keys.max(axis=0), keys.min(axis=0), keys.mean(axis=0)]
                key = normed(np.concatenate(pools) @ gate.key[head], gate.key_norm)
                scores[block] = query @ rotated(key, BLOCK * block) / GATE**0.5
            blocks = {*choose(scores), last // BLOCK}
            kept.append([i for i in range(last + 1) if i // BLOCK in blocks])
        return kept

    return kept


def best(scores, num):
    return np.argsort(-scores, kind="stable")[:num].tolist()


def above(scores, threshold):
    powers = np.exp(scores)
    return np.flatnonzero(powers > threshold * powers.sum()).tolist()


CASES = {
    "num_kept": (dict(num_kept=3), functools.partial(best, num=2)),
    "threshold": (dict(threshold=0.2), functools.partial(above, threshold=0.2)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_step_reads_the_blocks_of_its_query(case):
    options, choose = CASES[case]
    model, tokens, lengths = make(), prompts(batch=3), np.array([18, 12, 3])
    gate = make_gate()
    select = [decode.Seer(gate, block=BLOCK, **options)]
    ready = decode.prepare(model, select_keys=select)
    _, cache = prefill(ready, tokens[:, :18], jnp.array(lengths), num_slots=23)
    step = jax.jit(chex.assert_max_traces(decode.decode_step, n=1), donate_argnums=2)
    kept = gated_by_loops(gate, choose)
    for i in range(5):
        at = lengths + i
        logits, cache, overflows = step(ready, tokens[np.arange(3), at], cache)
        assert overflows.attention.tolist() == [0]
        for row in range(3):
            want = by_loops.logits(model, tokens[row, : at[row] + 1], kept)
            np.testing.assert_allclose(logits[row], want, atol=2e-5)


def test_generated_tokens_are_those_by_hand():
    """In the layer that has a gate for blocks of queries, too."""
    layer = functools.partial(nn.SeerAttention, block=BLOCK)
    model, tokens, lengths = make(attention=layer), prompts(seq=20), (20, 9)
    gate = make_gate()
    select = [decode.Seer(gate, block=BLOCK, num_kept=2)]
    ready = decode.prepare(model, select_keys=select)
    out = decode.generate(ready, tokens, jnp.array(lengths), num_tokens=6)
    kept = gated_by_loops(gate, functools.partial(best, num=1))
    for row, length in enumerate(lengths):
        want = by_loops.greedy(model, tokens[row, :length], 6, kept)
        np.testing.assert_array_equal(out.tokens[row], want)


@pytest.mark.once
@pytest.mark.parametrize("options", [dict(num_kept=99), dict(threshold=-1.0)])
def test_with_every_block_kept_nothing_changes(options):
    model, lengths = make(num_layers=2), jnp.array([12, 5])
    select = [decode.Seer(make_gate(seed), block=BLOCK, **options) for seed in (0, 1)]
    out = [
        decode.generate(
            decode.prepare(model, select_keys=keys),
            *(prompts(seq=12), lengths),
            num_tokens=6,
        ).tokens
        for keys in (None, select)
    ]
    np.testing.assert_array_equal(*out)


def test_neither_fillers_nor_others_matter():
    select = [decode.Seer(make_gate(), block=BLOCK, num_kept=2)]
    ready = decode.prepare(make(), select_keys=select)
    tokens, lengths = prompts(), jnp.array([24, 10])
    beyond = jnp.arange(24) >= lengths[:, None]
    knowns = []
    for other in (tokens, jnp.where(beyond, -1, tokens), (tokens + 3).at[1].add(-3)):
        _, cache = prefill(ready, other, lengths, num_slots=26)
        knowns.append(jax.tree.map(lambda x: x[1], cache.known))
    chex.assert_trees_all_equal(*knowns)


def test_another_gate_needs_no_new_trace():
    model, tokens, lengths = make(), prompts(), jnp.array([24, 10])
    run = chex.assert_max_traces(decode.prefill, n=1)
    run = jax.jit(run, static_argnames="num_slots")
    knowns = []
    for seed in range(2):
        select = [decode.Seer(make_gate(seed), block=BLOCK, num_kept=2)]
        ready = decode.prepare(model, select_keys=select)
        _, cache = run(ready, tokens, lengths, num_slots=26)
        knowns.append(np.asarray(cache.known[0].gated_keys))
    assert np.abs(knowns[0] - knowns[1]).max() > 0


@pytest.mark.once
def test_bad_settings_raise():
    tokens, lengths = prompts(), jnp.array([24, 10])

    def run(ready):
        _, cache = decode.prefill(ready, tokens, lengths, num_slots=26)
        return decode.decode_step(ready, tokens[:, 0], cache)

    both = r"one of .* must be set; got num_kept={} and threshold={}"
    for gate, options, message in (
        (make_gate(), {}, both.format("None", "None")),
        (make_gate(), dict(num_kept=2, threshold=0.5), both.format("2", "0.5")),
        (make_gate(), dict(num_kept=0), r"`num_kept` must be in \[1, 7\].*got 0"),
        (make_gate(), dict(num_kept=2, block=27), r"`block` must .*\[1, 26\].*got 27"),
        (
            make_gate(0, 4, 4),
            dict(num_kept=2),
            r"slots, 4, 8\], by `gate`; got .*model",
        ),
        (make_gate(0, 8), dict(num_kept=2), r"`gate.query` must .*of another model"),
    ):
        select = [decode.Seer(gate, **dict(block=BLOCK) | options)]
        ready = decode.prepare(make(), select_keys=select)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(run, ready)


def test_a_gate_in_a_module_is_given_by_its_value():
    variable = nn.GateParam(make_gate())
    assert isinstance(variable, nnx.Variable)
    select = decode.Seer(variable.get_value(), block=BLOCK, num_kept=2)
    assert decode.prepare(make(), select_keys=select).select_keys == (select,)

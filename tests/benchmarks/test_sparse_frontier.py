"""The long-context tasks have the answers that they claim; selectors keep budgets."""

import collections
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import sparse_frontier
from benchmarks.parts import long_context_model, sparse_selectors, sparse_walks
from benchmarks.parts import long_context_tasks as tasks
from sparsejax import attention, nn
from sparsejax.formats import BlockMask, KeyLists

pytestmark = pytest.mark.once
LENGTHS = (64, 200, 512)


def read(row):
    """What a reader finds: the context's pairs and words, names asked, answers told."""
    row = row.tolist()
    start = row.index(tasks.ASK)
    context, rest = row[:start], row[start:]
    tell = rest.index(tasks.TELL)
    asked = [rest[i + 1] for i in range(tell) if rest[i] == tasks.ASK]
    meanings = [
        (first, second)
        for first, second in itertools.pairwise(context)
        if first in tasks.NAMES and (second in tasks.NAMES or second in tasks.VALUES)
    ]
    counts = collections.Counter(t for t in context if t in tasks.WORDS)
    told = []
    for token in rest[tell:]:
        told.append([]) if token == tasks.TELL else told[-1].append(token)
    return meanings, counts, asked, told


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", tasks.TASKS)
def test_answers_are_those_that_a_reader_finds(task, length):
    tokens = tasks.draw(task, length, 8, (3,))
    assert tokens.shape == (8, length) and tokens.dtype == np.int32
    assert tokens.min() >= 0 and tokens.max() < tasks.VOCAB_SIZE
    for row in tokens:
        meanings, counts, asked, told = read(row)
        assert len(dict(meanings)) == len(meanings)  # a name means one thing
        for name, (given, *answer) in zip(asked, told, strict=True):
            assert given == name
            if task == "words":
                (best, most), (_, second) = counts.most_common(2)
                assert answer == [best] and most >= 3 * second
                continue
            path = [name]
            while path[-1] in tasks.NAMES:
                path.append(dict(meanings)[path[-1]])
            assert answer == path[1:]
            assert len(answer) == (tasks.HOPS if task == "hops" else 1)


@pytest.mark.parametrize(
    "length, pairs, chains", [(64, 4, 1), (256, 8, 2), (2048, 16, 4), (8192, 24, 6)]
)
def test_longer_sequences_ask_for_one_of_more(length, pairs, chains):
    meanings, *_ = read(tasks.draw("multi", length, 1, (0,))[0])
    assert len(meanings) == pairs
    meanings, *_ = read(tasks.draw("hops", length, 1, (0,))[0])
    assert len(meanings) == tasks.HOPS * chains


def test_a_seed_gives_the_same_sequences_and_another_does_not():
    for task in tasks.TASKS:
        first = tasks.draw(task, 64, 4, (0, 1))
        np.testing.assert_array_equal(first, tasks.draw(task, 64, 4, (0, 1)))
        assert (first != tasks.draw(task, 64, 4, (0, 2))).any()


def test_a_sequence_too_short_is_refused():
    with pytest.raises(ValueError, match="at least 64; got 63"):
        tasks.draw("single", 63, 1, (0,))


@pytest.mark.parametrize("task, answers", [("multi", 4), ("hops", 1)])
def test_an_answer_is_right_if_all_its_tokens_are(task, answers):
    tokens = tasks.draw(task, 64, 2, (0,))
    assert tasks.accuracy(task, tokens, tokens) == 1
    wrong = tokens.copy()
    wrong[0, -1] += 1
    assert tasks.accuracy(task, tokens, wrong) == 1 - 1 / (2 * answers)
    given = tokens.copy()
    given[:, -tasks.ANSWER :][:, tasks.TASKS[task].judged == 0] += 1
    assert tasks.accuracy(task, tokens, given) == 1


@pytest.mark.parametrize("length, block", [(512, 16), (8192, 64)])
def test_selectors_accept_every_density(length, block):
    # traced only: budgets and shapes are checked before anything is computed
    def shape(*sizes) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    blocks = length // block
    seen = sparse_selectors.Seen(
        shape(1, length, 4, 8), shape(1, length, 2, 8), shape(1, 4, blocks, blocks)
    )
    cached = (
        shape(1, 32, 4, 8),
        shape(1, 1, 4, 8),
        shape(1, length, 2, 8),
        shape(1, 2, 1, blocks),
    )

    def of_prefill(select, density) -> Any:
        return jax.eval_shape(lambda seen: select(seen, density), seen)

    def of_decode(select, density) -> Any:
        def choose(asked, query, key, gate):
            prompt = length - tasks.ANSWER
            channels = attention.select_channels(jnp.ones((2, 2, 8)), num_channels=2)
            now = sparse_selectors.Cached(
                asked, query, key, prompt, jnp.int32(length), channels, gate
            )
            return select(now, density)

        return jax.eval_shape(choose, *cached)

    for density in (max(sparse_frontier.DENSITIES), min(sparse_frontier.DENSITIES)):
        for name, select in sparse_selectors.PREFILL.items():
            found = of_prefill(select, density)
            if name == "psa":
                assert found.shape == (1, 4, blocks, blocks)
            else:
                assert isinstance(found, BlockMask), name
                assert found.block_shape == (block, block)
        for name, select in sparse_selectors.DECODE.items():
            assert isinstance(of_decode(select, density), KeyLists), name


def test_budgets_come_nearest_to_a_density_from_below():
    length, blocks = 128, 16
    query = jnp.zeros((1, length, 1, 1))
    seen = sparse_selectors.Seen(query, query, jnp.zeros((1, 1, blocks, blocks)))
    causal = np.tri(length, dtype=bool)

    def realised(count):
        kept = np.tri(blocks, dtype=bool) & ~np.tri(blocks, k=-count, dtype=bool)
        return (np.kron(kept, np.ones((8, 8), bool)) & causal).sum() / causal.sum()

    for density in (0.1, 0.25, 0.5):
        count = seen.count(density)
        assert realised(count) <= density < realised(count + 1)
    assert seen.count(1) == blocks
    assert seen.count(0.01) == 1 and seen.count(0.01, least=3) == 3


@pytest.mark.usefixtures("compile_fast")
def test_the_local_layer_attends_as_a_window_does():
    local, plain = (
        layer(16, 4, num_kv_heads=2, window=3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        for layer in (long_context_model.Local, nn.Attention)
    )
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    run = nnx.jit(lambda layer: layer(x, jnp.arange(8)[None]))
    np.testing.assert_allclose(run(local), run(plain), atol=0.02)


@pytest.mark.parametrize("length, rows", [(64, 3 * 9), (1024, 9), (2048, 4)])
def test_batches_of_long_sequences_have_fewer(length, rows):
    tokens, counted = long_context_model.batch(length, 0, 2303, practice=False)
    assert tokens.shape == counted.shape == (rows, length)
    np.testing.assert_allclose(counted.sum(), 1, rtol=1e-5)


def test_stages_take_all_steps_on_lengths_that_hold_a_block():
    recipe = long_context_model.Recipe(1024, 1000, 100, block=128)
    *of_model, of_gates = long_context_model.stages(recipe)
    assert [stage.length for stage in of_model] == [128, 256, 512, 1024]
    assert of_gates == (1024, 0, 100, True)
    at = 0
    for stage in of_model:
        assert stage.first == at
        at += stage.steps
    assert at == 1000 and of_model[0].steps > 500


@pytest.mark.usefixtures("compile_fast")
def test_training_that_was_cut_off_goes_on_from_the_last_stage(tmp_path, monkeypatch):
    recipe = long_context_model.Recipe(64, 2, 2, d_model=16, tokens=64)

    path = tmp_path / "weights.safetensors"

    def trained():
        model = long_context_model.make_model(recipe)
        long_context_model.train(recipe, model, path)
        states = nnx.state(model, nn.GateParam), nnx.state(model, nnx.Not(nn.GateParam))
        return map(jax.tree.leaves, states)

    first_stage = long_context_model.stages(recipe)[:1]
    with monkeypatch.context() as patch:
        patch.setattr(long_context_model, "stages", lambda _: first_stage)
        idle, of_first = trained()
    of_gates, of_model = trained()
    for got, want in zip(of_model, of_first, strict=True):
        np.testing.assert_array_equal(got, want)  # read from the file, then frozen
    assert all((new != old).any() for new, old in zip(of_gates, idle, strict=True))
    other = dataclasses.replace(recipe, steps=3)
    with pytest.raises(ValueError, match=r'of the recipe.*"steps": 3.*"steps": 2'):
        long_context_model.train(other, long_context_model.make_model(other), path)


@pytest.mark.usefixtures("compile_fast")
def test_recalled_mass_of_listed_keys_is_the_weight_on_them():
    query = jnp.zeros((1, 1, 4, 8))  # attends evenly to the 6 keys that are there
    key = jax.random.normal(jax.random.key(0), (1, 8, 2, 8))
    kept = jnp.array([[[True, False, True, False, False, False, True, True]]])
    measure = jax.jit(sparse_walks.listed_mass)
    for heads in (2, 4):
        lists = KeyLists.from_mask(jnp.broadcast_to(kept, (1, heads, 8)))
        mass = measure(query, key, lists, 6)
        np.testing.assert_allclose(mass, 2 / 6, rtol=1e-6)


@pytest.mark.usefixtures("compile_fast")
def test_all_keys_give_what_the_model_gives():
    recipe = long_context_model.Recipe(64, 0, 0, d_model=16)
    model = long_context_model.make_model(recipe)
    tokens = jnp.asarray(tasks.draw("multi", 64, 2, (0,)))
    graph, state = nnx.split(model)

    @jax.jit
    def every(state, tokens):
        model = nnx.merge(graph, state)
        blocks = sparse_walks.prefill(
            model, tokens, sparse_selectors.topk_blocks, density=1.0
        )
        channels = sparse_walks.calibrate(model, tokens)
        listed = [
            sparse_walks.decode(model, tokens, select, 1.0, channels)
            for name, select in sparse_selectors.DECODE.items()
            if name in ("quest", "double_sparsity", "seer")
        ]
        return model(tokens).argmax(-1), blocks, listed

    wanted, blocks, listed = every(state, tokens)
    wanted = wanted[:, -tasks.ANSWER - 1 : -1]
    np.testing.assert_array_equal(blocks[0], wanted)
    for predicted, *_ in listed:
        np.testing.assert_array_equal(predicted[:, 1:], wanted[:, 1:])
    for _, density, mass in (blocks, *listed):
        np.testing.assert_allclose([density, mass], 1, rtol=1e-5)

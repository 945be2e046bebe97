"""SparseD against loops over blocks, and a sampler whose masks are built once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import sparsejax as sj
from sparsejax import attention, ops
from tests.attention import prompts

STATIC = ("num_generated", "density", "block_shape", "isolated")
sparsed = jax.jit(attention.sparsed, static_argnames=STATIC)


def softmax_over(scores, columns):
    """Over some columns; 0 elsewhere."""
    weights = np.zeros_like(scores)
    powers = np.exp(scores[:, columns] - scores[:, columns].max(axis=1, keepdims=True))
    weights[:, columns] = powers / powers.sum(axis=1, keepdims=True)
    return weights


def oracle(query, key, num_generated, density, block_shape, isolated, valid=None):
    """One head's blocks, cell by cell, from the released code; isolated is ours."""
    (height, width), seq = block_shape, len(key)
    valid = np.ones(seq, bool) if valid is None else np.asarray(valid)
    scores = query @ key.T / np.sqrt(key.shape[1])
    rows, columns = math.ceil(seq / height), math.ceil(seq / width)
    starts = [j for j in range(columns) if j * width >= seq - num_generated]
    last = starts[0] if starts else columns - 1
    generated = np.arange(seq) >= last * width

    def importance(weights, i, j):
        of_queries = [t for t in range(seq) if t // height == i and valid[t]]
        of_keys = [t for t in range(seq) if t // width == j and valid[t]]
        if not of_keys:
            return -np.inf
        cell = weights[np.ix_(of_queries, of_keys)]
        size = len(of_keys) if isolated else width
        return cell.sum() / size / height

    def best(scores, k):
        kept = prompts.highest_oracle(scores, min(k, len(scores)))
        return {j for j in kept if scores[j] > -np.inf}

    of_all = softmax_over(scores, valid)
    of_generated = softmax_over(scores, valid & generated)
    kept = np.zeros((rows, columns), bool)
    for i in range(rows):
        first = [importance(of_all, i, j) for j in range(columns)]
        second = [importance(of_generated, i, j) for j in range(last, columns)]
        if isolated:
            chosen = best(first[:last], math.ceil(round(density * last, 6)))
        else:
            chosen = best(first, int(columns * density) + 1)
            chosen = {j for j in chosen if j < last}
        added = best(second, int((columns - last) * density) + 1)
        kept[i, sorted(chosen | {last + j for j in added})] = True
    return kept


class SparseDTest(parameterized.TestCase):
    @parameterized.product(
        [
            dict(length=64, num_generated=16, block_shape=(8, 8), density=0.3),
            dict(length=61, num_generated=23, block_shape=(8, 4), density=0.25),
            dict(length=46, num_generated=1, block_shape=(8, 8), density=0.5),
            dict(length=30, num_generated=30, block_shape=(8, 8), density=1.0),
        ],
        isolated=[True, False],
    )
    def test_equals_the_oracle(self, length, **options):
        """Ragged ends, a boundary inside a block, nothing but generation, all kept."""
        select = functools.partial(attention.sparsed, **options)

        @jax.jit
        def run(query, key):
            mask, again = select(query, key), jax.vmap(select)(query[None], key[None])
            return mask, mask.to_blocks(), again

        x = prompts.prompt(length)
        mask, blocks, again = run(*(3 * a for a in x))
        query, key = (3 * np.asarray(a, np.float64) for a in x)
        for b, h in np.ndindex(2, prompts.HEADS):
            own = query[b, :, h], key[b, :, h // prompts.GROUP]
            np.testing.assert_array_equal(blocks[b, h], oracle(*own, **options))
        if options["density"] == 1:
            self.assertTrue(blocks.all())
        prompts.assert_same_under_vmap(mask, again)

    def test_the_scale_is_not_by_the_number_of_heads(self):
        """As one of the released models has it: 2 in place of the root of 8."""
        options = dict(num_generated=16, density=0.3, block_shape=(8, 8))
        options["isolated"] = True
        x = [3 * a for a in prompts.prompt(64)]
        got = prompts.blocks_of(sparsed(*x, **options))[0]
        query, key = (np.asarray(a[0], np.float64) for a in x)
        want, scaled = (
            [
                oracle(scale * query[:, h], key[:, h // 2], **options)
                for h in range(prompts.HEADS)
            ]
            for scale in (1, 2**0.5)
        )
        np.testing.assert_array_equal(got, want)
        self.assertTrue(np.any(np.not_equal(got, scaled)))

    @parameterized.parameters(True, False)
    @pytest.mark.once
    def test_padding_has_no_weight_and_no_say(self, isolated):
        options = dict(num_generated=13, density=0.3, block_shape=(8, 4))
        options["isolated"] = isolated
        x = prompts.prompt(45)
        at = jnp.arange(45)
        valid = jnp.stack([at >= 11, (at > 2) & (at < 42)])  # whole blocks, parts
        padded = [jnp.where(valid[..., None, None], a, 9.0) for a in x]
        blocks = prompts.blocks_of(sparsed(*padded, valid=valid, **options))
        query, key = (np.asarray(a, np.float64) for a in x)
        for b, h in np.ndindex(2, prompts.HEADS):
            own = query[b, :, h], key[b, :, h // prompts.GROUP]
            want = oracle(*own, **options, valid=valid[b])
            asks = np.add.reduceat(np.asarray(valid[b], int), np.arange(0, 45, 8)) > 0
            np.testing.assert_array_equal(blocks[b, h][asks], want[asks])
        self.assertFalse(blocks[0, :, :, :2].any())

    @pytest.mark.once
    def test_isolation(self):
        """Generated keys that take all weight leave the prompt its blocks, if isolated.

        The released code discards what the generation takes, and puts nothing there.
        """
        query, key = prompts.prompt(64)
        query = jnp.abs(query)
        key = key.at[:, 48:].set(4.0)
        options = dict(num_generated=16, density=0.3, block_shape=(8, 8))
        counts = {}
        for isolated in (True, False):
            blocks = prompts.blocks_of(
                sparsed(query, key, isolated=isolated, **options)
            )
            counts[isolated] = np.asarray(blocks[..., :6].sum(axis=-1))
            np.testing.assert_array_equal(blocks[..., 6:].sum(axis=-1), 1)
        np.testing.assert_array_equal(counts[True], 2)  # ceil(0.3 * 6)
        np.testing.assert_array_equal(counts[False], 1)  # 3, of which 2 fell outside


class DenoiseTest(parameterized.TestCase):
    @parameterized.parameters(
        (128, 0.2, 27), (10, 0.2, 4), (10, 0.0, 2), (10, 1.0, 10), (1, 0.0, 1)
    )
    def test_dense_steps(self, num_steps, skip, want):
        """int(num_steps * skip) + 2 of them, as released: 27 of 128, not 25."""
        self.assertEqual(attention.sparsed_dense_steps(num_steps, skip=skip), want)
        got = attention.sparsed_denoise(
            lambda step, log: log.at[step].set(0),
            lambda step, log: (log.at[step].set(1), step),
            lambda step, log, built: log.at[step].set(2 + built),
            jnp.full(num_steps, -1),
            num_steps=num_steps,
            skip=skip,
        )
        built = [] if want == num_steps else [1]
        steps = [0] * (want - len(built)) + built
        steps += [2 + want - 1] * (num_steps - want)  # built once, in that step
        np.testing.assert_array_equal(got, steps)

    def test_nothing_dense_is_compiled_into_the_sparse_loop(self):
        traced = jax.make_jaxpr(
            lambda x: attention.sparsed_denoise(
                lambda step, x: jnp.sin(x),
                lambda step, x: (jnp.sin(x), x),
                lambda step, x, built: jnp.cos(x) + built,
                x,
                num_steps=10,
            )
        )(1.0)
        loops = [str(e) for e in traced.eqns if e.primitive.name in ("scan", "while")]
        self.assertEqual(["sin" in loop for loop in loops], [True, False])
        self.assertEqual(["cos" in loop for loop in loops], [False, True])

    @parameterized.parameters(dict(skip=1.0), dict(density=1.0), dict(density=0.3))
    def test_a_sampler(self, skip=0.2, density=0.4):
        """Equal to a dense one where all blocks are kept or no step is sparse.

        Else equal to a loop in which the masks of step 3 serve from step 4 on.
        """
        query, key = (a[:1] for a in prompts.prompt(30))

        def attend(x, mask):
            # queries and keys change with the state, so masks would too
            q, k = query + x, key + x[:, :, :2]
            return jnp.tanh(x + ops.block_attention(q, k, k, mask)), (q, k)

        def build(step, x):
            y, (q, k) = attend(x, None)
            options = dict(num_generated=14, density=density, block_shape=(8, 8))
            return y, attention.sparsed(q, k, **options)

        @jax.jit
        def run(x):
            return attention.sparsed_denoise(
                lambda step, x: attend(x, None)[0],
                build,
                lambda step, x, mask: attend(x, mask)[0],
                x,
                num_steps=10,
                skip=skip,
            )

        step = jax.jit(lambda x, mask: attend(x, mask)[0])
        every = sj.BlockMask.from_blocks(jnp.ones((1, 4, 4, 4), bool), (8, 8))
        start = jnp.zeros_like(query)
        want, all_dense, mask = start, start, every
        for i in range(10):
            all_dense = step(all_dense, every)
            before, want = want, step(want, mask)
            if i == 3 and skip < 1:
                mask = jax.jit(build)(i, before)[1]
        got = run(start)
        np.testing.assert_allclose(got, want, atol=1e-5)
        differs = np.abs(all_dense - got).max() > 1e-3
        self.assertEqual(differs, density == 0.3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_generated": 0}, r"`num_generated` must be in \[1, 24\], .*; got 0"),
        ({"num_generated": 25}, r"`num_generated` must be in \[1, 24\], .*; got 25"),
        ({"density": 0.0}, r"`density` must be in \(0, 1\]; got 0.0"),
        ({"density": 1.5}, r"`density` must be in \(0, 1\]; got 1.5"),
        ({"isolated": "repo"}, "`isolated` must be a bool; got 'repo'"),
        ({"block_shape": (0, 8)}, r"`block_shape` must be positive; got \(0, 8\)"),
        ({"block_shape": (8, 25)}, r"`block_shape` must fit into the 24 .*\(8, 25\)"),
        ({"valid": np.ones((2, 23), bool)}, r"`valid` must be bool \(2, 24\).*got"),
        ({"valid": np.ones((2, 24))}, r"`valid` must be bool \(2, 24\).*got float"),
        ({"seq": 20}, "of the same tokens; got 20 queries and 24 keys"),
        ({"heads": 3}, r"key heads must divide .*got \(2, 24, 3, 8\)"),
    ],
)
def test_bad_settings_raise(changed, message):
    query, key = prompts.prompt(24)
    options = dict(num_generated=8, block_shape=(8, 8), seq=24, heads=4) | changed
    query = query[:, : options.pop("seq"), : options.pop("heads")]
    with pytest.raises((TypeError, ValueError), match=message):
        attention.sparsed(query, key, **options)


@pytest.mark.parametrize(
    ("num_steps", "skip", "message"),
    [
        (0, 0.2, "`num_steps` must be at least 1; got 0"),
        (4, -0.1, r"`skip` must be in \[0, 1\]; got -0.1"),
        (4, 1.1, r"`skip` must be in \[0, 1\]; got 1.1"),
    ],
)
def test_bad_steps_raise(num_steps, skip, message):
    with pytest.raises(ValueError, match=message):
        attention.sparsed_dense_steps(num_steps, skip=skip)

"""Vertical-slash against loops over pairs of query and key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import sparsejax as sj
from sparsejax import attention, ops
from sparsejax.attention import _window
from tests.attention import prompts

SMALL = dict(num_vertical=4, num_slash=4, window=9, sink=2, local=3, block_shape=(4, 4))
vertical_slash = jax.jit(attention.vertical_slash, static_argnames=(*SMALL, "per_head"))


class VerticalSlashTest(parameterized.TestCase):
    @parameterized.parameters(((2, 2), True), ((3, 2), True), ((2, 4), False))
    def test_equals_the_oracle(self, block_shape, per_head):
        length, options = 49, SMALL | dict(block_shape=block_shape, per_head=per_head)
        select = functools.partial(attention.vertical_slash, **options)

        @jax.jit
        def run(query, key):
            mask = select(query, key)
            density = attention.pair_density(mask, length)
            again = jax.vmap(select)(query[None], key[None])
            return mask, mask.to_blocks(), density, again

        x = prompts.prompt(length)
        mask, blocks, density, again = run(*x)
        weights = prompts.weights_oracle(*x, options["window"])
        if not per_head:
            shape = (2, prompts.KV_HEADS, prompts.GROUP, *weights.shape[2:])
            weights = weights.reshape(shape).mean(axis=2)
        self.assertEqual(blocks.shape[:2], weights.shape[:2])
        for at in np.ndindex(weights.shape[:2]):
            vertical, slash = prompts.line_sums_oracle(weights[at])
            columns = prompts.highest_oracle(vertical, 4, range(2))
            offsets = prompts.highest_oracle(slash, 4, range(3))
            want = prompts.lines_oracle(columns, offsets, length, block_shape)
            np.testing.assert_array_equal(blocks[at], want)
            want = prompts.pair_density_oracle(want, length, block_shape)
            np.testing.assert_allclose(density[at], want, rtol=1e-5)
        self.assertLess(density.max(), 0.7)
        self.assertFalse(mask.overflowed.any())
        prompts.assert_same_under_vmap(mask, again)

    @parameterized.parameters(0, 1, 11, 19)
    def test_a_diagonal_is_found_at_its_distance(self, distance):
        """Not at its mirror image, and not among the distances to later keys."""
        window, length = 5, 20
        weights = np.zeros((window, length))
        for i in range(window):
            at = length - window + i - distance
            if at >= 0:
                weights[i, at] = 1
        sums = _window.diagonal_sums(jnp.asarray(weights))
        want = np.zeros(length)
        want[distance] = weights.sum()
        np.testing.assert_array_equal(sums, want)

    @parameterized.parameters(((4, 4), True), ((8, 4), False), ((4, 8), True))
    @pytest.mark.once
    def test_filler_has_no_part(self, block_shape, per_head):
        options = SMALL | dict(block_shape=block_shape, per_head=per_head)
        select = functools.partial(vertical_slash, **options)
        prompts.assert_filler_has_no_part(select, (18, 30, 33), 33)

    def test_a_prompt_shorter_than_the_window(self):
        """All of its queries are asked: as by a window of its length."""
        x = prompts.prompt(16)
        mask = vertical_slash(*x, **SMALL, lengths=5)
        alone = [a[:, :5] for a in x]
        want = vertical_slash(*alone, **SMALL | dict(window=5))
        got = prompts.blocks_of(mask)[:, :, :2, :2]
        np.testing.assert_array_equal(got, prompts.blocks_of(want))

    @pytest.mark.once
    def test_full_budgets_are_dense_attention(self):
        query, key = prompts.prompt(24)
        mask = vertical_slash(query, key, **SMALL | dict(num_vertical=24, num_slash=24))
        np.testing.assert_allclose(attention.pair_density(mask, 24), 1, rtol=1e-6)
        attend = jax.jit(functools.partial(ops.block_attention, causal=True))
        got, want = attend(query, key, key, mask), attend(query, key, key)
        np.testing.assert_allclose(got, want, atol=1e-6)

    def test_what_is_always_kept_counts_in_the_budget(self):
        """Of budgets as small as that, nothing else is kept."""
        x = prompts.prompt(32)
        options = SMALL | dict(num_vertical=2, num_slash=3)
        mask = vertical_slash(*x, **options)
        want = prompts.lines_oracle({0, 1}, {0, 1, 2}, 32, (4, 4))
        blocks = prompts.blocks_of(mask)
        np.testing.assert_array_equal(blocks, np.broadcast_to(want, blocks.shape))

    def test_only_the_last_queries_are_asked(self):
        """The limit of the method: a question in the middle finds nothing."""
        query, key = np.zeros((2, 1, 32, 1, 8), np.float32)
        key[0, 9, 0, 0] = query[0, 30, 0, 0] = 30  # asked by a late query,
        key[0, 13, 0, 1] = query[0, 17, 0, 1] = 30  # and by one before the window
        mask = vertical_slash(
            jnp.asarray(query), jnp.asarray(key), **SMALL | dict(num_vertical=3)
        )
        kept = prompts.blocks_of(mask)[0, 0]
        self.assertTrue(kept[2:, 9 // 4].all())
        self.assertFalse(kept[6:, 13 // 4].all())

    def test_a_nan_is_kept_last_and_no_gradient_passes(self):
        query, key = prompts.prompt(32)
        query = query.at[0, -1].set(jnp.nan)
        mask = vertical_slash(query, key, **SMALL)
        diagonal = np.eye(8, dtype=bool)
        self.assertTrue((prompts.blocks_of(mask) | ~diagonal).all())
        tied = prompts.lines_oracle(range(4), range(4), 32, (4, 4))
        np.testing.assert_array_equal(prompts.blocks_of(mask)[0, 0], tied)

        def loss(key):
            mask = attention.vertical_slash(query, key, **SMALL)
            return mask.density().sum() + 0 * key.sum()

        self.assertFalse(jax.jit(jax.grad(loss))(key).any())


class PairDensityTest(parameterized.TestCase):
    @parameterized.parameters((4, 3), (2, 5))
    def test_equals_a_count(self, *block_shape):
        """Of the causal pairs, not of all; a full mask has 1, not about 2."""
        length = 14
        shape = tuple(-(-length // side) for side in block_shape)
        kept = np.random.default_rng(0).random((2, 3, *shape)) < 0.5
        kept[0, 0] = True
        mask = sj.BlockMask.from_blocks(jnp.asarray(kept), block_shape)
        got = jax.jit(attention.pair_density, static_argnums=1)(mask, length)
        for at in np.ndindex(2, 3):
            want = prompts.pair_density_oracle(kept[at], length, block_shape)
            np.testing.assert_allclose(got[at], want, rtol=1e-5)

    @parameterized.parameters(attention.pair_density, attention.causal_density)
    def test_masks_that_do_not_fit_raise(self, density):
        kept = jnp.ones((3, 2, 2), bool)
        with self.assertRaisesRegex(ValueError, r"keys\], .*; got shape \(3, 8, 8\)"):
            density(sj.BlockMask.from_blocks(kept, (4, 4)), 8)
        with self.assertRaisesRegex(ValueError, r"8, 8\) and num_queries=9"):
            density(sj.BlockMask.from_blocks(kept[None], (4, 4)), 9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"num_vertical": 33},
            "`num_vertical` must be at most the 32 keys .*got 33. L",
        ),
        ({"num_vertical": 1}, "`num_vertical` must be at least 2, .*got 1. Raise it"),
        ({"num_slash": 33}, "`num_slash` must be at most the 32 distances .*; got 33"),
        ({"num_slash": 2}, "`num_slash` must be at least 3, .*; got 2"),
        ({"window": 33}, "`window` must be at most the 32 queries .*; got 33"),
        ({"local": 0}, "`local` must be at least 1, what is always kept; got 0"),
        ({"sink": 40}, "`sink` must be at most the 32 keys .*; got 40"),
        ({"block_shape": (64, 4)}, r"`block_shape` must fit .* 32 .*got \(64, 4\). Ch"),
        ({"block_shape": (0, 4)}, r"`block_shape` must be positive; got \(0, 4\)"),
        ({"heads": 3}, r"key heads must divide .*got \(2, 32, 3, 8\)"),
        ({"queries": 31}, "of the same tokens; got 31 queries and 32 keys"),
        ({"causal": False}, "`causal` must be True; got False. Take `topk_blocks`"),
    ],
)
def test_bad_settings_raise(changed, message):
    query, key = prompts.prompt(32)
    options = SMALL | changed
    query = query[:, : options.pop("queries", 32), : options.pop("heads", 4)]
    with pytest.raises(ValueError, match=message):
        attention.vertical_slash(query, key, **options)

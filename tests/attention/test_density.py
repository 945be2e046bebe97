"""Densities of masks, and how many blocks keep a share, against counting."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import sparsejax as sj
from sparsejax import attention


class CausalDensityTest(parameterized.TestCase):
    @parameterized.parameters((4, 4), (4, 3), (2, 5))
    def test_equals_a_count(self, *block_shape):
        length = 14
        rows, columns = (-(-length // side) for side in block_shape)
        kept = np.random.default_rng(0).random((2, 2, rows, columns)) < 0.5
        mask = sj.BlockMask.from_blocks(jnp.asarray(kept), block_shape)
        got = jax.jit(attention.causal_density, static_argnums=1)(mask, length)
        want = np.zeros((2, length))
        for b, h, i in np.ndindex(2, 2, length):
            own = kept[b, h, i // block_shape[0]]
            want[b, i] += sum(own[j // block_shape[1]] for j in range(i + 1)) / (i + 1)
        np.testing.assert_allclose(got, want / 2, rtol=1e-5)


class BlocksForDensityTest(parameterized.TestCase):
    @parameterized.product(num_blocks=[1, 7, 40], density=[0.01, 0.3, 0.51, 1.0])
    def test_is_the_most_within_the_density(self, num_blocks, density):
        def share(num_kept):
            rows = [min(i + 1, num_kept) for i in range(num_blocks)]
            return sum(rows) / (num_blocks * (num_blocks + 1) / 2)

        got = attention.blocks_for_density(density, num_blocks)
        within = [t for t in range(1, num_blocks + 1) if share(t) <= density]
        self.assertEqual(got, max(within, default=1))

    def test_is_what_a_mask_keeps(self):
        num_kept = attention.blocks_for_density(0.5, 16)
        scores = jax.random.normal(jax.random.key(0), (1, 1, 16, 16))
        mask = attention.seer_topk(
            jnp.where(np.tri(16, dtype=bool), scores, -jnp.inf),
            num_kept=num_kept,
            block=4,
            dense_last_rows=0,
        )
        kept = int(mask.num.sum())
        self.assertEqual(
            kept, num_kept * (num_kept + 1) // 2 + (16 - num_kept) * num_kept
        )
        self.assertLessEqual(kept / 136, 0.5)

    @parameterized.product(num_blocks=[64, 512], density=[0.1, 0.25, 0.5, 0.9, 1.0])
    def test_the_card_of_seer_attention(self, num_blocks, density):
        """Its `(1 - sqrt(1 - density)) n` counts areas: as much, or one block less."""
        got = attention.blocks_for_density(density, num_blocks)
        of_areas = int((1 - np.sqrt(1 - density)) * num_blocks)
        self.assertIn(got - of_areas, (0, 1))

    @parameterized.parameters((0.0, 4), (1.5, 4), (0.5, 0))
    def test_bad_arguments_raise(self, density, num_blocks):
        message = (
            f"`density` must be .*; got density={density} and num_blocks={num_blocks}"
        )
        with self.assertRaisesRegex(ValueError, message):
            attention.blocks_for_density(density, num_blocks)

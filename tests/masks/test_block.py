"""block_mask: whole blocks, counted exactly."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sparsejax import masks
from tests.masks import oracle


def block_oracle(scores, shape, num_kept):
    scores = np.asarray(scores, np.float32)
    tiles = oracle.units(scores.shape, ("block", shape))
    sums = [scores[tile].sum(dtype=np.float64) for tile in tiles]
    mask = np.zeros(scores.shape, bool)
    for i in oracle.best_first(sums)[:num_kept]:
        mask[tiles[i]] = True
    return mask


class BlockMaskTest(parameterized.TestCase):
    @parameterized.parameters(
        ((8, 12), (2, 4)),
        ((8, 12), (8, 12)),
        ((8, 12), (1, 1)),
        ((8, 12), (4,)),
        ((3, 4, 6), (2, 3)),
        ((4, 2, 6, 2, 2), (2, 1, 3, 2, 1)),
        ((0, 4), (2, 2)),
    )
    def test_matches_oracle(self, shape, block):
        # integers: sums are exact in any order, and there are ties
        scores = np.random.default_rng(0).integers(0, 3, shape).astype(np.float32)
        fn = jax.jit(
            chex.assert_max_traces(lambda s, k: masks.block_mask(s, block, k), n=1)
        )
        num_blocks = len(oracle.units(shape, ("block", block)))
        for num_kept in {0, num_blocks // 3, num_blocks}:
            got = np.asarray(fn(scores, num_kept))
            np.testing.assert_array_equal(got, block_oracle(scores, block, num_kept))

    @parameterized.product(dtype=[jnp.float32, jnp.bfloat16, jnp.float16])
    def test_sums_are_float32(self, dtype):
        # 1024 + 1 is 1024 in bfloat16, 70000 is infinite in float16
        scores = np.ones((2, 64), np.float32) * 1024
        scores[0, 0] = 1025 if dtype != jnp.bfloat16 else 1032
        got = masks.block_mask(jnp.asarray(scores[::-1], dtype), (1, 64), 1)
        np.testing.assert_array_equal(np.asarray(got)[:, 0], [False, True])

    def test_a_block_with_nan_ranks_lowest(self):
        scores = jnp.ones((4, 4)).at[0, 0].set(jnp.nan)
        with self.assertRaisesRegex(
            ValueError, "`scores` must not be NaN; got 1 of 16"
        ):
            masks.block_mask(scores, (2, 2), 1)
        for num_kept in range(5):
            got = jax.jit(masks.block_mask, static_argnums=1)(scores, (2, 2), num_kept)
            np.testing.assert_array_equal(got, block_oracle(scores, (2, 2), num_kept))

    def test_numpy_scores(self):
        got = masks.block_mask(np.eye(4, dtype=np.float32), (2, 2), 2)
        np.testing.assert_array_equal(got, np.kron(np.eye(2), np.ones((2, 2))) > 0)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, r"must divide the last axes.*\.$"):
            masks.block_mask(jnp.ones((4, 6)), (2, 4), 1)
        with self.assertRaisesRegex(ValueError, "need 2 axes"):
            masks.block_mask(jnp.ones(6), (2, 2), 1)
        with self.assertRaisesRegex(
            ValueError, r"`num_kept` must be in \[0, 4\].*got 5"
        ):
            masks.block_mask(jnp.ones((4, 4)), (2, 2), 5)
        with self.assertRaisesRegex(ValueError, "positive sizes"):
            masks.block_mask(jnp.ones((4, 4)), (0, 2), 1)
        with self.assertRaisesRegex(TypeError, "must be floating; got int32"):
            masks.block_mask(jnp.ones((4, 4), jnp.int32), (2, 2), 1)

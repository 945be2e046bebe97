"""Block-sparse against loops over blocks."""

import functools

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import attention
from tests.attention import prompts

block_sparse = jax.jit(
    attention.block_sparse, static_argnames=("num_kept", "block_shape", "per_head")
)


def oracle(query, key, num_kept, chunk):
    """One head's blocks: means, products without a scale, and the three forced ones."""
    blocks = -(-len(query) // chunk)
    kept = np.zeros((blocks, blocks), bool)
    means = [
        [x[i * chunk : (i + 1) * chunk].mean(axis=0) for i in range(blocks)]
        for x in (query, key)
    ]
    for i in range(blocks):
        scores = [means[0][i] @ means[1][j] for j in range(i + 1)]
        kept[i, list(prompts.highest_oracle(scores, num_kept, {0, i - 1, i}))] = True
    return kept


class BlockSparseTest(parameterized.TestCase):
    @parameterized.parameters(3, 5, 12)
    def test_equals_the_oracle(self, num_kept):
        length, chunk = 46, 4  # the last block has two tokens
        select = functools.partial(
            attention.block_sparse, num_kept=num_kept, block_shape=(chunk, chunk)
        )

        @jax.jit
        def run(query, key):
            mask, again = select(query, key), jax.vmap(select)(query[None], key[None])
            return mask, mask.to_blocks(), attention.pair_density(mask, length), again

        x = prompts.prompt(length)
        mask, blocks, density, again = run(*x)
        query, key = (np.asarray(a, np.float64) for a in x)
        for b, h in np.ndindex(2, prompts.HEADS):
            want = oracle(
                query[b, :, h], key[b, :, h // prompts.GROUP], num_kept, chunk
            )
            np.testing.assert_array_equal(blocks[b, h], want)
            want = prompts.pair_density_oracle(want, length, (chunk, chunk))
            np.testing.assert_allclose(density[b, h], want, rtol=1e-5)
        self.assertEqual(mask.indices.shape[-1], num_kept)
        prompts.assert_same_under_vmap(mask, again)

    @parameterized.parameters(((4, 8), 3), ((8, 4), 4))
    def test_blocks_that_are_not_square(self, block_shape, least):
        """The first, the queries' own and the one before are there in every row."""
        x = prompts.prompt(64)
        mask = block_sparse(*x, num_kept=least, block_shape=block_shape, per_head=False)
        self.assertEqual(mask.num.shape[1], prompts.KV_HEADS)
        blocks = np.asarray(prompts.blocks_of(mask))
        height, width = block_shape
        for t in range(64):
            row = blocks[:, :, t // height]
            before = max(t // height * height // width - 1, 0)
            self.assertTrue(row[..., [0, before, t // width]].all())

    @parameterized.parameters((4, 4), (8, 4), (4, 8))
    @pytest.mark.once
    def test_filler_has_no_part(self, *block_shape):
        select = functools.partial(block_sparse, num_kept=4, block_shape=block_shape)
        prompts.assert_filler_has_no_part(select, (25, 46), 46)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"num_kept": 9},
            "`num_kept` must be at most the 8 blocks .*; got 9. Lower",
        ),
        ({"num_kept": 2}, "`num_kept` must be at least 3, what is always .*; got 2"),
        (
            {"block_shape": (64, 64)},
            r"`block_shape` must fit .* 32 .*\(64, 64\)",
        ),
    ],
)
def test_bad_settings_raise(changed, message):
    options = dict(num_kept=4, block_shape=(4, 4)) | changed
    with pytest.raises(ValueError, match=message):
        attention.block_sparse(*prompts.prompt(32), **options)

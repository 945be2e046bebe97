"""Selectors of blocks against loops over blocks, and what the selected attend to."""

import functools
import statistics

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import sparsejax as sj
from sparsejax import attention, ops

HEADS, KV_HEADS, DIM = 4, 2, 8
POOLS = {jnp.mean: np.mean, jnp.max: np.max, jnp.min: np.min}
STATIC = ("block_shape", "causal", "pool", "per_head")
topk_blocks = jax.jit(attention.topk_blocks, static_argnames=(*STATIC, "num_kept"))
statistical_topk_blocks = jax.jit(
    attention.statistical_topk_blocks, static_argnames=(*STATIC, "capacity")
)

blocks_of = jax.jit(sj.BlockMask.to_blocks)


def operands(queries=26, keys=23, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, queries, HEADS, DIM), (2, keys, KV_HEADS, DIM)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def scores_oracle(query, key, block_shape, pool, per_head):
    """A block at a time, float64."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    group, (height, width) = HEADS // KV_HEADS, block_shape
    rows, columns = -(-query.shape[1] // height), -(-key.shape[1] // width)
    scores = np.zeros((len(query), HEADS, rows, columns))
    for b, h, r, c in np.ndindex(scores.shape):
        q = POOLS[pool](query[b, r * height : (r + 1) * height, h], axis=0)
        k = POOLS[pool](key[b, c * width : (c + 1) * width, h // group], axis=0)
        scores[b, h, r, c] = q @ k / np.sqrt(DIM)
    if per_head:
        return scores
    return scores.reshape(len(query), KV_HEADS, group, rows, columns).mean(2)


def sight_oracle(query, key, block_shape, causal):
    """Which blocks may be kept and which must, from single positions."""
    (height, width), rows = block_shape, -(-query.shape[1] // block_shape[0])
    columns = -(-key.shape[1] // width)
    may, must = np.zeros((2, rows, columns), bool)
    for i, j in np.ndindex(query.shape[1], key.shape[1]):
        may[i // height, j // width] |= not causal or j <= i
        must[i // height, j // width] |= causal and i == j
    return may, must


def topk_oracle(scores, may, must, num_kept):
    kept = np.zeros(scores.shape, bool)
    for at in np.ndindex(scores.shape[:3]):
        order = sorted(
            np.flatnonzero(may[at[2]]), key=lambda c: (~must[at[2], c], -scores[*at, c])
        )
        kept[*at, order[:num_kept]] = True
    return kept


def statistical_oracle(scores, may, must, k):
    kept = np.zeros(scores.shape, bool)
    for at in np.ndindex(scores.shape[:3]):
        seen = np.flatnonzero(may[at[2]])
        x, n = scores[*at, seen], len(seen)
        theta = -np.inf
        if n > k:
            z = statistics.NormalDist().inv_cdf(1 - k / n)
            theta = x.mean() + x.std() * z
        kept[*at, seen] = (x > theta) | (x == x.max())
    return kept | must


class BlockScoresTest(parameterized.TestCase):
    @parameterized.product(pool=[jnp.mean, jnp.max], per_head=[False, True])
    def test_equal_the_oracle(self, pool, per_head):
        x = operands()
        options = dict(block_shape=(4, 5), pool=pool, per_head=per_head)
        if not per_head and pool is jnp.max:
            options["block_shape"] = (32, 32)  # one block, of the tokens that there are
        got = jax.jit(functools.partial(attention.block_scores, **options))(*x)
        np.testing.assert_allclose(got, scores_oracle(*x, **options), atol=1e-5)

    @parameterized.parameters(jnp.mean, jnp.max)
    def test_blocks_of_filler_are_finite(self, pool):
        x = operands(26, 26)
        filler = jnp.arange(26)[:, None, None] >= 9
        fn = functools.partial(
            attention.block_scores, block_shape=(4, 4), pool=pool, lengths=9
        )
        want = fn(*x)
        for value in (jnp.nan, jnp.inf):
            got = fn(*(jnp.where(filler, value, a) for a in x))
            np.testing.assert_array_equal(got, want)
        self.assertTrue(jnp.isfinite(want).all())

    def test_bfloat16_is_pooled_in_float32(self):
        x = jnp.array([1, 1 + 2**-7] * 256, jnp.bfloat16).reshape(1, 512, 1, 1)
        scores = attention.block_scores(x, x, block_shape=(512, 512))
        # the mean is no bfloat16 number
        np.testing.assert_allclose(scores, (1 + 2**-8) ** 2, rtol=1e-6)


class SelectorsTest(parameterized.TestCase):
    @parameterized.parameters(
        # causal, block_shape, pool, per_head, lengths
        (False, (4, 4), jnp.mean, False, (26, 23)),
        (True, (4, 4), jnp.mean, True, (26, 26)),
        (True, (4, 3), jnp.max, False, (26, 26)),
        (True, (2, 4), jnp.mean, False, (26, 15)),
    )
    def test_equal_the_oracle(self, causal, block_shape, pool, per_head, lengths):
        x = operands(*lengths)
        options = dict(block_shape=block_shape, pool=pool, per_head=per_head)
        scores = scores_oracle(*x, **options)
        sight = sight_oracle(*x, block_shape, causal)
        options["causal"] = causal

        @jax.jit
        def select(*x):
            statistical = functools.partial(
                attention.statistical_topk_blocks, *x, k=1.5, **options
            )
            topk = attention.topk_blocks(*x, num_kept=3, **options)
            return topk, topk.density(), statistical(), statistical(capacity=2)

        topk, density, statistical, capped = select(*x)
        kept = topk_oracle(scores, *sight, 3)
        np.testing.assert_array_equal(blocks_of(topk), kept)
        np.testing.assert_allclose(density, kept.mean(axis=(2, 3)), rtol=1e-6)
        self.assertEqual(topk.indices.shape[-1], 3)

        kept = statistical_oracle(scores, *sight, 1.5)
        np.testing.assert_array_equal(blocks_of(statistical), kept)
        self.assertFalse((topk.overflowed | statistical.overflowed).any())

        # with too little room the highest stay, and the mask tells
        blocks = np.asarray(blocks_of(capped))
        for at in np.ndindex(kept.shape[:2]):
            cut = topk_oracle(scores[at][None, None], kept[at], sight[1], 2)
            np.testing.assert_array_equal(blocks[at], cut[0, 0])
        crowded = (kept.sum(-1) > 2).any(-1)
        self.assertTrue(crowded.any())
        np.testing.assert_array_equal(capped.overflowed, crowded)

    @parameterized.parameters(
        # causal, block_shape, pool, per_head
        (True, (4, 4), jnp.mean, True),
        (True, (8, 4), jnp.max, False),
        (True, (4, 8), jnp.min, False),
        (False, (4, 5), jnp.mean, False),
    )
    @pytest.mark.once
    def test_filler_has_no_part(self, causal, block_shape, pool, per_head):
        """Each sequence has the blocks that it has where its tokens are all."""
        lengths, x = (13, 25), operands(26, 26)
        filled = jnp.arange(26)[:, None, None] >= jnp.reshape(
            jnp.array(lengths), (-1, 1, 1, 1)
        )
        x = [jnp.where(filled, jnp.nan, a) for a in x]
        options = dict(block_shape=block_shape, pool=pool, per_head=per_head)
        select = functools.partial(topk_blocks, num_kept=3, causal=causal, **options)
        few = functools.partial(
            statistical_topk_blocks, k=1.5, causal=causal, **options
        )
        topk, statistical = (
            np.asarray(blocks_of(fn(*x, lengths=jnp.array(lengths))))
            for fn in (select, few)
        )
        for b, length in enumerate(lengths):
            cut = [a[b : b + 1, :length] for a in x]
            scores = scores_oracle(*cut, **options)
            sight = sight_oracle(*cut, block_shape, causal)
            rows, columns = scores.shape[2:]
            for got, want in (
                (topk, topk_oracle(scores, *sight, 3)),
                (statistical, statistical_oracle(scores, *sight, 1.5)),
            ):
                np.testing.assert_array_equal(got[b, :, :rows, :columns], want[0])
                self.assertFalse(got[b, :, :, columns:].any())

    @pytest.mark.once
    def test_ties_go_to_the_left(self):
        x = jnp.ones((1, 24, 1, 4))
        mask = topk_blocks(x, x, num_kept=2, block_shape=(4, 4))
        np.testing.assert_array_equal(mask.indices[0, 0], [[0, 1]] * 6)
        mask = topk_blocks(x, x, num_kept=2, block_shape=(4, 4), causal=True)
        lists = [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]
        np.testing.assert_array_equal(mask.indices[0, 0], lists)

    @parameterized.parameters(attention.topk_blocks, attention.block_sparse)
    def test_lengths_of_a_list(self, select):
        x, options = operands(26, 26), {"num_kept": 3, "block_shape": (4, 4)}
        got, want = (
            select(*x, lengths=lengths, **options)
            for lengths in ([26, 9], jnp.array([26, 9]))
        )
        jax.tree.map(np.testing.assert_array_equal, got, want)

    @pytest.mark.once
    def test_no_query_is_left_without_a_key(self):
        """Nor with NaN in it: its own block stays, and only its row is touched."""
        query, key = operands(26, 26)
        query = query.at[0, 9].set(jnp.nan)
        options = dict(block_shape=(4, 4), causal=True)
        for mask in (
            topk_blocks(query, key, num_kept=1, **options),
            statistical_topk_blocks(query, key, k=1, **options),
        ):
            diagonal = np.eye(7, dtype=bool)
            np.testing.assert_array_equal(
                blocks_of(mask) & diagonal, [[diagonal] * 2] * 2
            )
            np.testing.assert_array_equal(mask.num[0, :, 2], 1)

    @pytest.mark.once
    def test_more_than_there_are_keeps_all(self):
        x = operands(16, 16)
        options = dict(block_shape=(4, 4), causal=True)
        below = np.tri(4, dtype=bool)
        for mask in (
            topk_blocks(*x, num_kept=9, **options),
            statistical_topk_blocks(*x, k=9, **options),
        ):
            np.testing.assert_array_equal(blocks_of(mask), [[below] * 2] * 2)

    def test_rows_taller_than_the_sequence(self):
        """All of its blocks hold keys at the queries' own positions."""
        mask = topk_blocks(
            *operands(8, 8), num_kept=2, block_shape=(16, 4), causal=True
        )
        np.testing.assert_array_equal(mask.num, 2)

    def test_k_may_be_traced(self):
        x = operands()
        fn = chex.assert_max_traces(attention.statistical_topk_blocks, n=1)
        fn = jax.jit(functools.partial(fn, block_shape=(4, 4)))
        few, many = (float(fn(*x, k=k).density().mean()) for k in (1.0, 4.0))
        self.assertLess(few, many)

    def test_gradients_are_those_of_the_mask_held_fixed(self):
        query, key = operands(16, 16)
        select = functools.partial(
            attention.topk_blocks, num_kept=2, block_shape=(4, 4), causal=True
        )
        fixed = select(query, key)

        def loss(query, key, mask):
            mask = select(query, key) if mask is None else mask
            return jnp.sin(
                ops.block_attention(query, key, key, mask, causal=True)
            ).sum()

        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        got = grad(query, key, None)
        chex.assert_trees_all_close(got, grad(query, key, fixed), rtol=1e-5)
        for leaf in got:
            self.assertTrue(leaf.any())

    def test_about_k_blocks_are_kept(self):
        """The scores of independent queries and keys are Gaussian in each row."""
        q, k = jax.random.normal(jax.random.key(0), (2, 1, 1024, 1, 64))
        mask = statistical_topk_blocks(q, k, k=13, block_shape=(8, 8))
        self.assertAlmostEqual(float(mask.num.mean()), 13, delta=0.4)


@pytest.mark.once
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_kept": 0}, "`num_kept` must be at least 1, .*got num_kept=0"),
        (
            {"num_kept": 1, "causal": True, "block_shape": (8, 4)},
            r"at least 2, .*got num_kept=1, causal=True and blocks of \(8, 4\)",
        ),
        ({"num_kept": 1, "block_shape": (0, 4)}, r"must be positive; got \(0, 4\)"),
        ({"k": 0.5}, "`k` must be at least 1; got k=0.5"),
        ({"k": 2, "capacity": 0}, "`capacity` must be at least 1, .* got capacity=0"),
        (
            {"k": 2, "capacity": 2, "block_shape": (32, 8), "causal": True},
            "`capacity` must be at least 3, .* got capacity=2",
        ),
        ({"k": 2, "lengths": [3]}, r"`lengths` must be one .* 2 seq.*int32\[1\]"),
        (
            {"k": 2, "lengths": jnp.array([26, 0])},
            r"`lengths` must be in \[1, 26\]; got 0 for sequence 1. Give how many",
        ),
        ({"num_kept": 1, "lengths": 27}, r"in \[1, 26\]; got 27 for sequence 0"),
        ({"num_kept": 1, "heads": 3}, r"must divide .*; got \(2, 26, 3, 8\) and"),
        ({"num_kept": 1, "batch": 1}, r"equal in batch .*; got \(1, 26, 4, 8\) and"),
    ],
)
def test_bad_settings_raise(changed, message):
    query, key = operands()
    options = {"block_shape": (4, 4)} | changed
    query = query[: options.pop("batch", 2), :, : options.pop("heads", HEADS)]
    fn = attention.topk_blocks if "num_kept" in options else None
    fn = fn or attention.statistical_topk_blocks
    with pytest.raises(ValueError, match=message):
        fn(query, key, **options)


def test_a_side_of_a_block_is_a_whole_number():
    query, key = operands()
    with pytest.raises(TypeError, match=r"`block_shape` must be .* got 4\.0"):
        attention.topk_blocks(query, key, num_kept=1, block_shape=(4.0, 4))

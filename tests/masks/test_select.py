"""num_kept, select, select_across and drop_and_grow, under every pattern."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import masks
from sparsejax.patterns import NM, Block, Channel, Unstructured, governed
from tests.masks import oracle

# pattern, shape, stacked axes, and the same units for the oracle
CASES = {
    "unstructured": (Unstructured(), (6, 8), 0, None),
    "five_axes": (Unstructured(), (2, 1, 3, 2, 4), 0, None),
    "stacked": (Unstructured(), (3, 4, 5), 1, None),
    "stacked_twice": (Unstructured(), (2, 3, 4, 5), 2, None),
    "block": (Block((2, 4)), (6, 8), 0, ("block", (2, 4))),
    "block_stacked": (Block((2, 2)), (3, 4, 6), 1, ("block", (2, 2))),
    "channel": (Channel(-1), (5, 8), 0, ("channel", -1)),
    "channel_stacked": (Channel(-2), (3, 7, 4), 1, ("channel", -2)),
}
NM_CASES = {
    "by_rank": (NM(2, 4), (8, 6), 0),
    "first_axis": (NM(1, 4, axis=0), (12, 5), 0),
    "by_extraction": (NM(2, 32), (64, 3), 0),
    "stacked": (NM(2, 4), (3, 8, 5), 1),
    "stacked_last_axis": (NM(3, 8, axis=-1), (2, 3, 16), 1),
}


def leaf_of(pattern, shape, stacked):
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return governed(params, pattern=pattern, stacked=stacked, where=lambda p, x: True)[
        0
    ]


def scores_of(shape, seed, few=False):
    """Integers, so that sums over units are exact and ties occur."""
    draws = np.random.default_rng(seed).permutation(math.prod(shape))
    return (draws % 5 if few else draws).reshape(shape).astype(np.float32)


def count_oracle(sparsity, size):
    return max(size - round(sparsity * size), min(size, 1))


def pooled(scores, units):
    return [scores[unit].sum() for unit in units]


def spread(shape, units, chosen):
    mask = np.zeros(shape, bool)
    for i in chosen:
        mask[units[i]] = True
    return mask


def select_oracle(scores, stacked, kind, sparsity):
    def one_layer(layer):
        units = oracle.units(layer.shape, kind)
        count = count_oracle(sparsity, len(units))
        return spread(
            layer.shape, units, oracle.best_first(pooled(layer, units))[:count]
        )

    return oracle.per_layer(one_layer, stacked, scores)


def drop_and_grow_oracle(mask, stacked, kind, drop, grow, sparsity, fraction):
    """Evci et al., 2020, section 3: keep the best, then grow the best of the rest."""

    def one_layer(mask, drop, grow):
        units = oracle.units(mask.shape, kind)
        active = [i for i, unit in enumerate(units) if mask[unit].any()]
        target = count_oracle(sparsity, len(units))
        stay = min(len(active), target)
        stay -= math.floor(fraction * stay + 1e-6)
        keep = oracle.best_first(
            pooled(drop, units), np.isin(range(len(units)), active)
        )
        keep = keep[:stay]
        rest = ~np.isin(range(len(units)), keep)
        grown = oracle.best_first(pooled(grow, units), rest)[: target - stay]
        return spread(mask.shape, units, [*keep, *grown])

    return oracle.per_layer(one_layer, stacked, mask, drop, grow)


def nm_drop_and_grow_oracle(mask, stacked, pattern, drop, grow, fraction):
    def one_layer(mask, drop, grow):
        flat = mask.reshape(-1)
        dropped = math.floor(fraction * flat.sum() + 1e-6)
        keep = oracle.topk(drop, flat.sum() - dropped, flat)
        axis = pattern.axis % (stacked + mask.ndim) - stacked
        found = oracle.groups(mask.shape, pattern.m, axis)
        free = pattern.n - keep.reshape(-1)[found].sum(axis=1)
        return keep | oracle.nm(grow, free, pattern.m, axis, ~keep)

    return oracle.per_layer(one_layer, stacked, mask, drop, grow)


class IsMadeOfTest(parameterized.TestCase):
    @parameterized.product(case=[*CASES, *NM_CASES])
    def test_tells_what_select_made_from_all_else(self, case):
        pattern, shape, stacked = (CASES | NM_CASES)[case][:3]
        leaf = leaf_of(pattern, shape, stacked)
        made = np.array(masks.select(jnp.asarray(scores_of(shape, 0)), leaf, 0.5))
        is_made_of = jax.jit(lambda mask: masks.is_made_of(mask, leaf))
        self.assertTrue(is_made_of(made))
        for index in [(0,) * len(shape), (-1,) * len(shape)]:
            other = made.copy()
            other[index] ^= True
            self.assertEqual(bool(is_made_of(other)), pattern == Unstructured(), index)
        nothing = np.zeros(shape, bool)
        self.assertEqual(bool(is_made_of(nothing)), not isinstance(pattern, NM))


class NumKeptTest(parameterized.TestCase):
    @parameterized.parameters(
        (0.9, 7, 1),
        (0.9, 100, 10),
        (0.0, 7, 7),
        (0.999, 7, 1),
        (0.5, 0, 0),
        (1, 5, 1),
        (-0.5, 8, 8),
        (1.5, 8, 1),
    )
    def test_values(self, sparsity, size, want):
        self.assertEqual(masks.num_kept(sparsity, size), want)
        self.assertIsInstance(masks.num_kept(sparsity, size), int)
        self.assertEqual(
            int(jax.jit(lambda s: masks.num_kept(s, size))(sparsity)), want
        )

    def test_python_floats_count_exactly_beyond_float32(self):
        self.assertEqual(masks.num_kept(0.5, 2**25 + 2), 2**24 + 1)


@given(sparsity=st.floats(0, 0.999), size=st.integers(0, 10**6))
def test_num_kept_is_the_nearest_count(sparsity, size):
    kept = masks.num_kept(sparsity, size)
    assert min(size, 1) <= kept <= size
    assert abs(kept - (1 - sparsity) * size) <= max(
        0.5 + 1e-6, 1 - (1 - sparsity) * size
    )


class SelectTest(parameterized.TestCase):
    @parameterized.product(case=sorted(CASES))
    def test_matches_oracle_without_retrace(self, case):
        pattern, shape, stacked, kind = CASES[case]
        leaf = leaf_of(pattern, shape, stacked)
        fn = jax.jit(chex.assert_max_traces(lambda s, x: masks.select(s, leaf, x), n=1))
        for sparsity, few in itertools.product((0.0, 0.3, 0.9), (False, True)):
            scores = scores_of(shape, 0, few)
            want = select_oracle(scores, stacked, kind, sparsity)
            np.testing.assert_array_equal(fn(scores, sparsity), want)

    @parameterized.product(case=sorted(NM_CASES))
    def test_nm(self, case):
        pattern, shape, stacked = NM_CASES[case]
        leaf, scores = leaf_of(pattern, shape, stacked), scores_of(shape, 0, few=True)
        got = jax.jit(lambda s: masks.select(s, leaf, None))(scores)
        want = oracle.nm(scores, pattern.n, pattern.m, pattern.axis)
        np.testing.assert_array_equal(got, want)

    def test_a_static_sparsity_counts_like_a_traced_one(self):
        leaf, scores = leaf_of(Unstructured(), (6, 7), 0), scores_of((6, 7), 0)
        static = jax.jit(lambda s: masks.select(s, leaf, 0.37))(scores)
        traced = jax.jit(lambda s, x: masks.select(s, leaf, x))(scores, 0.37)
        np.testing.assert_array_equal(static, traced)

    def test_no_gradient_flows(self):
        leaf = leaf_of(Unstructured(), (4, 4), 0)
        fn = lambda s: (s * masks.select(abs(s), leaf, 0.5)).sum()  # noqa: E731
        scores = jnp.asarray(scores_of((4, 4), 0)) + 1
        want = select_oracle(np.asarray(scores), 0, None, 0.5)
        np.testing.assert_array_equal(jax.jit(jax.grad(fn))(scores), want)

    @parameterized.parameters(jnp.bfloat16, jnp.float16)
    def test_low_precision(self, dtype):
        leaf = leaf_of(Block((2, 4)), (6, 8), 0)
        scores = scores_of((6, 8), 0, few=True)
        got = jax.jit(lambda s: masks.select(s, leaf, 0.5))(jnp.asarray(scores, dtype))
        want = select_oracle(scores, 0, ("block", (2, 4)), 0.5)
        np.testing.assert_array_equal(got, want)


class SelectAcrossTest(parameterized.TestCase):
    @parameterized.product(few=[False, True])
    def test_matches_oracle(self, few):
        shapes = {"a": (4, 5), "b": (3,), "c": (2, 3, 4)}
        params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
        leaves = governed(params)
        scores = [scores_of((4, 5), 0, few), None, scores_of((2, 3, 4), 1, few)]
        flat = np.concatenate([np.ravel(score) for score in scores[::2]])
        fn = jax.jit(
            chex.assert_max_traces(lambda x: masks.select_across(scores, leaves, x), 1)
        )
        for sparsity in (0.0, 0.4, 0.95):
            first, none, last = fn(sparsity)
            self.assertIsNone(none)
            got = np.concatenate([np.ravel(first), np.ravel(last)])
            want = oracle.topk(flat, count_oracle(sparsity, flat.size))
            np.testing.assert_array_equal(got, want)

    def test_too_many_weights_for_one_ranking(self):
        large = jax.ShapeDtypeStruct((4, 2**14, 2**15), jnp.float32)

        def select(scores, stacked):
            leaf = leaf_of(Unstructured(), scores.shape, stacked)
            return masks.select(scores, leaf, 0.5)

        by_layer = jax.eval_shape(lambda s: select(s, 1), large)
        self.assertEqual(by_layer.shape, large.shape)
        across = lambda *s: masks.select_across(s, governed(s), 0.5)  # noqa: E731
        for fn in (lambda s: select(s, 0), across, lambda s: masks.topk_mask(s, 5)):
            with self.assertRaisesRegex(ValueError, r"fewer than 2\*\*31 entries"):
                jax.eval_shape(fn, large)


class DropAndGrowTest(parameterized.TestCase):
    @parameterized.product(case=sorted(CASES))
    def test_matches_loop(self, case):
        pattern, shape, stacked, kind = CASES[case]
        leaf = leaf_of(pattern, shape, stacked)
        fn = jax.jit(
            chex.assert_max_traces(
                lambda mask, drop, grow, s, f: masks.drop_and_grow(
                    mask,
                    leaf,
                    drop_scores=drop,
                    grow_scores=grow,
                    sparsity=s,
                    drop_fraction=f,
                ),
                n=1,
            )
        )
        mask = select_oracle(scores_of(shape, 0), stacked, kind, 0.5)
        # twenty updates, the sparsity of some away from the count at hand
        for i in range(20):
            few = i >= 10  # with ties
            drop, grow = scores_of(shape, 2 * i, few), scores_of(shape, 2 * i + 1, few)
            drop, grow = np.where(mask, drop, 0), grow - 2
            sparsity, fraction = (0.5, 0.5, 0.7, 0.2)[i % 4], (0.3, 0.0, 1.0)[i % 3]
            got = np.asarray(fn(mask, drop, grow, sparsity, fraction))
            want = drop_and_grow_oracle(
                mask, stacked, kind, drop, grow, sparsity, fraction
            )
            np.testing.assert_array_equal(got, want)
            mask = got

    @parameterized.product(case=sorted(NM_CASES))
    def test_nm_matches_loop(self, case):
        pattern, shape, stacked = NM_CASES[case]
        leaf = leaf_of(pattern, shape, stacked)
        fn = jax.jit(
            lambda mask, drop, grow, f: masks.drop_and_grow(
                mask,
                leaf,
                drop_scores=drop,
                grow_scores=grow,
                sparsity=None,
                drop_fraction=f,
            )
        )
        mask = oracle.nm(scores_of(shape, 0), pattern.n, pattern.m, pattern.axis)
        for i in range(12):
            few = i >= 6  # with ties
            drop, grow = scores_of(shape, 2 * i, few), scores_of(shape, 2 * i + 1, few)
            drop, fraction = np.where(mask, drop, 0), (0.3, 0.0, 1.0)[i % 3]
            got = np.asarray(fn(mask, drop, grow, fraction))
            want = nm_drop_and_grow_oracle(mask, stacked, pattern, drop, grow, fraction)
            np.testing.assert_array_equal(got, want)
            groups = oracle.groups(shape, pattern.m, pattern.axis)
            counts = got.reshape(-1)[groups].sum(axis=1)
            np.testing.assert_array_equal(counts, pattern.n)
            mask = got

    def test_nm_of_eight_bits(self):
        pattern, dtype = NM(2, 4), jnp.float8_e4m3fn  # which has no -inf
        leaf = leaf_of(pattern, (8, 6), 0)
        drop, grow = (scores_of((8, 6), seed, few=True) for seed in (1, 2))
        mask = oracle.nm(drop, 2, 4, -2)
        got = jax.jit(masks.drop_and_grow, static_argnums=1)(
            mask,
            leaf,
            drop_scores=jnp.asarray(drop, dtype),
            grow_scores=jnp.asarray(grow - 2, dtype),
            sparsity=None,
            drop_fraction=0.5,
        )
        want = nm_drop_and_grow_oracle(mask, 0, pattern, drop, grow, 0.5)
        np.testing.assert_array_equal(got, want)

    def test_count_is_exact_whatever_is_not_finite(self):
        leaf = leaf_of(Unstructured(), (8, 8), 0)
        rng = np.random.default_rng(0)
        values = np.array([np.nan, np.inf, -np.inf, 0.0, 1.0], np.float32)
        fn = jax.jit(
            lambda mask, drop, grow: masks.drop_and_grow(
                mask,
                leaf,
                drop_scores=drop,
                grow_scores=grow,
                sparsity=0.75,
                drop_fraction=0.5,
            )
        )
        mask = oracle.topk(scores_of((8, 8), 0), 16)
        for _ in range(10):
            drop, grow = rng.choice(values, (2, 8, 8))
            got = np.asarray(fn(mask, drop, grow))
            want = drop_and_grow_oracle(mask, 0, None, drop, grow, 0.75, 0.5)
            np.testing.assert_array_equal(got, want)
            mask = got

    @parameterized.parameters(
        (10, 0.3, 3), (100, 0.29, 29), (100, 0.53, 53), (75, 0.84, 63), (7, 1, 7)
    )
    def test_the_dropped_share_is_not_short_by_rounding(self, kept, fraction, want):
        leaf = leaf_of(Unstructured(), (2, kept), 0)
        mask = np.arange(2 * kept).reshape(2, kept) < kept
        got = jax.jit(
            lambda f: masks.drop_and_grow(
                mask,
                leaf,
                drop_scores=jnp.ones(mask.shape),
                grow_scores=jnp.where(mask, 0.0, 1.0),
                sparsity=0.5,
                drop_fraction=f,
            )
        )(fraction)
        self.assertEqual(int((mask & ~np.asarray(got)).sum()), want)
        self.assertEqual(int(got.sum()), kept)

    def test_dropping_all_of_a_large_leaf_keeps_the_count(self):
        # float32 rounds the dropped count up from 2**21 on
        kept, shape = 2**21, (2**11 + 1, 2**10)
        leaf, size = leaf_of(Unstructured(), shape, 0), math.prod(shape)
        index = jnp.arange(size, dtype=jnp.float32).reshape(shape)
        got = jax.jit(
            lambda index: masks.drop_and_grow(
                index < kept,
                leaf,
                drop_scores=index,
                grow_scores=index,
                sparsity=1 - kept / size,
                drop_fraction=1.0,
            )
        )(index)
        np.testing.assert_array_equal(got, index >= size - kept)


def test_a_mask_of_more_than_n_in_m():
    leaf = leaf_of(NM(2, 4, axis=0), (8,), 0)
    got = masks.drop_and_grow(
        jnp.arange(8) < 6,
        leaf,
        drop_scores=jnp.arange(8.0),
        grow_scores=jnp.zeros(8),
        sparsity=None,
        drop_fraction=0.0,
    )
    np.testing.assert_array_equal(got.reshape(2, 4).sum(1), 2)


def test_ties_in_one_layer_leave_the_others_whole():
    scores = jnp.array([[1.0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]])
    got = masks.select(scores, leaf_of(Unstructured(), (2, 8), 1), 0.5)
    np.testing.assert_array_equal(got.sum(1), 4)

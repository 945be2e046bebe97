"""topk_mask and global_topk: the exact count, the order, and no sort."""

import functools

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import masks
from sparsejax.masks import _order, _topk
from tests.masks import oracle
from tests.masks.hlo import operations

SHAPES = [(), (0,), (23,), (5, 8), (0, 3), (2, 3, 1, 2, 4)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# One traced function, compiled once a shape and dtype; NaN raises outside of jit.
topk = jax.jit(masks.topk_mask)


def subnormal(dtype):
    return float(jnp.finfo(dtype).smallest_subnormal)


def awkward_scores(dtype):
    """Few values, so many ties; the least and largest of each kind among them."""
    tiny, info = subnormal(dtype), jnp.finfo(dtype)
    least, most = float(info.smallest_normal), float(info.max)
    values = [0.0, -0.0, 1.0, 1.0, -1.0, 0.5, tiny, -tiny, 3 * tiny, least]
    values += [most, -most, np.inf, -np.inf, np.nan]
    scores = hnp.arrays(
        np.float64, st.sampled_from(SHAPES), elements=st.sampled_from(values)
    )
    return scores.map(lambda a: np.asarray(jnp.asarray(a.astype(dtype))))


class TopKTest(parameterized.TestCase):
    @parameterized.product(
        shape=SHAPES, dtype=DTYPES, share=[0.0, 0.3, 0.5, 1.0], values=["normal", "few"]
    )
    def test_matches_oracle(self, shape, dtype, share, values):
        rng = np.random.default_rng(0)
        scores = (
            rng.normal(size=shape)
            if values == "normal"
            else rng.integers(3, size=shape)
        )
        scores = jnp.asarray(scores, dtype)
        num_kept = round(share * scores.size)
        got = topk(scores, num_kept)
        self.assertEqual(got.dtype, jnp.bool_)
        np.testing.assert_array_equal(got, oracle.topk(scores, num_kept))

    def test_eager_equals_jit(self):
        scores = jax.random.normal(jax.random.key(0), (6, 6))
        np.testing.assert_array_equal(masks.topk_mask(scores, 5), topk(scores, 5))

    def test_larger_than_one_chunk(self):
        scores = jax.random.randint(jax.random.key(0), (257, 300), 0, 50)
        scores = scores.astype(jnp.float32)
        order = np.argsort(-np.asarray(scores).reshape(-1), kind="stable")
        for num_kept in (1, 12_345, 77_099):
            want = np.zeros(scores.size, bool)
            want[order[:num_kept]] = True
            got = np.asarray(topk(scores, num_kept)).reshape(-1)
            np.testing.assert_array_equal(got, want)

    def test_schedule_does_not_retrace(self):
        fn = jax.jit(chex.assert_max_traces(masks.topk_mask, n=1))
        for num_kept in (0, 1, 2, 6):
            self.assertEqual(int(fn(jnp.arange(6.0), num_kept).sum()), num_kept)

    def test_under_vmap_and_scan(self):
        scores = jax.random.normal(jax.random.key(0), (3, 4, 5))
        counts = jnp.array([0, 7, 20])
        want = [oracle.topk(s, k) for s, k in zip(scores, [0, 7, 20], strict=True)]
        by_vmap = jax.jit(jax.vmap(masks.topk_mask))(scores, counts)
        np.testing.assert_array_equal(by_vmap, want)
        step = lambda _, x: (None, masks.topk_mask(*x))  # noqa: E731
        np.testing.assert_array_equal(
            jax.lax.scan(step, None, (scores, counts))[1], want
        )

    @parameterized.product(shape=[(64, 32), (2048,)])
    def test_no_sort(self, shape):
        found = operations(topk, jnp.ones(shape), 5)
        self.assertNoCommonElements(found, ["sort", "custom-call", "gather"])
        argsort = jax.jit(lambda scores: jnp.argsort(scores, axis=None))
        self.assertIn("sort", operations(argsort, jnp.ones(shape)))

    @parameterized.product(dtype=[jnp.float32, jnp.float16], num_leaves=[1, 2])
    def test_the_form_for_a_gpu(self, dtype, num_leaves):
        # three bits a pass; chosen at lowering, so a CPU can only call it by its name
        search = jax.jit(
            functools.partial(_topk._search, stacked=1, bits_per_pass=3, unroll=True)
        )
        for few in (False, True):
            rng = np.random.default_rng(0)
            draws = (
                rng.integers(2, size=(3, 4, 70)) if few else rng.normal(size=(3, 4, 70))
            )
            scores = [
                jnp.asarray(s, dtype) for s in np.split(draws, num_leaves, axis=2)
            ]
            keys = [_order.ordered_keys(s) for s in scores]
            counts = np.array([0, 123, 280])
            got = search(keys, jnp.asarray(counts))
            for i, count in enumerate(counts):
                flat = np.concatenate([np.ravel(s[i]) for s in scores])
                kept = np.concatenate([np.ravel(mask[i]) for mask in got])
                np.testing.assert_array_equal(kept, oracle.topk(flat, count))

    def test_no_number_has_the_key_of_what_is_excluded(self):
        # of these floats the lowest has all bits set
        lowest = np.array([0xFF], np.uint8).view(jnp.dtype("float8_e4m3fnuz"))
        self.assertGreater(int(_order.ordered_keys(lowest)[0]), _order.EXCLUDED)

    @parameterized.parameters(-1, 7)
    def test_count_out_of_range(self, num_kept):
        with self.assertRaisesRegex(ValueError, rf"in \[0, 6\].*got {num_kept}"):
            masks.topk_mask(jnp.arange(6.0), num_kept)

    @parameterized.parameters(
        (0.5, r"one whole number; got 0.5. .*`round\(share \* 6\)`"),
        (2.0, "got 2.0"),
        (np.array([1, 2]), r"got array\(\[1, 2\]\)"),
        (True, "got True"),
    )
    def test_count_must_be_whole(self, num_kept, match):
        with self.assertRaisesRegex(TypeError, match):
            masks.topk_mask(jnp.arange(6.0), num_kept)
        with self.assertRaisesRegex(TypeError, "`num_kept` must be one whole number"):
            jax.jit(masks.topk_mask)(jnp.arange(6.0), jnp.asarray(num_kept))

    def test_integers_are_refused(self):
        # negative ones would rank by their bits, the wrong way round
        for fn in (masks.topk_mask, masks.global_topk):
            with self.assertRaisesRegex(TypeError, "must be floating; got int32"):
                fn(jnp.arange(-3, 3), 2)

    def test_nan(self):
        scores = jnp.array([[1.0, jnp.nan], [jnp.nan, 0.0]])
        with self.assertRaisesRegex(ValueError, "`scores` must not be NaN; got 2 of 4"):
            masks.topk_mask(scores, 2)
        for num_kept, want in ((2, [1, 0, 0, 1]), (3, [1, 1, 0, 1])):
            got = np.asarray(topk(scores, num_kept)).reshape(-1)
            np.testing.assert_array_equal(got, np.array(want, bool))

    def test_nan_that_a_jit_closes_over(self):
        scores = jnp.array([1.0, jnp.nan])
        with self.assertRaisesRegex(ValueError, "must not be NaN"):
            jax.jit(lambda: masks.topk_mask(scores, 1))()
        clean = jnp.array([1.0, 2.0])
        got = jax.jit(lambda: masks.topk_mask(clean, 1))()
        np.testing.assert_array_equal(got, [False, True])


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_exact_count_and_order_on_awkward_scores(data, dtype):
    scores = data.draw(awkward_scores(dtype))
    num_kept = data.draw(st.integers(0, scores.size))
    got = np.asarray(topk(scores, num_kept))
    assert got.sum() == num_kept
    np.testing.assert_array_equal(got, oracle.topk(scores, num_kept))


class GlobalTopKTest(parameterized.TestCase):
    @parameterized.product(num_kept=[0, 1, 9, 20, 25], values=["normal", "few"])
    def test_matches_oracle(self, num_kept, values):
        rng = np.random.default_rng(1)
        draw = (
            rng.normal
            if values == "normal"
            else lambda size: rng.integers(2, size=size)
        )
        tree = {
            "a": draw(size=(3, 4)),
            "b": None,
            "c": [draw(size=(0, 2)), draw(size=13)],
        }
        tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        got = jax.jit(masks.global_topk)(tree, num_kept)
        self.assertIsNone(got["b"])
        chex.assert_trees_all_equal_shapes(got, tree)
        joined = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(got)])
        np.testing.assert_array_equal(joined, oracle.topk(flat, num_kept))

    def test_mixed_dtypes_compare_by_value(self):
        tree = [
            jnp.array([1.5, 3.0], jnp.bfloat16),
            jnp.array([2.0, 1.0], jnp.float16),
            jnp.array([1.75], jnp.float32),
        ]
        got = [
            np.asarray(leaf).tolist() for leaf in jax.jit(masks.global_topk)(tree, 3)
        ]
        self.assertEqual(got, [[False, True], [True, False], [True]])

    def test_count_does_not_retrace(self):
        tree = {"a": jnp.arange(4.0), "b": jnp.arange(4.0)}
        fn = jax.jit(chex.assert_max_traces(masks.global_topk, n=1))
        for num_kept in (0, 3, 8):
            kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(fn(tree, num_kept)))
            self.assertEqual(kept, num_kept)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, r"in \[0, 4\].*got 5"):
            masks.global_topk({"a": jnp.ones(2), "b": jnp.ones(2)}, 5)
        with self.assertRaisesRegex(ValueError, r"NaN; got 1 of 2 NaN at \['b'\]"):
            masks.global_topk({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])}, 2)
        with self.assertRaisesRegex(TypeError, r"floating; got int32 at \['b'\]"):
            masks.global_topk({"a": jnp.ones(2), "b": jnp.arange(2)}, 2)

    def test_nothing_to_rank(self):
        self.assertEqual(masks.global_topk({"a": None}, 0), {"a": None})

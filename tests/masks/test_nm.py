"""nm_mask: exactly n of every m, on every axis, by both algorithms."""

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
from tests.masks import oracle
from tests.masks.hlo import operations

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# all but the last are without infinities
EIGHT_BITS = [
    jnp.float8_e4m3fn, jnp.float8_e4m3fnuz, jnp.float8_e4m3b11fnuz,
    jnp.float8_e5m2fnuz, jnp.float8_e5m2,
]  # fmt: skip


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def nm(scores, n, m, axis):
    return masks.nm_mask(scores, n, m, axis)


class NMTest(parameterized.TestCase):
    @parameterized.product(
        # by rank up to 8 and for most up to 16, by extraction above: of the kept ones,
        # or of the dropped ones where these are fewer; of groups halved or odd
        n_m=[
            (1, 1), (1, 2), (1, 4), (2, 4), (3, 4), (4, 4), (4, 8), (7, 8), (3, 5),
            (1, 16), (2, 16), (8, 16), (15, 16), (16, 16), (1, 17), (9, 17), (1, 32),
            (31, 32), (5, 32), (1, 64), (16, 64), (40, 64), (63, 64), (64, 64),
        ],
        values=["normal", "few"],
    )  # fmt: skip
    def test_matches_oracle(self, n_m, values):
        n, m = n_m
        rng = np.random.default_rng(m)
        shape = (3 * m, 5)
        scores = (
            rng.normal(size=shape)
            if values == "normal"
            else rng.integers(3, size=shape)
        )
        scores = jnp.asarray(scores, jnp.float32)
        got = np.asarray(nm(scores, n, m, -2))
        np.testing.assert_array_equal(got, oracle.nm(scores, n, m, -2))
        counts = got.reshape(-1)[oracle.groups(shape, m, -2)].sum(axis=1)
        np.testing.assert_array_equal(counts, n)

    @parameterized.product(axis=[0, 2, 4, -1, -2, -5], n_m=[(2, 4), (1, 12)])
    def test_every_axis(self, axis, n_m):
        n, m = n_m
        shape = [2, 1, 3, 1, 2]
        shape[axis] = 2 * m
        scores = jax.random.normal(jax.random.key(0), shape)
        got = nm(scores, n, m, axis)
        np.testing.assert_array_equal(got, oracle.nm(scores, n, m, axis))

    @parameterized.product(
        dtype=[*DTYPES, *EIGHT_BITS], n_m=[(2, 4), (1, 16), (15, 16), (3, 32)]
    )
    def test_dtypes(self, dtype, n_m):
        scores = jax.random.normal(jax.random.key(0), (32, 3)).astype(dtype)
        got = nm(scores, *n_m, 0)
        np.testing.assert_array_equal(got, oracle.nm(scores, *n_m, 0))

    @parameterized.product(shape=[(0, 3), (8, 0), (0,)], n_m=[(2, 4), (1, 32)])
    def test_empty(self, shape, n_m):
        shape = tuple(size and 32 for size in shape)
        self.assertEqual(nm(jnp.zeros(shape), *n_m, 0).shape, shape)

    @parameterized.product(n_m=[(2, 4), (1, 16), (15, 16), (2, 32)])
    def test_all_equal_keeps_the_first(self, n_m):
        n, m = n_m
        want = np.arange(2 * m) % m < n
        np.testing.assert_array_equal(nm(jnp.ones(2 * m), n, m, 0), want)

    @parameterized.product(n_m=[(2, 4), (15, 16), (3, 32)])
    def test_idempotent(self, n_m):
        weights = jax.random.normal(jax.random.key(0), (128, 4))
        mask = nm(abs(weights), *n_m, 0)
        again = nm(abs(jnp.where(mask, weights, 0)), *n_m, 0)
        np.testing.assert_array_equal(mask, again)

    def test_no_sort_and_no_retrace(self):
        for n, m in ((2, 4), (1, 32), (8, 16)):
            found = operations(nm, jnp.ones((64, 8)), n, m, -2)
            self.assertNoCommonElements(found, ["sort", "custom-call", "gather"])
        fn = jax.jit(chex.assert_max_traces(lambda s: masks.nm_mask(s, 2, 4), n=1))
        for seed in range(3):
            fn(jax.random.normal(jax.random.key(seed), (8, 2)))

    def test_under_vmap(self):
        scores = jax.random.normal(jax.random.key(0), (3, 8, 4))
        got = jax.jit(jax.vmap(lambda s: masks.nm_mask(s, 2, 4)))(scores)
        np.testing.assert_array_equal(got, oracle.nm(scores, 2, 4, -2))

    @parameterized.parameters(
        ((8, 2), 0, 4, -2, "got n=0, m=4"),
        ((8, 2), 5, 4, -2, "got n=5, m=4"),
        ((8, 6), 2, 4, -1, r"m=4 for axis -1 of shape \(8, 6\)"),
        ((8,), 2, 4, -2, r"`axis` must be.*got -2 for shape \(8,\)"),
        ((8, 4), 2, 4, 2, r"`axis` must be.*got 2 for shape"),
    )
    def test_errors(self, shape, n, m, axis, match):
        with self.assertRaisesRegex(ValueError, match):
            masks.nm_mask(jnp.ones(shape), n, m, axis)

    def test_sizes_must_be_whole(self):
        for n in (2.0, True):
            with self.assertRaisesRegex(TypeError, f"`n` must be .* int; got {n}"):
                masks.nm_mask(jnp.ones((8, 4)), n, 4)

    def test_integers_are_refused(self):
        with self.assertRaisesRegex(TypeError, "must be floating; got int32"):
            masks.nm_mask(jnp.ones((4, 2), jnp.int32), 2, 4)

    def test_nan(self):
        scores = jnp.ones((4, 2)).at[0, 0].set(jnp.nan)
        with self.assertRaisesRegex(ValueError, "`scores` must not be NaN; got 1 of 8"):
            masks.nm_mask(scores, 2, 4)
        np.testing.assert_array_equal(nm(scores, 3, 4, 0), oracle.nm(scores, 3, 4, 0))


PATTERNS = [(1, 2), (2, 4), (5, 8), (2, 16), (15, 16), (1, 16), (3, 24), (21, 24)]


@given(
    data=st.data(),
    n_m=st.sampled_from(PATTERNS),
    dtype=st.sampled_from([*DTYPES, *EIGHT_BITS]),
)
def test_exact_count_and_order_on_awkward_scores(data, n_m, dtype):
    n, m = n_m
    values = [0.0, -0.0, 1.0, 1.0, -1.0, 0.5, 1e-3, np.inf, -np.inf, np.nan]
    elements = st.sampled_from(values)
    scores = data.draw(hnp.arrays(np.float32, (2 * m, 2), elements=elements))
    scores = np.asarray(jnp.asarray(scores, dtype))
    got = np.asarray(nm(scores, n, m, 0))
    np.testing.assert_array_equal(got, oracle.nm(scores, n, m, 0))


@given(data=st.data(), n_m=st.sampled_from(PATTERNS))
def test_exact_count_at_the_ends_of_the_range(data, n_m):
    # a CPU flushes subnormals in comparisons, so only the count is promised
    n, m = n_m
    info = jnp.finfo(jnp.float32)
    tiny = float(info.smallest_subnormal)
    values = [0.0, tiny, -tiny, 5 * tiny, float(info.max), float(info.min), np.inf]
    elements = st.sampled_from([*values, -np.inf, np.nan])
    scores = data.draw(hnp.arrays(np.float32, (2 * m, 2), elements=elements))
    got = np.asarray(nm(scores, n, m, 0)).reshape(-1)
    assert (got[oracle.groups((2 * m, 2), m, 0)].sum(axis=1) == n).all()

"""statistical_topk and statistical_threshold: values, edges and errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax as sj
from tests.activations import oracle
from tests.masks.hlo import operations

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2, jnp.float16: 2e-3}
STATIC = ("k", "axis", "ddof", "huber_delta")
topk = jax.jit(sj.statistical_topk, static_argnames=STATIC)
threshold = jax.jit(sj.statistical_threshold, static_argnames=STATIC[:3])
# k=2 of 0..7, from the formula of You et al., 2025, section 3, in float64.
GOLDEN_THETA = 5.0454502
GOLDEN = [0, 0, 0, 0, 0, 0, 0.9545498, 1.9545498]


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def rows_of(x, axis):
    return np.moveaxis(np.asarray(x, np.float64), axis, -1)


class ValuesTest(parameterized.TestCase):
    def test_golden_vector(self):
        x = jnp.arange(8.0)
        np.testing.assert_allclose(topk(x, 2), GOLDEN, atol=1e-5)
        np.testing.assert_allclose(threshold(x, 2), [GOLDEN_THETA], atol=1e-5)
        np.testing.assert_allclose(sj.statistical_topk(x, 2), GOLDEN, atol=1e-5)

    @parameterized.product(traced=[False, True], masked=[False, True])
    def test_float64_is_computed_in_float64(self, traced, masked):
        with jax.enable_x64(True):
            x = np.random.default_rng(0).normal(size=(2, 30))
            where = np.arange(30) % 3 > 0 if masked else None
            both = lambda x, k: (  # noqa: E731
                sj.statistical_threshold(x, k, where=where),
                sj.block_statistical_topk(x, k, 1, where=where)[0],
            )
            run = jax.jit(both, static_argnums=() if traced else 1)
            theta, values = run(x, 4)
            counted = np.full(30, True) if where is None else where
            for row, got, out in zip(x, theta, values, strict=True):
                want = oracle.threshold_of_row(row[counted], 4)
                np.testing.assert_allclose(got, [want], rtol=1e-13)
                want = np.where(counted, np.maximum(row - want, 0), 0)
                np.testing.assert_allclose(out, want, atol=1e-13)

    @parameterized.product(
        case=[
            ((5, 37), -1, jnp.float32),
            ((4, 3, 6), 1, jnp.float32),
            ((40, 2), 0, jnp.bfloat16),
            ((9,), -1, jnp.float16),
        ],
        k=[1, 3.7],
    )
    def test_matches_oracle(self, case, k):
        shape, axis, dtype = case
        x = 2 * normal(shape, dtype=dtype) + 1
        both = jax.jit(
            lambda x: (
                sj.statistical_topk(x, k, axis=axis),
                sj.statistical_threshold(x, k, axis=axis),
            )
        )
        got, theta = both(x)
        want, want_theta = oracle.statistical(rows_of(x, axis), k)
        self.assertEqual(got.dtype, dtype)
        self.assertEqual(theta.dtype, dtype)
        self.assertEqual(theta.shape[axis], 1)
        atol = 4 * TOLERANCE[dtype]
        np.testing.assert_allclose(rows_of(got, axis), want, atol=atol)
        np.testing.assert_allclose(rows_of(theta, axis), want_theta, atol=atol)

    @parameterized.product(ddof_delta=[(0, 0.5), (1, 0.0)], masked=[True, False])
    def test_options_match_oracle(self, ddof_delta, masked):
        ddof, huber_delta = ddof_delta
        x = normal((6, 24))
        where = normal((6, 24), 1) > -0.5 if masked else None
        options = dict(where=where, ddof=ddof, huber_delta=huber_delta)
        got = topk(x, 3, **options)
        fn = functools.partial(sj.statistical_topk, **options)
        traced = jax.jit(fn)(x, 3)
        want, _ = oracle.statistical(x, 3, where=where, ddof=ddof, delta=huber_delta)
        np.testing.assert_allclose(got, want, atol=2e-6)
        np.testing.assert_allclose(traced, want, atol=2e-6)
        self.assertFalse(np.signbit(got).any())

    @parameterized.product(dtype=list(TOLERANCE), masked=[True, False])
    def test_is_relu_above_the_threshold_bit_for_bit(self, dtype, masked):
        x = normal((8, 64), dtype=dtype)
        where = normal((8, 64), 1) > 0 if masked else None

        @jax.jit
        def both(x):
            theta = sj.statistical_threshold(x, 5, where=where)
            out = jax.nn.relu(x - theta)
            out = out if where is None else jnp.where(where, out, 0)
            return sj.statistical_topk(x, 5, where=where), out

        np.testing.assert_array_equal(*both(x))

    def test_is_the_operator_of_gemma_3n_bit_for_bit(self):
        # relu(x - (mean + std * quantile)), population std, k = 5% of d_ff
        x = normal((16, 640))
        quantile = jnp.float32(1.6448536269514722)  # of 0.95

        @jax.jit
        def gemma(x):
            mean = jnp.mean(x, axis=-1, keepdims=True)
            std = jnp.std(x, axis=-1, keepdims=True)
            return jax.nn.relu(x - (mean + std * quantile))

        got = jax.jit(lambda x: sj.statistical_topk(x, 0.05 * 640))(x)
        np.testing.assert_array_equal(got, gemma(x))

    def test_only_high_values_survive(self):
        # one-sided: a large negative entry is the last to be kept
        x = normal((4, 64)).at[:, 0].set(-8.0)
        got = topk(x, 6)
        np.testing.assert_array_equal(got[:, 0], 0)
        self.assertGreater(int((got > 0).sum()), 0)

    @parameterized.parameters(int, float, np.int64, np.float32, np.array)
    def test_k_of_any_kind(self, kind):
        k = kind(3)
        x = normal((4, 32))
        want = sj.statistical_topk(x, 3)
        np.testing.assert_array_equal(sj.statistical_topk(x, k), want)
        np.testing.assert_array_equal(sj.statistical_topk(x, jnp.asarray(k)), want)

    def test_no_sort(self):
        found = operations(topk, normal((8, 128)), 8)
        self.assertNoCommonElements(found, ["sort", "custom-call", "gather"])


class StatisticsTest(parameterized.TestCase):
    """The number of survivors, derived for normal rows and simulated for others."""

    @parameterized.parameters((500, 4096, 328, 0.96), (1500, 1024, 82, 0.94))
    def test_count_law(self, num_rows, d, k, least_jaccard):
        x = 3 * normal((num_rows, d)) - 2
        kept = np.asarray(topk(x, k)) > 0
        count = kept.sum(-1)
        # std of the mean: 0.5 of 328 over 500 rows
        self.assertAlmostEqual(count.mean(), k, delta=1.5)
        self.assertAlmostEqual(count.std(), 0.172 * d**0.5, delta=1.0)
        order = np.argsort(-np.asarray(x), axis=-1)[:, :k]
        exact = np.zeros(kept.shape, bool)
        np.put_along_axis(exact, order, True, axis=-1)
        jaccard = (kept & exact).sum(-1) / (kept | exact).sum(-1)
        self.assertGreater(jaccard.mean(), least_jaccard)

    def test_ddof_at_a_small_width(self):
        # d=64, k=8: 8.12 survivors with the population std, 8.01 with the sample std
        x = normal((40_000, 64))
        for ddof, want in ((0, 8.12), (1, 8.01)):
            mean = float((topk(x, 8, ddof=ddof) > 0).sum(-1).mean())
            self.assertAlmostEqual(mean, want, delta=0.03)

    @parameterized.parameters(
        ("laplace", 6.9, 0.3),
        ("uniform", 9.4, 0.3),
        ("exponential", 9.0, 0.3),
        ("t5", 6.5, 0.3),
        ("t3", 4.9, 0.6),
        ("relu", 11.2, 0.3),
    )
    def test_other_distributions(self, name, percent, delta):
        rng = np.random.default_rng(0)
        shape = (200, 4096)
        x = {
            "laplace": lambda: rng.laplace(size=shape),
            "uniform": lambda: rng.uniform(size=shape),
            "exponential": lambda: rng.exponential(size=shape),
            "t5": lambda: rng.standard_t(5, size=shape),
            "t3": lambda: rng.standard_t(3, size=shape),
            "relu": lambda: np.maximum(rng.normal(size=shape), 0),
        }[name]()
        x = jnp.asarray(x, jnp.float32)
        density = 100 * float((topk(x, 0.08 * 4096) > 0).mean())
        self.assertAlmostEqual(density, percent, delta=delta)

    def test_two_values_leave_no_survivor(self):
        x = jnp.asarray(np.tile([1.0, -1.0], 512), jnp.float32)
        np.testing.assert_array_equal(topk(x, 0.08 * 1024), 0)

    def test_an_outlier_takes_the_places_of_others(self):
        x = normal((100, 4096)).at[:, 7].set(100.0)
        kept = topk(x, 0.08 * 4096) > 0
        self.assertAlmostEqual(100 * float(kept.mean()), 0.45, delta=0.1)

    def test_a_batch_uses_far_more_neurons_than_a_row(self):
        kept = np.asarray(topk(normal((320, 4096)), 328)) > 0
        for batch, percent in ((8, 49), (32, 93)):
            union = kept.reshape(-1, batch, 4096).any(axis=1).mean()
            self.assertAlmostEqual(100 * union, percent, delta=1)

    def test_bfloat16_is_accumulated_in_float32(self):
        x = (normal((4, 13824)) + 3).astype(jnp.bfloat16)
        theta = jax.jit(lambda x: sj.statistical_threshold(x, 1106))(x)
        wide = np.asarray(x, np.float64)
        z = oracle.quantile(1 - 1106 / 13824)
        want = wide.mean(-1, keepdims=True) + wide.std(-1, keepdims=True) * z
        # half a unit in the last place of a number in [4, 8)
        np.testing.assert_allclose(np.asarray(theta, np.float64), want, atol=2**-6)


@pytest.mark.usefixtures("compile_fast")
class EdgesTest(parameterized.TestCase):
    @parameterized.parameters(8, 8.0, 1e9)
    def test_k_of_all_entries_is_the_identity(self, k):
        x = normal((3, 8)).at[0, 0].set(jnp.nan)
        np.testing.assert_array_equal(sj.statistical_topk(x, k), x)
        np.testing.assert_array_equal(
            sj.statistical_threshold(x, k), np.full((3, 1), -np.inf)
        )
        traced = jax.jit(sj.statistical_topk)(x, k)
        np.testing.assert_array_equal(traced, x)
        theta = jax.jit(sj.statistical_threshold)(x, k)
        np.testing.assert_array_equal(theta, np.full((3, 1), -np.inf))
        grad = jax.jit(jax.grad(lambda x, k: sj.statistical_topk(x, k).sum()))(x, k)
        np.testing.assert_array_equal(grad, 1)

    def test_masked_rows_equal_compacted_ones(self):
        x, where = normal((3, 40)), np.asarray(normal((3, 40), 1) > 0)
        filled = jnp.where(where, x, jnp.nan)  # what does not count is never read
        got = np.asarray(topk(x, 4, where=where))
        np.testing.assert_array_equal(topk(filled, 4, where=where), got)
        theta = threshold(filled, 4, where=where)
        for i in range(3):
            row = x[i, where[i]]
            np.testing.assert_allclose(got[i, where[i]], topk(row, 4), atol=1e-6)
            np.testing.assert_allclose(theta[i], threshold(row, 4), atol=1e-6)
        np.testing.assert_array_equal(got[~where], 0)

    @parameterized.parameters(True, False)
    def test_short_rows_keep_all(self, traced):
        # a causal mask: row i has i + 1 entries
        x = normal((10, 10))
        where = jnp.tril(jnp.ones((10, 10), bool))
        x = jnp.where(where, x, -jnp.inf)
        fn = jax.jit(sj.statistical_topk) if traced else topk
        got = np.asarray(fn(x, 4, where=where))
        np.testing.assert_array_equal(got[:4], np.where(where, x, 0)[:4])
        theta = np.asarray(threshold(x, 4, where=where))
        np.testing.assert_array_equal(theta[:4], -np.inf)
        self.assertTrue(np.isfinite(theta[4:]).all())
        self.assertTrue(np.isfinite(got).all())

    def test_where_broadcasts_along_any_axis(self):
        x = normal((3, 5, 8))
        for shape in ((8,), (5, 1)):
            where = normal(shape, 2) > -0.3
            want = topk(x, 2, where=jnp.broadcast_to(where, x.shape))
            got = topk(x, 2, where=where)
            np.testing.assert_allclose(got, want, atol=1e-6)
            moved = topk(x, 2, axis=1, where=jnp.broadcast_to(where, x.shape))
            got = topk(x, 2, axis=1, where=where)
            np.testing.assert_allclose(got, moved, atol=1e-6)

    def test_a_row_without_entries_is_zero(self):
        where = jnp.array([[True] * 8, [False] * 8])
        got = topk(normal((2, 8)), 2, where=where)
        np.testing.assert_array_equal(got[1], 0)

    @parameterized.parameters(jnp.nan, jnp.inf, -jnp.inf)
    def test_a_bad_entry_shows_in_its_row_alone(self, bad):
        x = normal((4, 16))
        clean = topk(x, 3)
        got = np.asarray(topk(x.at[1, 5].set(bad), 3))
        self.assertTrue(np.isnan(got[1]).all())
        np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(clean, 1, 0))

    def test_constant_rows_are_zero(self):
        for value in (0.0, 1.5, -2.0):
            np.testing.assert_array_equal(topk(jnp.full((2, 16), value), 3), 0)

    def test_empty_arrays(self):
        self.assertEqual(topk(jnp.ones((0, 8)), 2).shape, (0, 8))
        self.assertEqual(topk(jnp.ones((3, 0)), 2).shape, (3, 0))


@pytest.mark.usefixtures("compile_fast")
class TransformationsTest(parameterized.TestCase):
    def test_layers_of_different_k_under_scan_and_vmap(self):
        x, counts = normal((3, 4, 32)), [2, 5, 32]
        want = [sj.statistical_topk(x[i], k) for i, k in enumerate(counts)]

        def layer(carry, operands):
            return carry, sj.statistical_topk(*operands)

        counts = jnp.array(counts)
        got = jax.jit(lambda *a: jax.lax.scan(layer, None, a)[1])(x, counts)
        np.testing.assert_allclose(got, np.stack(want), atol=2e-6)
        got = jax.jit(jax.vmap(sj.statistical_topk))(x, counts)
        np.testing.assert_allclose(got, np.stack(want), atol=2e-6)

    def test_a_traced_k_does_not_retrace(self):
        fn = jax.jit(chex.assert_max_traces(sj.statistical_topk, n=1))
        x = normal((2, 64))
        for k in (1, 5, 64):
            np.testing.assert_allclose(fn(x, k), sj.statistical_topk(x, k), atol=2e-6)

    @settings(max_examples=25)
    @given(
        seed=st.integers(0, 1000),
        shift=st.floats(-4, 4),
        scale=st.floats(0.1, 10),
        k=st.floats(1, 15),
    )
    def test_shift_invariant_and_homogeneous(self, seed, shift, scale, k):
        x = np.random.default_rng(seed).normal(size=(3, 16)).astype(np.float32)
        topk = jax.jit(sj.statistical_topk)  # k traced: one compilation
        want = np.asarray(topk(x, k))
        np.testing.assert_allclose(topk(x + np.float32(shift), k), want, atol=2e-5)
        np.testing.assert_allclose(
            topk(np.float32(scale) * x, k), scale * want, rtol=1e-4, atol=1e-5 * scale
        )


@pytest.mark.usefixtures("compile_fast")
class GluTest(parameterized.TestCase):
    """`activation(statistical_topk(x, k)) * up` as one function."""

    def test_matches_oracle(self):
        x, up, where = normal((24, 6)), normal((24, 6), 1), normal((24, 6), 2) > -0.5
        options = dict(ddof=1, huber_delta=0.3)
        filled = (jnp.where(where, a, jnp.nan) for a in (x, up))  # is never read
        fn = functools.partial(sj.statistical_glu, axis=0, **options)
        fn = functools.partial(fn, activation=jnp.tanh, where=where)
        got = jax.jit(fn)(*filled, 3)
        survivors, _ = oracle.statistical(
            rows_of(x, 0), 3, where=where.T, ddof=1, delta=0.3
        )
        want = np.where(where.T, np.tanh(survivors) * rows_of(up, 0), 0)
        np.testing.assert_allclose(rows_of(got, 0), want, atol=2e-6)

    def test_gradients_are_those_of_the_parts(self):
        x, up, g = normal((4, 32)), normal((4, 32), 1), normal((4, 32), 2)

        def parts(x, up, k):
            return jax.nn.gelu(sj.statistical_topk(x, k)) * up

        @jax.jit
        def both(k):
            fns = sj.statistical_glu, parts
            losses = [lambda *a, fn=fn: jnp.vdot(g, fn(*a)) for fn in fns]
            return [jax.value_and_grad(f, argnums=(0, 1, 2))(x, up, k) for f in losses]

        for k in (5.0, 32.0):  # the last keeps all
            chex.assert_trees_all_close(*both(k), rtol=1e-5, atol=1e-5)

    def test_k_of_all_entries_keeps_all(self):
        x, up = normal((2, 8)), normal((2, 8), 1)
        got = jax.jit(lambda x, up: sj.statistical_glu(x, up, 8))(x, up)
        np.testing.assert_allclose(got, jax.nn.gelu(x) * up, atol=1e-6)

    def test_up_must_be_like_x(self):
        x = jnp.ones((2, 8))
        for up in (x[0], x.astype(jnp.bfloat16)):
            with self.assertRaisesRegex(ValueError, "`up` must be like `x`, float32"):
                sj.statistical_glu(x, up, 2)


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters("statistical_topk", "statistical_threshold")
    def test_bad_arguments(self, name):
        fn = getattr(sj, name)
        x = jnp.ones((2, 8))
        for k in (0, 0.5, -1, float("nan"), jnp.float32(0.5)):
            with self.assertRaisesRegex(ValueError, r"`k` must be at least 1; got k="):
                fn(x, k)
        for k in (True, "2", None, 1j):
            with self.assertRaisesRegex(TypeError, "`k` must be a number or a traced"):
                fn(x, k)
        with self.assertRaisesRegex(TypeError, r"real scalar; got float32\[2\]"):
            fn(x, jnp.ones(2))
        with self.assertRaisesRegex(TypeError, r"real scalar; got bool\[\]"):
            jax.jit(fn)(x, True)
        with self.assertRaisesRegex(TypeError, r"`x` must be floating; got int32\[3\]"):
            fn(jnp.arange(3), 2)
        with self.assertRaisesRegex(ValueError, r"`axis` must be an axis.*got 2"):
            fn(x, 2, axis=2)
        with self.assertRaisesRegex(ValueError, r"`axis` must be an axis.*got -1"):
            fn(jnp.float32(1), 2)
        for axis in ((0, 1), 1.0, None):
            with self.assertRaisesRegex(TypeError, "`axis` must be a Python int; got"):
                fn(x, 2, axis=axis)
        with self.assertRaisesRegex(TypeError, r"`where` must be bool; got float32"):
            fn(x, 2, where=x)
        with self.assertRaisesRegex(
            ValueError, r"`where` must broadcast.*got \(3, 8\)"
        ):
            fn(x, 2, where=jnp.ones((3, 8), bool))
        with self.assertRaisesRegex(ValueError, r"`where` must broadcast"):
            fn(x, 2, where=jnp.ones((4, 2, 8), bool))
        for ddof in (2, -1, True):
            with self.assertRaisesRegex(ValueError, "`ddof` must be 0 or 1; got"):
                fn(x, 2, ddof=ddof)

    @parameterized.product(delta=[-0.1, float("nan"), float("inf")], k=[2, 8])
    def test_bad_huber_delta(self, delta, k):
        with self.assertRaisesRegex(ValueError, "`huber_delta` must be at least 0"):
            sj.statistical_topk(jnp.ones((2, 8)), k, huber_delta=delta)

    @parameterized.parameters(2, 8)  # 8 is the identity, in kernels too
    def test_bad_implementation(self, k):
        x = jnp.ones((2, 8))
        with self.assertRaisesRegex(ValueError, "`implementation` must be None or one"):
            sj.statistical_topk(x, k, implementation="fast")
        with self.assertRaisesRegex(NotImplementedError, "multiple of 512; got 8"):
            sj.statistical_topk(x, k, implementation="mosaic_gpu")

"""topk_activation, block_statistical_topk and magnitude_threshold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sparsejax as sj
from sparsejax import activations
from tests.activations import oracle

topk = jax.jit(sj.topk_activation, static_argnames=("k", "axis", "straight_through"))
block_topk = jax.jit(
    sj.block_statistical_topk, static_argnames=("k", "block", "axis", "pool")
)


@pytest.fixture(autouse=True)
def _compile_fast():
    """Nearly all of a test here is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


class ExactTest(parameterized.TestCase):
    @parameterized.parameters(
        ((5, 37), 6, -1, jnp.float32),
        ((4, 6, 2), 1, 1, jnp.bfloat16),
        ((7, 3), 6, 0, jnp.float16),
        ((8,), 8, -1, jnp.float32),
    )
    def test_matches_oracle(self, shape, k, axis, dtype):
        x = normal(shape, dtype=dtype)
        values, mask = topk(x, k, axis=axis)
        want = oracle.exact(np.moveaxis(np.asarray(x, np.float64), axis, -1), k)
        np.testing.assert_array_equal(np.moveaxis(np.asarray(mask), axis, -1), want)
        np.testing.assert_array_equal(values, np.where(mask, x, 0))
        self.assertEqual(values.dtype, dtype)
        self.assertEqual(mask.dtype, jnp.bool_)

    @settings(max_examples=60)
    @given(
        x=hnp.arrays(
            np.float32,
            (2, 9),
            elements=st.sampled_from(
                [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3.4e38]
            ),
        ),
        k=st.sampled_from([1, 4, 8]),
    )
    def test_ties_and_nan(self, x, k):
        values, mask = topk(x, k)
        np.testing.assert_array_equal(mask, oracle.exact(x, k))
        np.testing.assert_array_equal(values, np.where(mask, x, 0))
        np.testing.assert_array_equal(np.sum(mask, axis=-1), k)

    def test_eager_and_vmap(self):
        x = jnp.round(2 * normal((3, 4, 16)))
        want = topk(x, 5)
        for got in (
            sj.topk_activation(x, 5),
            jax.vmap(functools.partial(sj.topk_activation, k=np.int64(5)))(x),
        ):
            jax.tree.map(np.testing.assert_array_equal, got, want)

    @parameterized.parameters(True, False)
    def test_gradient(self, straight_through):
        x, g = normal((4, 16)), normal((4, 16), 1)
        mask = topk(x, 3)[1]

        def loss(x):
            values, _ = sj.topk_activation(x, 3, straight_through=straight_through)
            return jnp.vdot(g, values)

        want = g if straight_through else jnp.where(mask, g, 0)
        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), want)
        values, _ = topk(x, 3, straight_through=straight_through)
        np.testing.assert_array_equal(values, jnp.where(mask, x, 0))

    def test_errors(self):
        x = jnp.ones((2, 8))
        for k in (2.0, True, None, jnp.int32(2)):
            with self.assertRaisesRegex(TypeError, "`k` must be a Python int; got"):
                sj.topk_activation(x, k)
        with self.assertRaisesRegex(TypeError, "`k` must be a Python int; got"):
            jax.jit(sj.topk_activation)(x, 2)
        with self.assertRaisesRegex(ValueError, "`k` must be at least 1; got 0"):
            sj.topk_activation(x, 0)
        with self.assertRaisesRegex(TypeError, "`x` must be floating; got int32"):
            sj.topk_activation(jnp.arange(4), 2)
        with self.assertRaisesRegex(ValueError, "`axis` must be an axis"):
            sj.topk_activation(x, 2, axis=2)


class BlockTest(parameterized.TestCase):
    @parameterized.product(pool=["max", "mean"], masked=[True, False], block=[3, 4])
    def test_matches_oracle(self, pool, masked, block):
        x = normal((6, 24))
        where = None
        if masked:
            where = np.asarray(normal((6, 24), 1)) > 0
            where[0] = False
            where[1, 5:] = False  # fewer than k: all are kept
            x = jnp.where(where, x, jnp.nan)
        got = block_topk(x, 6, block, pool=pool, where=where)
        want = oracle.blocks(x, 6, block, pool, where)
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_allclose(got[0], want[0], atol=2e-6)

    @parameterized.parameters("max", "mean")
    def test_a_block_of_one_is_statistical_topk(self, pool):
        x = normal((4, 64), dtype=jnp.bfloat16)
        where = normal((4, 64), 1) > 0
        for options in ({}, {"where": where}):

            @jax.jit
            def both(x, options=options):
                values, mask = sj.block_statistical_topk(x, 5, 1, pool=pool, **options)
                return values, mask, sj.statistical_topk(x, 5, **options)

            values, mask, want = both(x)
            np.testing.assert_array_equal(values, want)
            np.testing.assert_array_equal(mask, want > 0)

    def test_tiles_are_kept_whole(self):
        # mean scores are Gaussian, so that the number of tiles obeys the count law
        x = normal((300, 4096))
        values, mask = block_topk(x, 512, 16, pool="mean")
        tiles = np.asarray(mask).reshape(300, 256, 16)
        np.testing.assert_array_equal(tiles.all(-1), tiles.any(-1))
        self.assertAlmostEqual(np.asarray(mask).sum(-1).mean(), 512, delta=12)
        self.assertTrue((np.asarray(values)[~np.asarray(mask)] == 0).all())
        # maxima are skewed: fewer or more tiles than asked for, within a quarter
        _, mask = block_topk(x, 512, 16)
        self.assertAlmostEqual(np.asarray(mask).sum(-1).mean(), 512, delta=128)

    def test_other_axis_and_traced_k(self):
        x = normal((24, 3))
        want = block_topk(x.T, 6, 4)
        got = block_topk(x, 6, 4, axis=0)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.T), got, want)
        traced = jax.jit(lambda x, k: sj.block_statistical_topk(x, k, 4))
        np.testing.assert_array_equal(traced(x.T, 6)[1], want[1])
        np.testing.assert_allclose(traced(x.T, 6)[0], want[0], atol=2e-6)
        for got in (traced(x.T, 24), block_topk(x.T, 24, 4)):
            np.testing.assert_array_equal(got[0], x.T)
            self.assertTrue(got[1].all())

    @parameterized.parameters("max", "mean")
    def test_gradient(self, pool):
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            x, g = rng.normal(size=(2, 12)), rng.normal(size=(2, 12))

            @jax.jit
            def loss(x):
                return jnp.vdot(g, sj.block_statistical_topk(x, 4, 3, pool=pool)[0])

            got, eps = jax.jit(jax.grad(loss))(x), 1e-6
            for i in np.ndindex(x.shape):
                step = np.zeros(x.shape)
                step[i] = eps
                want = float(loss(x + step) - loss(x - step)) / (2 * eps)
                self.assertAlmostEqual(float(got[i]), want, delta=1e-7)

    def test_no_nan_in_gradients_and_nan_in_its_row(self):
        x = jnp.ones((3, 16)).at[1].set(normal((16,)))
        grad = jax.grad(lambda x, k: sj.block_statistical_topk(x, k, 4)[0].sum())
        for k in (5, 16):
            self.assertTrue(np.isfinite(jax.jit(grad)(x, k)).all())
        values, _ = block_topk(x.at[2, 3].set(jnp.nan), 5, 4)
        self.assertTrue(np.isnan(values[2]).all())
        self.assertTrue(np.isfinite(values[:2]).all())

    def test_errors(self):
        x = jnp.ones((2, 8))
        fn = sj.block_statistical_topk
        with self.assertRaisesRegex(ValueError, "`block` must divide.*got block=3"):
            fn(x, 4, 3)
        with self.assertRaisesRegex(ValueError, "`block` must divide.*got block=0"):
            fn(x, 4, 0)
        with self.assertRaisesRegex(TypeError, "`block` must be a Python int; got 2.0"):
            fn(x, 4, 2.0)
        with self.assertRaisesRegex(ValueError, "`k` must be at least 4; got k=2"):
            fn(x, 2, 4)
        with self.assertRaisesRegex(ValueError, "`pool` must be 'max' or 'mean'; got"):
            fn(x, 4, 2, pool="sum")
        with self.assertRaisesRegex(TypeError, "`where` must be bool"):
            fn(x, 4, 2, where=x)


class MagnitudeTest(parameterized.TestCase):
    @parameterized.product(threshold=[0.5, np.linspace(0, 2, 8), np.full((3, 1), 0.3)])
    def test_matches_numpy(self, threshold):
        x = normal((3, 8))
        values, mask = jax.jit(activations.magnitude_threshold)(x, threshold)
        want = np.abs(np.asarray(x)) > np.asarray(threshold, np.float32)
        np.testing.assert_array_equal(mask, want)
        np.testing.assert_array_equal(values, np.where(want, x, 0))
        loss = lambda x: activations.magnitude_threshold(x, threshold)[0].sum()  # noqa: E731
        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), want)

    def test_bfloat16_keeps_its_dtype_and_equality_is_dropped(self):
        x = jnp.array([0.5, -0.5, 0.75, jnp.nan], jnp.bfloat16)
        values, mask = activations.magnitude_threshold(x, 0.5)
        self.assertEqual(values.dtype, jnp.bfloat16)
        np.testing.assert_array_equal(mask, [False, False, True, False])

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, r"`threshold` must broadcast.*\(3,\)"):
            activations.magnitude_threshold(jnp.ones((2, 8)), np.ones(3))
        with self.assertRaisesRegex(TypeError, "`x` must be floating"):
            activations.magnitude_threshold(jnp.arange(3), 1)
        for threshold in (-0.5, float("nan")):
            with self.assertRaisesRegex(ValueError, f"at least 0; got {threshold}"):
                activations.magnitude_threshold(jnp.ones(8), threshold)

"""Gradients of the statistical top-k: formula, identities, finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import sparsejax as sj
from tests.activations import oracle

# The gradient of the sum at k=2 of 0..7, from the derivative in float64.
GOLDEN = [0.00758, -0.06602, -0.13961, -0.2132, -0.2868, -0.36039, 0.56602, 0.49242]


@pytest.fixture(autouse=True)
def _compile_fast():
    """Nearly all of a test here is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def gradient(x, g, k, **kwargs):
    """The gradient of <g, f(x)>, jitted."""
    loss = lambda x: jnp.vdot(g, sj.statistical_topk(x, k, **kwargs))  # noqa: E731
    return jax.jit(jax.grad(loss))(x)


def draws(shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(dtype), rng.normal(size=shape).astype(dtype)


def finite_difference(fn, x, eps=1e-6):
    """The gradient of a scalar function, entry by entry, in float64."""
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = eps
        out[i] = (float(fn(x + step)) - float(fn(x - step))) / (2 * eps)
    return out


class GradientTest(parameterized.TestCase):
    def test_golden_gradient(self):
        got = gradient(jnp.arange(8.0), jnp.ones(8), 2)
        np.testing.assert_allclose(got, GOLDEN, atol=1e-5)

    @parameterized.product(shape=[(5, 33), (2, 3, 16)], k=[4.5])
    def test_matches_formula(self, shape, k):
        x, g = draws(shape, dtype=np.float32)
        want = oracle.statistical_gradient(x, g, k)
        np.testing.assert_allclose(gradient(x, g, k), want, atol=2e-6)
        traced = jax.jit(jax.grad(lambda x, k: jnp.vdot(g, sj.statistical_topk(x, k))))(
            x, k
        )
        np.testing.assert_allclose(traced, want, atol=2e-6)

    @parameterized.parameters(
        dict(ddof=1),
        dict(huber_delta=0.4),
        dict(where=draws((2, 12), 3)[0] > -0.4, ddof=1),
        dict(axis=0),
    )
    def test_finite_differences(self, **kwargs):
        with jax.enable_x64(True):
            x, g = draws((2, 12), 1)
            k = 1.3 if kwargs.get("axis") == 0 else 3.0
            fn = functools.partial(sj.statistical_topk, **kwargs)
            loss = jax.jit(lambda x, k: jnp.vdot(g, fn(x, k)))
            got, got_k = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, k)
            self.assertEqual(got.dtype, np.float64)
            want = finite_difference(lambda x: loss(x, k), x)
            np.testing.assert_allclose(got, want, atol=1e-7)
            want_k = finite_difference(lambda k: loss(x, k), np.float64(k))
            np.testing.assert_allclose(got_k, want_k, atol=1e-6)
            np.testing.assert_allclose(gradient(x, g, k, **kwargs), want, atol=1e-7)

    def test_finite_differences_of_the_threshold(self):
        with jax.enable_x64(True):
            x, _ = draws((1, 12), 1)
            loss = jax.jit(lambda x: sj.statistical_threshold(x, 3).sum())
            want = finite_difference(loss, x)
            np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), want, atol=1e-8)

    @parameterized.parameters(0.0, 0.3)
    def test_identities(self, huber_delta):
        x, g = draws((6, 64), dtype=np.float32)
        dx = gradient(x, g, 5, huber_delta=huber_delta)
        # shift invariance: the gradient of a row sums to 0
        np.testing.assert_allclose(dx.sum(-1), 0, atol=1e-5)
        if not huber_delta:  # homogeneity of degree 1: <x, dx> = <g, f(x)>
            out = sj.statistical_topk(x, 5)
            np.testing.assert_allclose((x * dx).sum(-1), (g * out).sum(-1), atol=1e-4)

    def test_entries_that_do_not_survive_get_a_gradient(self):
        x, g = draws((1, 32), dtype=np.float32)
        dx = np.asarray(gradient(x, g, 4))
        dropped = np.asarray(sj.statistical_topk(x, 4)) == 0
        self.assertTrue((dx[dropped] != 0).all())

    def test_huber_makes_the_gradient_continuous(self):
        x = jnp.arange(8.0)
        theta = float(sj.statistical_threshold(x, 2)[0])

        def slope(shift, delta):  # of one entry, moved just past theta
            moved = x.at[5].set(theta + shift)
            return float(gradient(moved, jnp.eye(8)[5], 2, huber_delta=delta)[5])

        self.assertGreater(slope(0.3, 0.0) - slope(-0.3, 0.0), 0.5)
        self.assertLess(abs(slope(0.3, 100.0) - slope(-0.3, 100.0)), 0.02)
        near = sj.statistical_topk(x, 2, huber_delta=1e-4)
        np.testing.assert_allclose(near, sj.statistical_topk(x, 2), atol=1e-4)

    @parameterized.product(masked=[True, False], traced=[True, False])
    def test_no_nan_at_zero_variance(self, masked, traced):
        x = jnp.full((3, 16), 1.5).at[1].set(0.0)
        where = (jnp.arange(16) < 9) if masked else None
        topk = functools.partial(sj.statistical_topk, where=where)
        grad = jax.grad(lambda x, k: topk(x, k).sum())
        fn = jax.jit(grad) if traced else jax.jit(grad, static_argnums=1)
        np.testing.assert_array_equal(fn(x, 3), 0)
        loss = lambda x: sj.statistical_threshold(x, 3, where=where).sum()  # noqa: E731
        got = jax.jit(jax.grad(loss))(x)
        want = np.where(np.arange(16) < 9, 1 / 9, 0) if masked else np.full(16, 1 / 16)
        np.testing.assert_allclose(got, np.broadcast_to(want, (3, 16)), atol=1e-7)

    def test_no_nan_where_nothing_survives(self):
        x = jnp.asarray(np.tile([1.0, -1.0], 64), jnp.float32)
        np.testing.assert_array_equal(gradient(x, jnp.ones(128), 10), 0)

    @parameterized.parameters(jnp.nan, jnp.inf, -jnp.inf)
    def test_what_does_not_count_gets_no_gradient(self, bad):
        x, g = draws((4, 16), dtype=np.float32)
        where = np.asarray(draws((4, 16), 2)[0] > -0.3)
        where[0] = False
        where[1, 2:] = False  # at most k entries
        filled = jnp.where(where, x, bad)
        dx = np.asarray(gradient(filled, g, 3, where=where))
        np.testing.assert_array_equal(dx[~where], 0)
        self.assertTrue(np.isfinite(dx).all())
        np.testing.assert_array_equal(dx[1][where[1]], g[1][where[1]])
        np.testing.assert_array_equal(dx, gradient(x, g, 3, where=where))

    def test_bfloat16_gradient_is_summed_in_float32(self):
        x, g = draws((2, 8192))
        x, g = jnp.asarray(x, jnp.bfloat16), jnp.asarray(g + 1, jnp.bfloat16)
        dx = gradient(x, g, 400)
        self.assertEqual(dx.dtype, jnp.bfloat16)
        want = oracle.statistical_gradient(x, g, 400)
        theta = sj.statistical_threshold(x, 400)
        sure = abs(np.asarray(x - theta, np.float64)) > 0.02  # survivors in both
        # one rounding of the result to 8 bits, and theta's own before it
        np.testing.assert_allclose(
            np.asarray(dx, np.float64)[sure], want[sure], rtol=2e-2, atol=1e-3
        )

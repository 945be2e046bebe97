"""Mean and std of rows in one pass, as for few rows on a GPU, against NumPy."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from sparsejax.ops.gaussian_topk import _moments

one_pass = jax.jit(_moments._one_pass)


def oracle(x, where=None):
    """Mean and variance in float64; 0 in a row without entries."""
    x = np.asarray(x, np.float64)
    where = np.ones(x.shape, bool) if where is None else np.asarray(where)
    count = np.maximum(where.sum(-1, keepdims=True), 1)
    mean = np.where(where, x, 0).sum(-1, keepdims=True) / count
    squares = np.where(where, x - mean, 0) ** 2
    return mean, squares.sum(-1, keepdims=True) / count


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


class OnePassTest(parameterized.TestCase):
    @parameterized.product(shape=[(3, 1000), (1, 24576), (2, 4, 3, 1)], masked=[0, 1])
    def test_matches_numpy(self, shape, masked):
        x, where = 2 * normal(shape) + 3, normal(shape, 1) > 0
        where = where if masked else None
        x = x if where is None else jnp.where(where, x, 0)
        for got, want in zip(one_pass(x, where), oracle(x, where), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)

    def test_vmap(self):
        x, where = normal((4, 3, 50)), normal((4, 3, 50), 1) > 0
        x = jnp.where(where, x, 0)
        chex.assert_trees_all_close(
            jax.vmap(_moments._one_pass)(x, where), one_pass(x, where), atol=1e-6
        )

    @parameterized.parameters(1e3, 1e5)
    def test_a_large_mean_leaves_the_variance_as_exact_as_two_passes_do(self, offset):
        x = normal((4, 4096)) + offset
        _, want = oracle(x)
        errors = [
            np.abs(jax.jit(fn)(x, None)[1] - want).max()
            for fn in (_moments._one_pass, _moments._two_passes)
        ]
        self.assertLess(errors[0], 2 * errors[1] + 1e-6)

    def test_constant_and_empty_rows(self):
        x = jnp.array([[0.1] * 7, [5.0] * 7, [0.0] * 7])
        where = jnp.array([[True] * 7, [False] * 6 + [True], [False] * 7])
        mean, var = one_pass(jnp.where(where, x, 0), where)
        np.testing.assert_allclose(mean[:, 0], [0.1, 5, 0], rtol=1e-6)
        np.testing.assert_allclose(var[:, 0], 0, atol=1e-15)

    @parameterized.parameters(np.nan, np.inf, -np.inf)
    def test_what_is_not_finite_gives_nan(self, value):
        x = normal((2, 64)).at[1, 40].set(value)
        mean, var = one_pass(x, None)
        self.assertTrue(np.isnan(var[1, 0]) and not np.isfinite(mean[1, 0]))
        self.assertTrue(np.isfinite(mean[0, 0]) and np.isfinite(var[0, 0]))

    @parameterized.parameters(False, True)
    def test_derivatives_are_those_of_two_passes(self, masked):
        x, where = normal((3, 20)), normal((3, 20), 1) > 0
        where = where if masked else None

        def loss(fn, x):
            mean, var = fn(x if where is None else jnp.where(where, x, 0), where)
            return jnp.sum(jnp.sin(mean) * jnp.exp(var))

        def derivatives(fn):
            grad = jax.grad(lambda x: loss(fn, x))
            return grad(x), jax.grad(lambda x: jnp.vdot(grad(x), x**2))(x)

        got, want = map(derivatives, (_moments._of_few_rows, _moments._two_passes))
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)

    def test_is_taken_for_few_rows_on_a_gpu_alone(self):
        def lowered(rows, platform):
            x = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
            fn = jax.jit(lambda x: _moments.mean_and_std(x))
            exported = jax.export.export(fn, platforms=[platform])(x)
            return exported.mlir_module().count("stablehlo.reduce")

        self.assertEqual(lowered(1024, "cuda"), 1)
        self.assertEqual(lowered(1025, "cuda"), 2)
        self.assertEqual(lowered(1024, "cpu"), 2)
        chex.assert_trees_all_equal(
            _moments.mean_and_std(jnp.zeros((2, 0)))[0], jnp.zeros((2, 1))
        )


@hypothesis.given(
    rows=st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=5, max_size=5),
        min_size=1,
        max_size=3,
    ),
    flags=st.lists(st.booleans(), min_size=5, max_size=5),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_odd_rows(rows, flags):
    x = jnp.asarray(rows, jnp.float32)
    where = jnp.broadcast_to(jnp.asarray(flags), x.shape)
    x = jnp.where(where, x, 0)
    for got, want in zip(_moments._one_pass(x, where), oracle(x, where), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)

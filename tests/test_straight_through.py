"""straight_through: the projected value, the gradient of the identity."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sparsejax._straight_through import straight_through

KEEP = np.array([True, False, True, False])


def project(weight):
    return straight_through(weight, jnp.where(KEEP, weight, 0).astype(weight.dtype))


class StraightThroughTest(parameterized.TestCase):
    @parameterized.parameters(jnp.float32, jnp.bfloat16, jnp.float16)
    def test_value_and_gradient(self, dtype):
        weight = jnp.array([1.0, -2.0, 3.0, 4.0], dtype)
        factors = jnp.array([1.0, 2.0, 3.0, 4.0], dtype)
        value = jax.jit(project)(weight)
        np.testing.assert_array_equal(value, np.where(KEEP, weight, 0))
        grad = jax.jit(jax.grad(lambda w: (project(w) * factors).sum()))(weight)
        self.assertEqual((value.dtype, grad.dtype), (dtype, dtype))
        np.testing.assert_array_equal(grad, factors)

    def test_equals_the_formula_with_stop_gradient(self):
        weight = jax.random.normal(jax.random.key(0), (4,))
        formula = lambda w: w + jax.lax.stop_gradient(jnp.where(KEEP, w, 0) - w)  # noqa: E731
        cube = lambda w: (w**3).sum()  # noqa: E731
        got = jax.grad(lambda w: cube(project(w)))(weight)
        want = jax.grad(lambda w: cube(formula(w)))(weight)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    def test_no_gradient_to_the_projected_value(self):
        fn = lambda p: straight_through(jnp.ones(4), p).sum()  # noqa: E731
        np.testing.assert_array_equal(jax.grad(fn)(jnp.ones(4)), np.zeros(4))

    def test_jvp(self):
        weight, tangent = jnp.arange(4.0), jnp.array([1.0, 2.0, 3.0, 4.0])
        value, out = jax.jvp(project, (weight,), (tangent,))
        np.testing.assert_array_equal(value, np.where(KEEP, weight, 0))
        np.testing.assert_array_equal(out, tangent)

    def test_vmap(self):
        weights = jax.random.normal(jax.random.key(0), (3, 4))
        loss = lambda w: (project(w) ** 2).sum()  # noqa: E731
        got = jax.vmap(jax.grad(loss))(weights)
        np.testing.assert_array_equal(got, 2 * np.where(KEEP, weights, 0))
        # only one of the two operands has the mapped axis
        fn = lambda w, p: straight_through(w, p)  # noqa: E731
        out = jax.vmap(fn, (None, 0))(jnp.ones(4), weights)
        np.testing.assert_array_equal(out, weights)
        shared = lambda w: jax.vmap(fn, (None, 0))(w, weights).sum()  # noqa: E731
        np.testing.assert_array_equal(jax.grad(shared)(jnp.ones(4)), np.full(4, 3.0))

    def test_non_finite_weights_do_not_leak(self):
        weight = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
        np.testing.assert_array_equal(project(weight), [1, 0, 3, 0])
        grad = jax.grad(lambda w: project(w).sum())(weight)
        np.testing.assert_array_equal(grad, np.ones(4))

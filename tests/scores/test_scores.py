"""Scores: magnitudes, and random draws that belong to a leaf alone."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import nnx

from sparsejax import scores


class MagnitudeTest(parameterized.TestCase):
    @parameterized.product(dtype=[jnp.float32, jnp.bfloat16, jnp.float16])
    def test_absolute_value(self, dtype):
        weights = np.array([-2.0, -0.0, 0.0, 1.5, -np.inf, np.nan], np.float32)
        got = scores.magnitude({"a": jnp.asarray(weights, dtype), "b": None})
        self.assertIsNone(got["b"])
        self.assertEqual(got["a"].dtype, dtype)
        np.testing.assert_array_equal(np.asarray(got["a"], np.float32), abs(weights))
        self.assertFalse(np.signbit(np.asarray(got["a"], np.float32)[:5]).any())


class RandomTest(parameterized.TestCase):
    def test_uniform(self):
        draws = np.asarray(scores.random(jnp.ones((100, 100)), key=jax.random.key(3)))
        self.assertEqual(draws.dtype, np.float32)
        self.assertTrue(((draws >= 0) & (draws < 1)).all())
        # five standard errors
        self.assertLess(abs(draws.mean() - 0.5), 5 * 12**-0.5 / 100)

    def test_a_leaf_does_not_depend_on_the_others(self):
        key = jax.random.key(0)
        alone = scores.random({"b": jnp.ones((4, 4))}, key=key)
        among = scores.random(
            {"a": jnp.ones(3), "b": jnp.ones((4, 4)), "c": {"b": jnp.ones((4, 4))}},
            key=key,
        )
        np.testing.assert_array_equal(alone["b"], among["b"])
        self.assertFalse((among["b"] == among["c"]["b"]).any())

    def test_dict_and_state_agree(self):
        key = jax.random.key(1)
        state = nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
        from_state = jax.tree.leaves(scores.random(state, key=key))
        plain = {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2))}
        from_dict = jax.tree.leaves(scores.random(plain, key=key))
        for a, b in zip(from_state, from_dict, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_keys_matter_and_repeat(self):
        params = {"a": jnp.ones((4, 4)), "b": None}
        first, again, other = (
            scores.random(params, key=jax.random.key(seed)) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first["a"], again["a"])
        self.assertFalse((first["a"] == other["a"]).any())
        self.assertIsNone(first["b"])

    def test_only_shapes_are_read(self):
        shapes = {"a": jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)}
        got = scores.random(shapes, key=jax.random.key(0))
        want = scores.random({"a": jnp.zeros((4, 4))}, key=jax.random.key(0))
        np.testing.assert_array_equal(got["a"], want["a"])

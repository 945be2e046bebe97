"""map_masked and apply_masks: None passes, leaves align by order."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import nnx

from sparsejax import masks

PARAMS = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0]), "c": None}
MASKS = {"a": jnp.array([True, False]), "b": None, "c": None}


class TreesTest(parameterized.TestCase):
    def test_map_masked(self):
        seen = []

        def fn(mask, leaf, other):
            seen.append((mask.shape, leaf.shape, other))
            return other

        got = masks.map_masked(fn, MASKS, PARAMS, {"a": 7, "b": 8, "c": 9})
        self.assertEqual(seen, [((2,), (2,), 7)])
        self.assertEqual(got["a"], 7)
        self.assertIs(got["b"], PARAMS["b"])
        self.assertIsNone(got["c"])

    def test_node_types_may_differ(self):
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        state = nnx.state(model, nnx.Param)
        mask = jnp.array([[True, False], [False, True]])
        got = masks.apply_masks(state, {"bias": None, "kernel": mask})
        self.assertEqual(jax.tree.structure(got), jax.tree.structure(state))
        want = np.where(mask, model.kernel[...], 0)
        np.testing.assert_array_equal(jax.tree.leaves(got)[1], want)

    @parameterized.parameters(jnp.float32, jnp.bfloat16, jnp.float16)
    def test_pruned_weights_are_exact_zeros(self, dtype):
        weights = jnp.array([jnp.nan, jnp.inf, -2.0, -3.0], dtype)
        mask = jnp.array([False, False, False, True])
        got = jax.jit(masks.apply_masks)({"a": weights}, {"a": mask})["a"]
        self.assertEqual(got.dtype, dtype)
        got = np.asarray(got, np.float32)
        np.testing.assert_array_equal(got, [0, 0, 0, -3])
        np.testing.assert_array_equal(np.signbit(got[:3]), False)

    def test_gradient_is_masked(self):
        loss = lambda p: sum(jax.tree.leaves(jax.tree.map(jnp.sum, p)))  # noqa: E731
        grads = jax.grad(lambda p: loss(masks.apply_masks(p, MASKS)))(PARAMS)
        np.testing.assert_array_equal(grads["a"], [1, 0])
        np.testing.assert_array_equal(grads["b"], [1])

    @parameterized.parameters(
        (jnp.ones(3, bool), ValueError, r"got \(3,\) for shape \(2, 3, 4\) at \['a'\]"),
        (jnp.ones((1, 4), bool), ValueError, r"got \(1, 4\) for shape \(2, 3, 4\)"),
        (jnp.ones((5, 2, 3, 4), bool), ValueError, "must have the shape of its leaf"),
        (jnp.ones((2, 3, 4)), TypeError, r"must be bool.*got float32 at \['a'\]"),
    )
    def test_a_mask_that_does_not_fit(self, mask, error, match):
        with self.assertRaisesRegex(error, match):
            masks.apply_masks({"a": jnp.ones((2, 3, 4))}, {"a": mask})

    def test_axes_in_front(self):
        mask = jnp.arange(12).reshape(3, 4) < 5
        got = masks.apply_masks({"a": jnp.ones((2, 3, 4))}, {"a": mask})["a"]
        np.testing.assert_array_equal(got, np.stack([mask, mask]))

    def test_different_numbers_of_leaves(self):
        with self.assertRaisesRegex(
            ValueError, "masks with 3 leaves for a tree with 2"
        ):
            masks.apply_masks({"a": jnp.ones(2), "b": jnp.ones(1)}, MASKS)
        with self.assertRaisesRegex(
            ValueError, "masks with 3 leaves for a tree with 1"
        ):
            masks.map_masked(lambda m, a, b: a, MASKS, PARAMS, {"a": jnp.ones(2)})


def test_a_leaf_that_is_not_there_stays_so():
    params = {"a": None, "b": jnp.ones(2)}
    got = masks.apply_masks(params, dict.fromkeys("ab", jnp.array([True, False])))
    assert got["a"] is None
    np.testing.assert_array_equal(got["b"], [1, 0])

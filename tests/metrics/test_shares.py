"""mask_sparsity and leaf_metrics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sparsejax import metrics

MASKS = {
    "a": {"kernel": jnp.array([[True, False], [True, True]]), "bias": None},
    "b": {"kernel": jnp.array([[False, False]])},
}
WEIGHTS = {
    "a": {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]]), "bias": jnp.ones(2)},
    "b": {"kernel": jnp.zeros((1, 2))},
}


class MaskSparsityTest(parameterized.TestCase):
    def test_counts_weights_not_leaves(self):
        share = jax.jit(chex.assert_max_traces(metrics.mask_sparsity, n=1))
        self.assertEqual(float(share(MASKS)), 0.5)  # the mean over leaves is 0.625
        self.assertEqual(float(share(jax.tree.map(jnp.logical_not, MASKS))), 0.5)

    @parameterized.parameters(({},), ({"a": None},), ({"a": np.ones((0, 2), bool)},))
    def test_nothing_governed_is_dense(self, masks):
        self.assertEqual(float(metrics.mask_sparsity(masks)), 0)

    def test_more_weights_than_int32_counts(self):
        leaf = jax.ShapeDtypeStruct((2**30,), jnp.bool_)
        share = jax.eval_shape(metrics.mask_sparsity, [leaf, leaf])
        self.assertEqual(share.dtype, jnp.float32)


class LeafMetricsTest(parameterized.TestCase):
    def test_counts_by_leaf(self):
        found = metrics.leaf_metrics(MASKS, WEIGHTS)
        self.assertEqual(list(found), ["a.kernel", "b.kernel"])
        self.assertEqual(found["a.kernel"].sparsity, 0.25)
        self.assertAlmostEqual(found["a.kernel"].pruned_magnitude, 0.2, delta=1e-6)
        self.assertEqual(found["b.kernel"], (1, 0))
        self.assertEqual(metrics.leaf_metrics({}, WEIGHTS), {})

    def test_what_is_not_governed_may_be_no_array(self):
        masks = {"a": jnp.array([True, False]), "f": None}
        found = metrics.leaf_metrics(masks, {"a": jnp.ones(2), "f": "relu"})
        self.assertEqual(found, {"a": (0.5, 0.5)})

    def test_what_does_not_align(self):
        mask = jnp.array([True, False])
        with self.assertRaisesRegex(ValueError, r"\(2,\) for shape \(1,\) at .*'a'"):
            metrics.leaf_metrics({"a": mask}, {"a": jnp.ones(1)})
        with self.assertRaisesRegex(ValueError, "masks must mirror the params"):
            metrics.leaf_metrics({"a": mask}, {"a": jnp.ones(2), "b": jnp.ones(2)})

    @parameterized.parameters(jnp.float16, jnp.bfloat16)
    def test_of_narrow_weights(self, dtype):
        """2**16 is beyond float16, and bfloat16 has steps of 512 there."""
        weights = {"kernel": jnp.full(2**16, 1, dtype)}
        masks = {"kernel": jnp.arange(2**16) >= 12345}
        pruned = metrics.leaf_metrics(masks, weights)["kernel"].pruned_magnitude
        self.assertAlmostEqual(pruned, 12345 / 2**16, delta=1e-6)

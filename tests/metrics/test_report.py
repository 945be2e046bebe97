"""sparsity_report: exact counts, both totals, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized
from flax import nnx

from sparsejax import metrics, transforms

PARAMS = {
    "bias": jnp.zeros(5),
    "embed": {"embedding": jnp.ones((9, 4))},
    "kernel": jnp.ones((4, 5)),
    "stack": {"kernel": jnp.ones((2, 4, 3))},
}
MASKS = {
    "bias": None,
    "embed": {"embedding": None},
    "kernel": jnp.arange(20).reshape(4, 5) < 5,
    "stack": {"kernel": jnp.arange(24).reshape(2, 4, 3) % 2 == 0},
}


class ReportTest(parameterized.TestCase):
    def test_masks_alone(self):
        report = metrics.sparsity_report(MASKS)
        rows = [
            (x.name, x.shape, x.size, x.num_kept, x.sparsity) for x in report.leaves
        ]
        want = [
            ("['kernel']", (4, 5), 20, 5, 0.75),
            ("['stack']['kernel']", (2, 4, 3), 24, 12, 0.5),
        ]
        self.assertEqual(rows, want)
        self.assertEqual((report.size, report.num_kept), (44, 17))
        self.assertEqual(report.sparsity, 27 / 44)  # not the mean over leaves
        self.assertEqual(report.densities, (0.25, 0.5))
        self.assertIsNone(report.sparsity_all)
        for value in (report.size, report.num_kept, report.leaves[0].num_kept):
            self.assertIs(type(value), int)

    def test_with_params(self):
        report = metrics.sparsity_report(MASKS, params=PARAMS)
        self.assertEqual(report.leaves, metrics.sparsity_report(MASKS).leaves)
        names = [leaf.name for leaf in report.excluded]
        self.assertEqual(names, ["['bias']", "['embed']['embedding']"])
        # excluded leaves are dense: their zeros are values
        self.assertEqual([leaf.num_kept for leaf in report.excluded], [5, 36])
        self.assertEqual(report.sparsity_all, 27 / 85)

    def test_params_of_other_nodes_and_without_arrays(self):
        want = metrics.sparsity_report(MASKS, params=PARAMS)
        shapes = jax.eval_shape(lambda: PARAMS)
        self.assertEqual(metrics.sparsity_report(MASKS, params=shapes), want)
        state = nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
        masks = {"bias": None, "kernel": jnp.zeros((4, 2), bool)}
        report = metrics.sparsity_report(masks, params=state)
        self.assertEqual((report.sparsity, report.sparsity_all), (1.0, 0.8))

    def test_params_alone(self):
        params = dict(PARAMS, kernel=jnp.where(MASKS["kernel"], 1.0, 0.0))
        report = metrics.sparsity_report(params)
        self.assertEqual([leaf.num_kept for leaf in report.leaves], [5, 24])
        self.assertEqual(report.sparsity, 15 / 44)
        self.assertEqual(report.sparsity_all, 15 / 85)
        state = nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
        self.assertEqual(metrics.sparsity_report(state).sparsity_all, 0)

    def test_a_live_weight_may_be_zero(self):
        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        self.assertEqual(
            metrics.sparsity_report(MASKS, params=zeros),
            metrics.sparsity_report(MASKS, params=PARAMS),
        )

    def test_numpy_masks(self):
        masks = jax.tree.map(np.asarray, MASKS)
        self.assertEqual(metrics.sparsity_report(masks), metrics.sparsity_report(MASKS))

    @parameterized.parameters((0,), (0, 3), (3, 0), ())
    def test_odd_shapes(self, *shape):
        masks = {"a": jnp.ones(shape, bool), "b": jnp.array([True, False])}
        report = metrics.sparsity_report(masks)
        self.assertEqual(report.leaves[0].sparsity, 0)
        self.assertEqual(report.num_kept, np.prod(shape, dtype=int) + 1)

    def test_a_whole_equals_its_parts(self):
        whole = metrics.sparsity_report({"a": MASKS, "b": MASKS["kernel"]})
        parts = [metrics.sparsity_report(m) for m in (MASKS, MASKS["kernel"])]
        for attribute in ("size", "num_kept"):
            total = sum(getattr(part, attribute) for part in parts)
            self.assertEqual(getattr(whole, attribute), total)

    def test_densities_give_flops(self):
        report = metrics.sparsity_report(MASKS, params=PARAMS)
        specs = metrics.kernel_specs(PARAMS, positions=7)
        self.assertEqual(metrics.forward_flops(specs), 2 * 44 * 7)
        self.assertEqual(metrics.forward_flops(specs, report.densities), 2 * 17 * 7)

    def test_table(self):
        report = metrics.sparsity_report(MASKS, params=PARAMS)
        want = """\
leaf                 shape      size  kept  sparsity
['kernel']           (4, 5)       20     5    0.7500
['stack']['kernel']  (2, 4, 3)    24    12    0.5000
----------------------------------------------------
governed                          44    17    0.6136
excluded                          41    41    0.0000
all params                        85    58    0.3176"""
        self.assertEqual(str(report), want)
        self.assertNotIn("all params", str(metrics.sparsity_report(MASKS)))

    def test_errors(self):
        with self.assertRaisesRegex(
            ValueError, r"\(4, 5\) for shape \(5, 4\) at \['kernel"
        ):
            metrics.sparsity_report(MASKS, params=dict(PARAMS, kernel=jnp.ones((5, 4))))
        with self.assertRaisesRegex(ValueError, "`masks` must be"):
            metrics.sparsity_report(MASKS, params=dict(PARAMS, extra=jnp.ones(2)))
        with self.assertRaisesRegex(ValueError, "none of 1 is. Pass masks"):
            metrics.sparsity_report({"a": None})
        with self.assertRaisesRegex(ValueError, "be governed by default; none of 1 is"):
            metrics.sparsity_report({"bias": jnp.ones(3)})
        tx = transforms.static_sparse(optax.adam(0.1), 0.5, key=jax.random.key(0))
        with self.assertRaisesRegex(TypeError, "Pass `sj.masks_of"):
            metrics.sparsity_report(optax.chain(tx).init({"kernel": jnp.ones((4, 4))}))
        with self.assertRaisesRegex(TypeError, "Pass the masks first"):
            metrics.sparsity_report(PARAMS, params=PARAMS)
        for tree in (PARAMS, MASKS):
            with self.assertRaisesRegex(TypeError, "must have values; got Shape.* at "):
                metrics.sparsity_report(jax.eval_shape(lambda tree=tree: tree))
            with self.assertRaisesRegex(TypeError, "got .*Tracer at .* outside of jit"):
                jax.jit(metrics.sparsity_report)(tree)
        with self.assertRaisesRegex(TypeError, r"must be arrays; .* at \['act'\]"):
            metrics.sparsity_report(dict(PARAMS, act=jax.nn.relu))

"""FLOPs: the costs of Evci et al., 2020, and what must hold for any model."""

import math

import jax
import jax.numpy as jnp
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import metrics

SPECS = [
    metrics.LayerSpec.from_kernel("a", (4, 8), positions=10),
    metrics.LayerSpec.from_kernel("b", (3, 3, 8, 2), positions=25),
    metrics.LayerSpec.attention(
        "c", num_heads=2, head_dim=4, num_queries=5, num_keys=7
    ),
]
DENSE = 2 * (32 * 10 + 144 * 25 + 2 * 2 * 4 * 5 * 7)
COSTS = [metrics.sparse_cost, metrics.dense_gradient_cost, metrics.rigl_cost(10)]


class TableTest(parameterized.TestCase):
    """Each cost by hand."""

    def test_forward(self):
        self.assertEqual(metrics.forward_flops(SPECS), DENSE)
        self.assertEqual(metrics.forward_flops(SPECS, [1, 1, 1]), DENSE)
        got = metrics.forward_flops(SPECS, [0.5, 0.25, 0.0])
        self.assertEqual(got, 2 * (16 * 10 + 36 * 25))

    def test_rows(self):
        sparse, dense = 0.2, 1.0
        self.assertAlmostEqual(metrics.sparse_cost(sparse, dense), 0.6)
        self.assertAlmostEqual(metrics.dense_gradient_cost(sparse, dense), 1.4)
        want = (3 * sparse * 100 + 2 * sparse + dense) / 101
        self.assertAlmostEqual(metrics.rigl_cost(100)(sparse, dense), want)

    @parameterized.product(cost=COSTS)
    def test_dense_training_under_any_cost(self, cost):
        got = metrics.training_flops(SPECS, [1.0] * 3, cost=cost)
        self.assertAlmostEqual(got, 3 * DENSE)
        self.assertAlmostEqual(metrics.training_flops(SPECS, cost=cost), 3 * DENSE)

    def test_rare_updates_cost_like_static_masks(self):
        densities = [0.1, 0.2, 0.3]
        rare = metrics.training_flops(SPECS, densities, cost=metrics.rigl_cost(10**9))
        self.assertAlmostEqual(rare / metrics.training_flops(SPECS, densities), 1)

    @parameterized.product(cost=COSTS)
    def test_gradual_is_the_mean_over_steps(self, cost):
        steps = [[1.0] * 3, [0.5, 0.4, 1.0], [0.1, 0.2, 1.0]]
        got = metrics.gradual_training_flops(SPECS, iter(steps), cost=cost)
        sizes = 2 * 32 * 10, 2 * 144 * 25, 2 * 2 * 2 * 4 * 5 * 7
        each = [
            cost(sum(d * size for d, size in zip(s, sizes, strict=True)), DENSE)
            for s in steps
        ]
        self.assertAlmostEqual(got, sum(each) / 3)
        # linear in the densities, so the mean density gives the same
        mean = [sum(column) / 3 for column in zip(*steps, strict=True)]
        self.assertAlmostEqual(got, metrics.training_flops(SPECS, mean, cost=cost))


@given(densities=st.lists(st.floats(0, 1), min_size=3, max_size=3), i=st.integers(0, 2))
def test_monotone_in_each_density(densities, i):
    more = [*densities]
    more[i] = (1 + more[i]) / 2
    for cost in COSTS:
        less_flops = metrics.training_flops(SPECS, densities, cost=cost)
        assert less_flops <= metrics.training_flops(SPECS, more, cost=cost)
        assert less_flops <= 3 * DENSE * (1 + 1e-12)


class SpecsTest(parameterized.TestCase):
    def test_kernels_of_a_decoder(self):
        params = {
            "embed": {"embedding": jnp.ones((256, 16))},
            "blocks": {
                "up": {"kernel": jnp.ones((3, 16, 64))},
                "scale": jnp.ones((3, 16)),
            },
            "head": {"kernel": jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)},
        }
        specs = metrics.kernel_specs(params, positions=128)
        self.assertEqual(
            [(spec.num_weights, spec.macs) for spec in specs],
            [(3 * 16 * 64, 3 * 16 * 64 * 128), (16 * 256, 16 * 256 * 128)],
        )
        self.assertEqual(specs[1].name, "['head']['kernel']")
        tied = metrics.kernel_specs(params, positions=1, where=lambda p, x: x.ndim > 1)
        self.assertEqual(tied[-2].num_weights, 256 * 16)

    def test_against_xla(self):
        # XLA counts the same multiply-adds of a plain stack of products
        def forward(params, x):
            for kernel in params:
                x = x @ kernel
            return x

        params = [jnp.ones((32, 64)), jnp.ones((64, 16))]
        cost = (
            jax.jit(forward).lower(params, jnp.ones((8, 32))).compile().cost_analysis()
        )
        specs = metrics.kernel_specs(params, positions=8)
        self.assertEqual(metrics.forward_flops(specs), cost["flops"])

    def test_densities_may_be_jax_scalars(self):
        got = metrics.forward_flops(SPECS, [jnp.float32(0.5)] * 3)
        self.assertEqual(got, DENSE / 2)

    @parameterized.parameters(
        ([0.5], "one entry for each of the 3 layers; got 1"),
        ([0.5, 1.5, 0.5], r"in \[0, 1\]; got 1.5 at b"),
        ([0.5, 0.5, math.nan], r"got nan at c"),
    )
    def test_densities_that_do_not_fit(self, densities, match):
        with self.assertRaisesRegex(ValueError, match):
            metrics.forward_flops(SPECS, densities)

    def test_errors(self):
        with self.assertRaisesRegex(
            ValueError, "`update_every` must be at least 1; got 0"
        ):
            metrics.rigl_cost(0)
        with self.assertRaisesRegex(ValueError, "at least one step"):
            metrics.gradual_training_flops(SPECS, [])
        with self.assertRaisesRegex(ValueError, "at least one leaf"):
            metrics.kernel_specs({"bias": jnp.ones(3)}, positions=1)

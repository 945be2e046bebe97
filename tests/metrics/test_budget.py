"""The search for a perplexity budget (Luo et al., 2024)."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import metrics

pytestmark = pytest.mark.once


class SearchTest(parameterized.TestCase):
    @parameterized.product(budget=[0.01, 0.05, 0.1], power=[1, 2, 5])
    def test_analytic_loss(self, budget, power):
        found = metrics.perplexity_budget_search(3.0, lambda c: 3 + c**power, budget)
        want = math.log(1 + budget) ** (1 / power)  # exp(c**power) = 1 + budget
        self.assertBetween(found.cett, want - 1e-6, want)
        self.assertBetween(found.ratio, 1 + budget - 1e-3, 1 + budget)
        self.assertAlmostEqual(found.ratio, math.exp(found.cett**power), places=12)
        self.assertEqual(found.evaluations, 20)  # 2**-20 < 1e-6

    def test_checkpoints_are_averaged_as_ratios(self):
        dense, slopes = [2.0, 3.0, 1.0], [0.1, 1.0, 2.0]
        fns = [
            lambda c, d=d, s=s: d + s * c for d, s in zip(dense, slopes, strict=True)
        ]
        found = metrics.perplexity_budget_search(dense, fns, 0.2, tolerance=1e-4)
        losses = jnp.array(dense)  # 2, 3 and 1 exactly
        again = metrics.perplexity_budget_search(losses, fns, 0.2, tolerance=1e-4)
        self.assertEqual(again, found)
        grid = np.linspace(0, 1, 100_001)
        ratios = np.mean([np.exp(s * grid) for s in slopes], axis=0)
        want = grid[ratios < 1.2][-1]
        self.assertAlmostEqual(found.cett, want, delta=1.2e-4)
        self.assertAlmostEqual(found.ratio, 1.2, delta=1e-3)
        self.assertEqual(found.evaluations, 14)

    def test_ends(self):
        everything = metrics.perplexity_budget_search(2.0, lambda c: 2.0)
        self.assertBetween(everything.cett, 1 - 1e-6, 1)
        self.assertEqual(everything.ratio, 1)
        nothing = metrics.perplexity_budget_search(2.0, lambda c: 2.0 + 9 * (c > 0))
        self.assertEqual(nothing, (0.0, 1.0, 21))

    @parameterized.parameters(math.nan, math.inf, 1e6)
    def test_a_broken_loss_is_beyond_the_budget(self, loss):
        found = metrics.perplexity_budget_search(
            1.0, lambda c: loss if c > 0.3 else 1.0, tolerance=1e-3
        )
        self.assertBetween(found.cett, 0.299, 0.3)

    def test_takes_jax_scalars(self):
        found = metrics.perplexity_budget_search(
            jnp.float32(2), jax.jit(lambda c: 2 + c), tolerance=1e-3
        )
        self.assertAlmostEqual(found.cett, math.log(1.01), delta=1e-3)
        self.assertIsInstance(found.ratio, float)

    def test_linear_model(self):
        # ReLU features with a linear readout of 16 classes.
        rng = np.random.default_rng(0)
        x = rng.normal(size=(400, 8)).astype(np.float32)
        up = rng.normal(size=(8, 64)).astype(np.float32)
        a = jnp.maximum(x @ up, 0)
        w_out = jnp.asarray(rng.normal(size=(64, 16)).astype(np.float32) / 16)
        labels = jnp.argmax(a @ w_out, axis=1)

        def loss(a):
            return -jnp.mean(jax.nn.log_softmax(a @ w_out)[jnp.arange(400), labels])

        def kept(c):
            threshold = metrics.cett_threshold(a, w_out, c)
            tau = metrics.cett_neuron_thresholds(threshold, w_out)
            return jnp.where(jnp.abs(a) > tau, a, 0)

        sparse_loss = jax.jit(chex.assert_max_traces(lambda c: loss(kept(c)), n=1))
        found = metrics.perplexity_budget_search(loss(a), sparse_loss)
        self.assertBetween(found.ratio, 1.01 - 1e-3, 1.01 + 1e-3)
        self.assertGreater(found.cett, 0.01)
        again = math.exp(float(loss(kept(found.cett))) - float(loss(a)))
        self.assertAlmostEqual(again, found.ratio, delta=1e-5)
        counts = metrics.activation_counts(kept(found.cett))
        self.assertLess(float(counts.density), float(jnp.mean(a != 0)))

    def test_errors(self):
        def same(c):
            return 1.0

        search = metrics.perplexity_budget_search
        for budget in (0.0, -0.1, math.nan):
            with self.assertRaisesRegex(ValueError, f"positive; got {budget}"):
                search(1.0, same, budget)
        for tolerance in (0.0, 1.0, math.nan):
            with self.assertRaisesRegex(ValueError, rf"\(0, 1\); got {tolerance}"):
                search(1.0, same, tolerance=tolerance)
        with self.assertRaisesRegex(ValueError, "got 2 and 1"):
            search([1.0, 2.0], same)
        with self.assertRaisesRegex(ValueError, "got 0 and 0"):
            search([], [])
        with self.assertRaisesRegex(ValueError, r"finite; got \[nan\]"):
            search(math.nan, same)
        with self.assertRaisesRegex(ValueError, r"at CETT 0.*1.01.*got 2.718.*same"):
            search(0.0, same)

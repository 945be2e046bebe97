"""The fitted laws on curves of the constants that Luo et al., 2024, publish."""

import math

import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import metrics
from sparsejax.metrics import ReluLaw, SiluLaw

pytestmark = pytest.mark.once

RELU = {
    "0.1B": ReluLaw(0.101, -0.0151, 3.20, 0.0614),
    "0.2B": ReluLaw(0.449, -3.05, 0.286, 0.0674),
    "0.4B": ReluLaw(0.683, -3.46, 0.0790, 0.0690),
    "0.8B": ReluLaw(1.01, -3.49, 7.97e-3, 0.0721),
    "1.2B": ReluLaw(1.33, -3.89, 9.03e-4, 0.0782),
    "2.4B": ReluLaw(1.53, -3.46, 1.56e-4, 0.0648),
}
SILU = {
    "0.1B": SiluLaw(0.479, 0.102, 0.409),
    "0.2B": SiluLaw(0.844, 0.208, 0.390),
    "0.4B": SiluLaw(1.03, 0.420, 0.385),
    "0.8B": SiluLaw(0.995, 0.562, 0.383),
    "1.2B": SiluLaw(0.967, 0.538, 0.382),
}
TOKENS = np.linspace(5, 800, 80)  # billions
# The curves of 0.1B are not flat at the end: under noise their limit takes more points.
MANY = np.linspace(5, 800, 400)


class LawsTest(parameterized.TestCase):
    def test_golden(self):  # exp(-1.56e-4 * 400**1.53 - 3.46) + 0.0648
        got = metrics.relu_law(RELU["2.4B"], [400, 800])
        np.testing.assert_allclose(got, [0.0719, 0.0652], atol=5e-5)
        self.assertAlmostEqual(1 - RELU["2.4B"].limit, 0.9352)

    @parameterized.product(size=list(RELU))
    def test_relu_curve(self, size):
        law = RELU[size]
        curve = metrics.relu_law(law, TOKENS)
        want = [
            math.exp(-law.c * tokens**law.alpha + law.b) + law.limit
            for tokens in TOKENS
        ]
        np.testing.assert_allclose(curve, want, rtol=1e-12)
        self.assertTrue(np.all(np.diff(curve) < 0))  # falls
        fitted = metrics.fit_relu_law(TOKENS, curve)
        np.testing.assert_allclose(
            metrics.relu_law(fitted, TOKENS), curve, rtol=0, atol=2e-6
        )
        self.assertAlmostEqual(fitted.limit, law.limit, delta=3e-4)

    @parameterized.product(size=list(SILU))
    def test_silu_curve(self, size):
        law = SILU[size]
        curve = metrics.silu_law(law, TOKENS)
        want = [-law.c / tokens**law.alpha + law.limit for tokens in TOKENS]
        np.testing.assert_allclose(curve, want, rtol=1e-12)
        self.assertTrue(np.all(np.diff(curve) > 0))  # rises
        fitted = metrics.fit_silu_law(TOKENS, curve)
        np.testing.assert_allclose(fitted, law, rtol=1e-4)

    @parameterized.product(size=list(RELU), seed=[0, 1])
    def test_relu_limit_under_noise(self, size, seed):
        law = RELU[size]
        noise = 1 + 0.01 * np.random.default_rng(seed).normal(size=MANY.shape)
        fitted = metrics.fit_relu_law(MANY, metrics.relu_law(law, MANY) * noise)
        self.assertAlmostEqual(fitted.limit, law.limit, delta=0.003)

    @parameterized.product(size=list(SILU), seed=[0, 1])
    def test_silu_limit_under_noise(self, size, seed):
        law = SILU[size]
        noise = 1 + 0.01 * np.random.default_rng(seed).normal(size=MANY.shape)
        fitted = metrics.fit_silu_law(MANY, metrics.silu_law(law, MANY) * noise)
        self.assertAlmostEqual(fitted.limit, law.limit, delta=0.003)

    def test_unit_of_tokens(self):
        law, scale = RELU["2.4B"], 1e9
        fitted = metrics.fit_relu_law(TOKENS * scale, metrics.relu_law(law, TOKENS))
        self.assertAlmostEqual(fitted.limit, law.limit, delta=1e-5)
        self.assertAlmostEqual(fitted.c * scale**fitted.alpha / law.c, 1, delta=1e-3)
        silu = SILU["0.4B"]
        fitted = metrics.fit_silu_law(TOKENS * scale, metrics.silu_law(silu, TOKENS))
        self.assertAlmostEqual(fitted.c / scale**fitted.alpha / silu.c, 1, delta=1e-3)

    def test_flat_curve(self):
        flat = np.full(10, 0.2)
        for fit, law in (
            (metrics.fit_relu_law, metrics.relu_law),
            (metrics.fit_silu_law, metrics.silu_law),
        ):
            got = law(fit(TOKENS[:10], flat), TOKENS[:10])
            np.testing.assert_allclose(got, flat, atol=1e-3)

    @parameterized.parameters((metrics.fit_relu_law, 4), (metrics.fit_silu_law, 3))
    def test_errors(self, fit, least):
        tokens, ratios = np.arange(1.0, 6), np.full(5, 0.2)
        with self.assertRaisesRegex(ValueError, rf"least {least}; got shapes \(2,\)"):
            fit(tokens[:2], ratios[:2])
        with self.assertRaisesRegex(ValueError, r"shapes \(5,\) and \(4,\)"):
            fit(tokens, ratios[:4])
        with self.assertRaisesRegex(ValueError, "positive and finite; got 0.0"):
            fit(tokens - 1, ratios)
        with self.assertRaisesRegex(ValueError, "from 20.0 to 20.0. Divide"):
            fit(tokens, ratios * 100)
        with self.assertRaisesRegex(ValueError, "from nan to nan"):
            fit(tokens, ratios * np.nan)

"""The picture of densities shows the numbers that it was given."""

import io
import sys
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import metrics

pytestmark = pytest.mark.once

STEPS = [0, 10, 40]
DENSITIES = np.array([[0.5, 0.5], [0.25, 0.0], [0.125, 0.01]])


class PlotDensityTest(parameterized.TestCase):
    @parameterized.product(log=[False, True])
    def test_lines(self, log):
        figure = metrics.plot_density(STEPS, DENSITIES, names=["in", "out"], log=log)
        (axes,) = figure.axes
        lines = axes.get_lines()
        want = [*DENSITIES.T, DENSITIES.mean(axis=1)]
        self.assertLen(lines, 3)
        for line, values in zip(lines, want, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), STEPS)
            np.testing.assert_array_equal(line.get_ydata(), values)
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        self.assertEqual(labels, ["in", "out", "mean of layers"])
        self.assertEqual(axes.get_xlabel(), "training step")
        self.assertEqual(axes.get_yscale(), "log" if log else "linear")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=50)
        self.assertTrue(png.getvalue().startswith(b"\x89PNG"))

    def test_one_layer_has_no_mean(self):
        figure = metrics.plot_density(STEPS, DENSITIES[:, :1], title="ffn")
        self.assertLen(figure.axes[0].get_lines(), 1)
        self.assertEqual(figure.axes[0].get_title(), "ffn")

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, r"got \(2, 3\) for steps of shape"):
            metrics.plot_density(STEPS, DENSITIES.T)
        with self.assertRaisesRegex(ValueError, r"\[0, 1\]; got values from 1.0 to 50"):
            metrics.plot_density(STEPS, DENSITIES * 100 + (DENSITIES == 0))
        with self.assertRaisesRegex(ValueError, "each of the 2 layers; got 1"):
            metrics.plot_density(STEPS, DENSITIES, names=["in"])
        gone = mock.patch.dict(sys.modules, {"matplotlib.figure": None})
        with gone, self.assertRaisesRegex(ModuleNotFoundError, r"sparsejax\[metrics\]"):
            metrics.plot_density(STEPS, DENSITIES)

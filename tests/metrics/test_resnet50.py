"""ResNet-50 v1.5 at 224 x 224: FLOPs recomputed, and those that RigL published."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sparsejax import allocation, metrics


def layers():
    """Kernel shape `[height, width, in, out]` and output positions of each layer."""
    found = [((7, 7, 3, 64), 112**2)]
    d_in = 64
    for stage, num_blocks in enumerate((3, 4, 6, 3)):
        width, size = 64 * 2**stage, 56 // 2**stage
        for block in range(num_blocks):
            # v1.5: the 3 x 3 convolution has the stride, the first 1 x 1 has not
            before = 2 * size if block == 0 and stage > 0 else size
            found.append(((1, 1, d_in, width), before**2))
            found.append(((3, 3, width, width), size**2))
            found.append(((1, 1, width, 4 * width), size**2))
            if block == 0:
                found.append(((1, 1, d_in, 4 * width), size**2))
            d_in = 4 * width
    return [*found, ((2048, 1000), 1)]


LAYERS = layers()
SPECS = [
    metrics.LayerSpec.from_kernel(str(i), shape, positions=positions)
    for i, (shape, positions) in enumerate(LAYERS)
]
KERNELS = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in LAYERS]


def densities(allocate, sparsity, *, first_dense):
    where = [i > 0 or not first_dense for i in range(len(KERNELS))]
    tree = allocate(KERNELS, sparsity, where=where)
    return [1.0 if s is None else 1 - s for s in tree]


def relative(*args, cost=None, **kwargs):
    found = densities(*args, **kwargs)
    if cost is None:
        return metrics.forward_flops(SPECS, found) / metrics.forward_flops(SPECS)
    sparse = metrics.training_flops(SPECS, found, cost=cost)
    return sparse / metrics.training_flops(SPECS)


class ResNet50Test(parameterized.TestCase):
    def test_dense(self):
        self.assertLen(SPECS, 54)
        self.assertEqual(sum(spec.num_weights for spec in SPECS), 25_502_912)
        macs = sum(spec.macs for spec in SPECS)
        self.assertAlmostEqual(macs, 4.089e9, delta=5e5)
        self.assertEqual(metrics.forward_flops(SPECS), 2 * macs)
        self.assertEqual(metrics.training_flops(SPECS), 6 * macs)

    @parameterized.parameters(
        (0.8, 0.4138, 0.42),
        (0.9, 0.2418, 0.24),
        (0.95, 0.1217, 0.12),
        (0.965, 0.0852, 0.09),
    )
    def test_erk(self, sparsity, want, published):
        got = relative(allocation.erdos_renyi_kernel, sparsity, first_dense=False)
        self.assertAlmostEqual(got, want, delta=0.002)
        self.assertAlmostEqual(got, published, delta=0.01)

    def test_erk_with_a_dense_first_layer(self):
        got = relative(allocation.erdos_renyi_kernel, 0.99, first_dense=True)
        self.assertAlmostEqual(got, 0.0512, delta=0.002)

    @parameterized.parameters(
        (0.8, 0.2231, 0.23),
        (0.9, 0.1260, 0.13),
        (0.95, 0.0774, 0.08),
        (0.965, 0.0628, 0.07),
    )
    def test_uniform_with_a_dense_first_layer(self, sparsity, want, published):
        got = relative(allocation.uniform, sparsity, first_dense=True)
        self.assertAlmostEqual(got, want, delta=0.002)
        self.assertAlmostEqual(got, published, delta=0.01)

    @parameterized.parameters((0.8, 0.4157, 0.609), (0.9, 0.2443, 0.495))
    def test_training(self, sparsity, rigl, dense_gradient):
        allocate = allocation.erdos_renyi_kernel
        for cost, want in (
            (metrics.rigl_cost(100), rigl),
            (metrics.dense_gradient_cost, dense_gradient),
        ):
            got = relative(allocate, sparsity, first_dense=False, cost=cost)
            self.assertAlmostEqual(got, want, delta=5.1e-4)

    @parameterized.parameters((0.8, 8), (0.9, 1), (0.95, 0))
    def test_layers_that_erk_forces_dense(self, sparsity, want):
        found = densities(allocation.erdos_renyi_kernel, sparsity, first_dense=False)
        self.assertEqual(sum(density == 1 for density in found), want)
        sizes = np.array([spec.num_weights for spec in SPECS])
        self.assertAlmostEqual(
            float(sizes @ np.array(found)) / sizes.sum(), 1 - sparsity, delta=1e-9
        )

"""Which implementation `None` takes, on the devices that are visible."""

import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax import ops
from sparsejax.ops import _platform


def visible(platform, capability=None, count=1):
    """Makes JAX say that it has these devices."""
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    return mock.patch.object(jax, "devices", lambda: [device] * count)


class PlatformTest(parameterized.TestCase):
    @parameterized.parameters(
        ("gpu", "9.0", {"mosaic_gpu"}),
        ("gpu", "8.0", set()),
        ("gpu", "10.0", set()),
        ("tpu", None, {"pallas_tpu"}),
        ("cpu", None, set()),
    )
    def test_visible_kernels(self, platform, capability, want):
        with visible(platform, capability):
            self.assertEqual(_platform.visible_kernels(), want)

    def test_several_devices_need_shard_map(self):
        seen = []

        def local(x):
            with visible("gpu", "9.0", count=8):
                seen.append(_platform.visible_kernels())
            return x

        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        jax.jit(local)(jnp.ones(8))
        spec = dict(in_specs=P("x"), out_specs=P("x"))
        jax.jit(jax.shard_map(local, mesh=mesh, **spec))(jnp.ones(8))
        some = jax.shard_map(local, mesh=mesh, axis_names={"x"}, **spec)
        jax.jit(some)(jnp.ones(8))
        self.assertEqual(seen, [set(), {"mosaic_gpu"}, set()])

    @parameterized.parameters(
        ("gpu", "9.0", "cuda", "mosaic_gpu"), ("tpu", None, "tpu", "tpu_custom_call")
    )
    def test_none_takes_the_kernel_where_the_arrays_are(
        self, platform, capability, lowered_for, call
    ):
        x = jax.random.normal(jax.random.key(0), (16, 512))
        want = jax.jit(lambda x: ops.gaussian_topk(x, 1.0))(x)
        fn = jax.jit(lambda x: ops.gaussian_topk(x, 1.0, implementation=None))
        with visible(platform, capability):
            np.testing.assert_array_equal(fn(x), want)  # these are on a CPU
            exported = jax.export.export(fn, platforms=[lowered_for])(x)
            self.assertIn(call, exported.mlir_module())
            other = jax.export.export(
                jax.jit(lambda x: ops.gaussian_topk(x, 1.0)), platforms=["cpu"]
            )(x)
            self.assertNotIn(call, other.mlir_module())
            # what a kernel does not take, the reference does
            exported = jax.export.export(fn, platforms=[lowered_for])(x[:, :100])
            self.assertNotIn(call, exported.mlir_module())
            # few rows it does faster on a GPU
            exported = jax.export.export(fn, platforms=[lowered_for])(x[:15])
            self.assertEqual(call in exported.mlir_module(), platform == "tpu")

    def test_named_kernels(self):
        def run(implementation, kernels):
            return _platform.dispatch(
                (jnp.ones(3),), implementation, reference=jnp.sum, kernels=kernels
            )

        def kernel(reason):
            take = _platform.Kernel(jnp.prod, lambda x: reason)
            return {"pallas_tpu": lambda: take}

        self.assertEqual(run(None, kernel(None)), 3)
        self.assertEqual(run("reference", kernel(None)), 3)
        self.assertEqual(run("pallas_tpu", kernel(None)), 1)
        with self.assertRaisesRegex(NotImplementedError, "'pallas_tpu': too long. Pas"):
            run("pallas_tpu", kernel("too long"))
        with self.assertRaisesRegex(NotImplementedError, "has no such kernel"):
            run("mosaic_gpu", kernel(None))
        with self.assertRaisesRegex(ValueError, "one of reference, pallas_tpu, mosaic"):
            run("cuda", kernel(None))

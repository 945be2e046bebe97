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


def _active_ffn(**settings):
    x, indices, rows = jnp.ones((1, 4)), jnp.arange(2), jnp.ones((2, 4))
    return ops.active_ffn(x, jnp.ones((1, 2)), indices, 2, rows, rows, **settings)


def _keep_highest(**settings):
    return ops.keep_highest(jnp.ones(4), 2, **settings)


def _gaussian_topk(**settings):
    return ops.gaussian_topk(jnp.ones((2, 4)), 1.0, **settings)


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

    def test_none_holds_no_scores_for_its_derivative(self):
        """What the reference would hold is quadratic."""
        q = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)

        def pull(q):
            return jax.vjp(lambda q: ops.block_attention(q, q, q, causal=True), q)[1]

        with visible("tpu"):
            held = jax.tree.leaves(jax.eval_shape(pull, q))
        self.assertLessEqual(max(a.size for a in held), q.size)
        self.assertLess(sum(a.size for a in held), 6 * q.size)

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
        with self.assertRaisesRegex(NotImplementedError, "has no such"):
            run("mosaic_gpu", kernel(None))

    def test_other_names(self):
        def run(implementation):
            return _platform.dispatch(
                (jnp.full(3, 2.0),),
                implementation,
                reference=jnp.sum,
                others={"xla": jnp.prod},
                kernels={
                    "mosaic_gpu": lambda: _platform.Kernel(jnp.max, has_no_reason)
                },
            )

        def has_no_reason(x):
            del x

        got = [run(name) for name in (None, "reference", "xla", "mosaic_gpu")]
        self.assertEqual(got, [6, 6, 8, 2])

    @parameterized.parameters(
        (_active_ffn, ["pallas_tpu"], "reference, xla, mosaic_gpu"),
        (_keep_highest, ["xla", "pallas_tpu"], "reference, mosaic_gpu"),
        (_gaussian_topk, ["xla"], "reference, pallas_tpu, mosaic_gpu"),
    )
    def test_errors_list_what_the_operation_has(self, call, missing, names):
        with self.assertRaisesRegex(
            ValueError, f"be None or one of {names}; got 'cuda"
        ):
            call(implementation="cuda")
        for name in missing:
            with self.assertRaisesRegex(
                NotImplementedError, rf"'{name}': .*no such .* one of {names}\."
            ):
                call(implementation=name)

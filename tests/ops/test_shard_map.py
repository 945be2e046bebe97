"""Kernels run inside of `jax.shard_map`, which checks over what arrays vary."""

import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax import ops
from sparsejax.ops import _platform, _varying

SPLIT, WHOLE = P("x"), P()


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def matmul(x, w, kept):
    return ops.block_matmul(x, w, sj.BlockMask.from_blocks(kept, (128, 128)))


def attention(q, k):
    return ops.block_attention(q, k, k, causal=True)


def topk(x, up):
    return ops.gaussian_topk(x, 1.0, up, activation=jax.nn.gelu)


def weights(scores, where):
    return ops.spark_weights(scores, 1.0, where, dtype=jnp.bfloat16)


def ffn(x, gate, indices, w):
    return ops.active_ffn(x, gate, indices, 64, w, w)


# of each operation: how many operands have gradients, and all with their specs
CASES = {
    matmul: (
        2,
        (array(32, 256), SPLIT),
        (array(256, 256), WHOLE),
        (array(2, 2, dtype=jnp.bool_), WHOLE),
    ),
    attention: (2, (array(2, 256, 2, 128), SPLIT), (array(2, 256, 1, 128), SPLIT)),
    topk: (2, (array(64, 512), SPLIT), (array(64, 512), SPLIT)),
    weights: (
        1,
        (array(2, 2048, 2, 512, dtype=jnp.float32), SPLIT),
        (array(1, 2048, 512, dtype=jnp.bool_), WHOLE),
    ),
    ffn: (
        0,
        (array(4, 512), SPLIT),
        (array(4, 128), SPLIT),
        (array(128, dtype=jnp.int32), WHOLE),
        (array(1024, 512), WHOLE),
    ),
}
# kernels of the result and its gradients
KERNELS = [
    ("tpu", None, matmul, 3),
    ("tpu", None, attention, 3),
    ("tpu", None, topk, 2),
    ("gpu", "9.0", matmul, 3),
    ("gpu", "9.0", attention, 3),
    ("gpu", "9.0", topk, 2),
    ("gpu", "9.0", weights, 2),
    ("gpu", "9.0", ffn, 1),
]


class ShardMapTest(parameterized.TestCase):
    @parameterized.parameters(*KERNELS)
    def test_none_takes_kernels_where_what_varies_is_checked(
        self, platform, capability, fn, num_kernels
    ):
        gradients, *operands = CASES[fn]
        args, specs = zip(*operands, strict=True)
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=SPLIT)

        def both(*args):
            first, others = args[:gradients], args[gradients:]
            out, pull = jax.vjp(lambda *first: mapped(*first, *others), *first)
            return out, pull(out)

        kind = types.SimpleNamespace(platform=platform, compute_capability=capability)
        target, call = {
            "tpu": ("tpu", "@tpu_custom_call"),
            "gpu": ("cuda", "@mosaic_gpu_v2"),
        }[platform]
        with mock.patch.object(jax, "devices", lambda: [kind] * 2):
            lowered = jax.jit(both).trace(*args).lower(lowering_platforms=(target,))
        self.assertEqual(lowered.as_text().count(call), num_kernels)

    def test_what_does_not_vary_gets_the_sum_of_gradients(self):
        """Of a kernel that says nothing of what varies, under the rules of all."""

        @jax.custom_vjp
        def product(x, w):
            return _platform.jit_kernel(jnp.multiply)(x, w)

        product.defvjp(
            lambda x, w: (product(x, w), (x, w)),
            lambda xw, dy: (dy * xw[1], dy * xw[0]),
        )
        kernel = _platform.Kernel(product, lambda *operands: None)

        def local(x, w):
            self.assertEqual(_varying.axes_of((x, w)), ("x",))
            return _platform.dispatch(
                (x, w),
                "pallas_tpu",
                reference=jnp.multiply,
                kernels={"pallas_tpu": lambda: kernel},
            )

        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(SPLIT, WHOLE), out_specs=SPLIT
        )
        x, w = jnp.arange(6.0), jnp.array([2.0, 3.0, 4.0])
        dx, dw = jax.grad(lambda x, w: mapped(x, w).sum(), (0, 1))(x, w)
        np.testing.assert_array_equal(dx, [2, 3, 4, 2, 3, 4])
        np.testing.assert_array_equal(dw, [0 + 3, 1 + 4, 2 + 5])

"""Peaks of attention weights: against the map, the kernel, what it refuses."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax.ops import attention_peaks
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter

_kernel = importlib.import_module("sparsejax.ops.block_attention._mosaic_gpu_peaks")


def operands(length, heads, kv_heads, dim, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 2)
    return [
        jax.random.normal(key, (2, length, n, dim)).astype(dtype)
        for key, n in zip(keys, (heads, kv_heads), strict=True)
    ]


def oracle(q, k, block, scale):
    """The whole map, in float64."""
    q, k = (np.asarray(a.astype(jnp.float32), np.float64) for a in (q, k))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    starts = range(0, q.shape[1], block)
    peaks = [weights[..., i : i + block].max(-1) for i in starts]
    return np.stack(peaks, axis=2)


def test_over_the_batch_of_a_mesh():
    q, k = operands(12, 4, 2, 8)
    local = functools.partial(attention_peaks, block=4)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(mapped)(q, k), local(q, k), rtol=1e-5)


class PeaksTest(parameterized.TestCase):
    @parameterized.parameters((12, 4, 2, 5, None), (7, 1, 1, 7, 0.3), (9, 2, 1, 20, 2))
    def test_matches_the_map(self, length, heads, kv_heads, block, scale):
        q, k = operands(length, heads, kv_heads, 4)
        got = jax.jit(
            functools.partial(attention_peaks, block=block, scale=scale),
        )(q, k)
        want = oracle(q, k, block, scale or 0.5)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)

    def test_no_gradient(self):
        q, k = operands(8, 2, 1, 4)
        grad = jax.grad(lambda q: attention_peaks(q, k, block=4).sum())(q)
        np.testing.assert_array_equal(grad, 0)

    @parameterized.parameters((200, 64), (128, 128))
    @needs_gpu_interpreter
    def test_kernel_matches(self, length, block):
        q, k = operands(length, 2, 1, 64, jnp.bfloat16)
        with gpu_interpreted():
            got = _kernel.attention_peaks(q[:1], k[:1], block=block, scale=0.125)
        want = oracle(q[:1], k[:1], block, 0.125)
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-5)

    @parameterized.parameters(64, 128, 256)
    def test_lowers_for_cuda(self, block):
        q, k = operands(512, 4, 2, 128, jnp.bfloat16)
        call = functools.partial(
            attention_peaks, block=block, implementation="mosaic_gpu"
        )
        exported = jax.export.export(jax.jit(call), platforms=["cuda"])(q, k)
        self.assertEqual(exported.mlir_module().count("@mosaic_gpu"), 1)
        columns = 512 // block
        self.assertEqual(exported.out_avals[0].shape, (2, 4, columns, 512))

    @parameterized.parameters(
        (dict(block=32), "blocks must be a multiple of 64 keys; got 32"),
        (dict(dtype=jnp.float32), "must be bfloat16 or float16"),
        (dict(dim=32), "`head_dim` must be one of"),
    )
    def test_kernel_says_why(self, change, reason):
        options = dict(block=64, dtype=jnp.bfloat16, dim=64) | change
        q, k = operands(128, 2, 1, options["dim"], options["dtype"])
        with self.assertRaisesRegex(NotImplementedError, reason):
            attention_peaks(q, k, block=options["block"], implementation="mosaic_gpu")

    def test_refuses(self):
        q, k = operands(8, 2, 1, 4)
        for args, options, message in (
            ((q, k), dict(block=0), "`block` must be at least 1; got 0"),
            ((q, k[:, :4]), dict(block=2), "must be as long; got 8 and 4"),
            ((q, k), dict(block=2, scale=-1.0), "`scale` must be positive"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                attention_peaks(*args, **options)
        with self.assertRaisesRegex(TypeError, "`block` must be a Python int; got 2.0"):
            attention_peaks(q, k, block=2.0)  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("length", "block", "dim"), [(1000, 64, 128), (512, 128, 64), (2048, 256, 128)]
)
def test_on_a_gpu(length, block, dim):
    q, k = operands(length, 4, 2, dim, jnp.bfloat16)
    got = attention_peaks(q, k, block=block, implementation="mosaic_gpu")
    want = oracle(q, k, block, dim**-0.5)
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-5)

"""The Hopper kernel of active_ffn and gated_ffn: interpreted, lowering, limits."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax.ops import _platform, active_ffn, gated_ffn, has_gated_ffn_kernel
from sparsejax.ops.active_ffn import _gated, _mosaic_gpu, _reference
from sparsejax.ops.active_ffn._dealing import Found
from sparsejax.ops.active_ffn._tiles import Tiles
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter

kernel = functools.partial(active_ffn, implementation="mosaic_gpu")
gated_kernel = functools.partial(gated_ffn, implementation="mosaic_gpu")


def operands(batch, d_in, d_model, capacity, num_active, dtype=jnp.float32):
    """Random operands; integers, so that every order of the sums gives equal bits."""
    rng = np.random.default_rng([batch, d_in, capacity])
    d_ff = 2 * capacity
    x, gate, up, down = (
        jnp.asarray(rng.integers(-2, 3, shape), dtype)
        for shape in [(batch, d_in), (batch, capacity), (d_ff, d_in), (d_ff, d_model)]
    )
    neurons = np.sort(rng.choice(d_ff, num_active, replace=False))
    padding = rng.integers(0, d_ff, capacity - num_active)
    indices = jnp.asarray(np.concatenate([neurons, padding]), jnp.int32)
    return x, gate, indices, jnp.int32(num_active), up, down


def gated_operands(batch, d_in, d_model, d_ff, share, dtype=jnp.float32):
    """Likewise; rows of neurons that no row of the batch uses are not finite."""
    rng = np.random.default_rng([batch, d_in, d_ff])
    x, gate, up, down = (
        rng.integers(-2, 3, shape).astype(np.float32)
        for shape in [(batch, d_in), (batch, d_ff), (d_ff, d_in), (d_ff, d_model)]
    )
    gate *= rng.random(gate.shape) < share
    idle = (gate == 0).all(axis=0)[:, None]
    up, down = np.where(idle, np.nan, up), np.where(idle, np.inf, down)
    return tuple(jnp.asarray(a, dtype) for a in (x, gate, up, down))


def threshold_operands(*case, dtype=jnp.float32):
    """Likewise, and a threshold for each row; what scores exceed it by, if positive."""
    x, gate, up, down = gated_operands(*case, dtype=dtype)
    above = jnp.abs(gate)
    rng = np.random.default_rng(case[0])
    threshold = jnp.asarray(rng.permutation(len(x))[:, None] - 1, dtype)
    below = jnp.asarray(rng.integers(0, 3, gate.shape), dtype)
    scores = threshold + jnp.where(above > 0, above, -below)
    return (x, scores, up, down, threshold), above


def abstract_gated(case, dtype=jnp.float32):
    batch, d_in, d_model, d_ff, _ = case
    shapes = (batch, d_in), (batch, d_ff), (d_ff, d_in), (d_ff, d_model)
    return tuple(jnp.zeros(shape, dtype) for shape in shapes)


@needs_gpu_interpreter
class InterpretTest(parameterized.TestCase):
    @parameterized.parameters(
        # one neuron at a time in flight, and blocks that share one
        ((1, 512, 512, 9, 7), jnp.bfloat16, Tiles(2, num_sms=2)),
        ((2, 256, 1024, 11, 11), jnp.float32, Tiles(2, parts=2, num_sms=4)),
        # axes of an odd number of pieces; the ring is longer than the walk
        ((3, 1280, 768, 12, 10), jnp.float16, Tiles(4, num_sms=2, blocks_per_sm=2)),
        ((1, 1280, 256, 8, 8), jnp.float32, Tiles(3, num_sms=1, chunk=512)),
        # blocks with nothing to do; nothing to do for any
        ((1, 512, 512, 5, 1), jnp.float32, Tiles(2, num_sms=3)),
        ((1, 512, 512, 5, 0), jnp.bfloat16, Tiles(2, num_sms=3)),
    )
    def test_matches_reference(self, case, dtype, tiles):
        args = operands(*case, dtype=dtype)
        fn = jax.jit(functools.partial(_mosaic_gpu.active_ffn, tiles=tiles))
        with gpu_interpreted():
            got = fn(*args)
        want = _reference.active_ffn(*args)
        self.assertEqual(got.dtype, dtype)
        np.testing.assert_array_equal(
            np.asarray(got, np.float32), np.asarray(want, np.float32)
        )

    @parameterized.parameters(
        # one neuron at a time in flight; blocks that share one, windows of two pieces
        ((1, 512, 512, 128, 0.1), jnp.bfloat16, Tiles(2, num_sms=2)),
        ((2, 256, 1024, 264, 0.1), jnp.float32, Tiles(2, parts=2, num_sms=4)),
        # a single block is made two
        ((1, 512, 256, 256, 0.1), jnp.bfloat16, Tiles(2, num_sms=1)),
        # axes of an odd number of pieces; the window of the last range begins before it
        ((3, 1280, 768, 392, 0.1), jnp.float16, Tiles(4, num_sms=2, blocks_per_sm=2)),
        # more ranges than there are groups of neurons; none is active, all are
        ((1, 512, 256, 128, 0.05), jnp.float32, Tiles(2, num_sms=40)),
        ((1, 512, 512, 256, 0), jnp.bfloat16, Tiles(2, num_sms=3)),
        ((2, 256, 256, 256, 1), jnp.bfloat16, Tiles(3, num_sms=30)),
        # shared, the ranges would have too many gates
        ((16, 256, 256, 256, 0.05), jnp.float32, Tiles(2, num_sms=2)),
    )
    def test_gated_matches_reference(self, case, dtype, tiles):
        args = gated_operands(*case, dtype=dtype)
        fn = jax.jit(functools.partial(_mosaic_gpu.gated_ffn, tiles=tiles))
        with gpu_interpreted():
            got = fn(*args)
        want = _gated._reference(*args)
        self.assertEqual(got.dtype, dtype)
        np.testing.assert_array_equal(
            np.asarray(got, np.float32), np.asarray(want, np.float32)
        )

    @parameterized.parameters(
        ((1, 512, 512, 256, 0.1), jnp.bfloat16, Tiles(2, num_sms=3), None),
        ((3, 256, 512, 264, 0.1), jnp.float32, Tiles(2, parts=2, num_sms=8), None),
        ((2, 256, 768, 392, 0.1), jnp.float16, Tiles(4, num_sms=4), jnp.square),
        ((3, 256, 256, 256, 1), jnp.bfloat16, Tiles(3, num_sms=9), jax.nn.relu),
        ((2, 256, 256, 128, 0), jnp.float32, Tiles(2, num_sms=2), jax.nn.gelu),
    )
    def test_threshold_matches_reference(self, case, dtype, tiles, activation):
        args, above = threshold_operands(*case, dtype=dtype)
        form = functools.partial(
            _mosaic_gpu.gated_ffn, tiles=tiles, activation=activation
        )
        with gpu_interpreted():
            got = jax.jit(form)(*args)
        gate = above if activation is None else activation(above)
        want = _gated._reference(args[0], gate, *args[2:4])
        self.assertEqual(got.dtype, dtype)
        for other in (want, _gated._reference(*args, activation=activation)):
            np.testing.assert_array_equal(
                np.asarray(got, np.float32), np.asarray(other, np.float32)
            )

    @parameterized.product(
        dtype=[jnp.float32, jnp.bfloat16], activation=[jax.nn.gelu, jax.nn.silu]
    )
    def test_threshold_of_any_value(self, dtype, activation):
        """Also where one is -inf: that row stays as it is, and is negative in part."""
        x, _, up, down = gated_operands(3, 256, 256, 128, 1, dtype)
        scores = jax.random.normal(jax.random.key(0), (3, 128), dtype)
        threshold = jnp.asarray([[1.3], [-jnp.inf], [0.4]], dtype)
        scores, args = scores.at[0, 5].set(threshold[0, 0]), (x, up, down, threshold)
        form = functools.partial(_mosaic_gpu.gated_ffn, activation=activation)
        with gpu_interpreted():
            got = form(args[0], scores, *args[1:], tiles=Tiles(2, num_sms=2))
        want = _gated._reference(args[0], scores, *args[1:], activation=activation)
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        limit = 2 * float(jnp.finfo(dtype).eps) * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=limit)

    def test_activation_alone_and_nan(self):
        x, gate, up, down = gated_operands(2, 256, 256, 128, 1)
        up, down = map(jnp.nan_to_num, (up, down))
        args = x, gate.at[1, 77].set(jnp.nan), up, down
        for threshold in (None, jnp.ones((2, 1))):
            form = functools.partial(
                _mosaic_gpu.gated_ffn, activation=jax.nn.relu, tiles=Tiles(2, num_sms=2)
            )
            with gpu_interpreted():
                got = form(*args, threshold)
            want = _gated._reference(*args, threshold, activation=jax.nn.relu)
            np.testing.assert_array_equal(got, want)
            self.assertTrue(jnp.isnan(got[1]).all() and not jnp.isnan(got[0]).any())

    @parameterized.product(num_blocks=[2, 6, 7], share=[0.1, 0.5, 1])
    def test_blocks_meet_in_the_middle_of_a_range(self, num_blocks, share):
        """`down` is the identity: the sums of a block are those of its neurons."""
        d_ff = 256
        active = np.random.default_rng(num_blocks).random(d_ff) < share
        active[128:200] = share == 1
        x, up, down = (
            jnp.asarray(a, jnp.float32).reshape(-1, 1, 256)
            for a in (np.eye(1, 256), np.ones((d_ff, 256)), np.eye(256))
        )
        gates = (jnp.asarray(active[None], jnp.float32),)
        found = Found.default(1, d_ff, num_blocks, itemsize=4)
        with gpu_interpreted():
            sums = _mosaic_gpu._sums_of_blocks(x, gates, up, down, found, Tiles(2))
        num_ranges = num_blocks // 2
        want = np.zeros((2 * num_ranges, d_ff))
        for i in range(num_ranges):
            low, high = (j * 32 // num_ranges * 8 for j in (i, i + 1))
            neurons = low + np.flatnonzero(active[low:high])
            half = (len(neurons) + 1) // 2
            want[2 * i, neurons[:half]] = want[2 * i + 1, neurons[half:]] = 1
        np.testing.assert_array_equal(np.reshape(sums, want.shape), want)

    @parameterized.parameters((4, 4), (99, 6), (-2, 0))
    def test_public_function_with_a_traced_count(self, count, clipped):
        def few_blocks(*sizes, default=Tiles.default):  # the interpreter is slow
            return dataclasses.replace(default(*sizes), num_sms=2)

        x, gate, indices, _, up, down = operands(2, 256, 256, 6, 6)
        with mock.patch.object(Tiles, "default", few_blocks), gpu_interpreted():
            got = jax.jit(kernel)(x, gate, indices, jnp.int32(count), up, down)
        want = _reference.active_ffn(x, gate, indices, jnp.int32(clipped), up, down)
        np.testing.assert_array_equal(got, want)


class LoweringTest(parameterized.TestCase):
    @parameterized.parameters(
        ((1, 4096, 4096, 320, 262), jnp.bfloat16),
        ((8, 4096, 4096, 320, 262), jnp.bfloat16),
        ((2, 1280, 2304, 16, 16), jnp.float32),
    )
    def test_exports_for_cuda(self, case, dtype):
        shapes = jax.eval_shape(lambda: operands(*case, dtype=dtype))
        exported = jax.export.export(jax.jit(kernel), platforms=["cuda"])(*shapes)
        self.assertIn("mosaic_gpu", exported.mlir_module())

    @parameterized.parameters(
        ((1, 4096, 4096, 24576, 0), jnp.bfloat16),
        ((8, 4096, 4096, 32768, 0), jnp.bfloat16),
        ((2, 1280, 2304, 4096, 0), jnp.float32),
    )
    def test_gated_exports_for_cuda(self, case, dtype):
        shapes = jax.eval_shape(lambda: abstract_gated(case, dtype))
        threshold = jnp.zeros((case[0], 1), dtype)
        of_scores = functools.partial(
            gated_kernel, threshold=threshold, activation=jax.nn.gelu
        )
        for form in (gated_kernel, of_scores):
            exported = jax.export.export(jax.jit(form), platforms=["cuda"])(*shapes)
            self.assertIn("mosaic_gpu", exported.mlir_module())

    def test_none_takes_the_plain_form_on_a_cpu(self):
        shapes = jax.eval_shape(lambda: operands(1, 512, 512, 8, 8))
        text = jax.jit(active_ffn).lower(*shapes).as_text()
        self.assertNotIn("mosaic_gpu", text)
        shapes = jax.eval_shape(lambda: abstract_gated((1, 512, 512, 256, 0)))
        text = jax.jit(gated_ffn).lower(*shapes).as_text()
        self.assertNotIn("mosaic_gpu", text)


class UnsupportedTest(parameterized.TestCase):
    @parameterized.parameters(
        (
            (1, 500, 512, 4, 4),
            {},
            r"d_in and d_model must be multiples of 256; got 500",
        ),
        ((17, 256, 256, 4, 4), {}, r"the batch must be at most 16; got 17"),
        ((16, 8192, 256, 4, 4), {}, r"must fit into \d+ bytes; got d_in=8192"),
        (
            (1, 256, 256, 4, 4),
            {4: jnp.bfloat16},
            r"one dtype.*float32, bfloat16, float3",
        ),
    )
    def test_named_kernel_raises_with_the_reason(self, case, dtypes, message):
        args = list(jax.eval_shape(lambda: operands(*case)))
        for position, dtype in dtypes.items():
            args[position] = args[position].update(dtype=dtype)
        with self.assertRaisesRegex(NotImplementedError, message):
            jax.eval_shape(kernel, *args)

    @parameterized.parameters(
        ((1, 256, 256, 260, 0), {}, r"d_ff must be a multiple of 8.*got 260"),
        ((1, 256, 256, 120, 0), {}, r"at least 128; got 120"),
        ((16, 256, 256, 2**20, 0), {}, r"must fit into 10240 bytes; got 16 x 4096"),
        ((1, 500, 512, 256, 0), {}, r"d_in and d_model must be multiples of 256"),
        ((1, 256, 256, 256, 0), {1: jnp.bfloat16}, r"`gate` must have the dtype of"),
    )
    def test_named_gated_kernel_raises_with_the_reason(self, case, dtypes, message):
        args = list(jax.eval_shape(lambda: abstract_gated(case)))
        for position, dtype in dtypes.items():
            args[position] = args[position].update(dtype=dtype)
        with self.assertRaisesRegex(NotImplementedError, message):
            jax.eval_shape(gated_kernel, *args)

    def test_activations_that_no_kernel_has(self):
        args = abstract_gated((1, 256, 256, 256, 0))
        has = functools.partial(has_gated_ffn_kernel, args[0], *args[2:])
        with mock.patch.object(_platform, "visible_kernels", lambda: {"mosaic_gpu"}):
            found = [has(activation=f) for f in (None, jax.nn.gelu, jnp.sin)]
        self.assertEqual(found, [True, True, False])
        fn = functools.partial(gated_kernel, activation=jnp.sin)
        with self.assertRaisesRegex(NotImplementedError, r"operations of kernels.*sin"):
            jax.eval_shape(fn, *args)
        gated_ffn(*args, activation=jnp.sin)


class TilesTest(parameterized.TestCase):
    @parameterized.product(d_ff=[128, 1000, 24576, 49152], num_blocks=[1, 132, 264])
    def test_ranges_cover_all_neurons(self, d_ff, num_blocks):
        found = Found.default(1, d_ff, num_blocks, itemsize=2)
        bounds = np.array([found.begins(i) for i in range(found.num_ranges + 1)])
        self.assertEqual((bounds[0], bounds[-1]), (0, d_ff))
        self.assertTrue((bounds % 8 == 0).all())
        lengths = np.diff(bounds)
        self.assertLessEqual(np.ptp(lengths), 8)
        self.assertLessEqual(lengths.max(), found.window)
        self.assertLess(found.window - lengths.max(), 128)

    @parameterized.parameters(
        ((1, 32768, 264, 2), (132, 2)),
        ((1, 32768, 33, 2), (16, 2)),
        ((1, 4096, 1, 2), (1, 2)),
        # 8 x 768 gates would not fit
        ((8, 49152, 132, 2), (132, 1)),
    )
    def test_two_blocks_share_a_range_if_its_gates_fit(self, sizes, want):
        found = Found.default(*sizes)
        self.assertEqual((found.num_ranges, found.sides), want)
        self.assertIsNone(found.unsupported_reason(itemsize=2))

    @parameterized.product(
        batch=[1, 2, 3, 8, 16], d_in=[256, 1280, 4096], d_model=[256, 2304, 8192]
    )
    def test_default_fits(self, batch, d_in, d_model):
        for itemsize in (2, 4):
            tiles = Tiles.default(batch, d_in, d_model, itemsize)
            self.assertEqual(d_model % (256 * tiles.parts), 0)
            slot_bytes = (d_in + d_model // tiles.parts) * itemsize
            used = batch * d_in * itemsize + max(tiles.slots, 0) * slot_bytes
            if tiles.slots >= 2:
                self.assertLessEqual(used * tiles.blocks_per_sm, 200 * 1024)

    @parameterized.product(length=[1, 2, 3, 5, 9, 16], chunk=[512, 1024])
    def test_chunks_cover_a_row(self, length, chunk):
        chunks = _mosaic_gpu._chunks(length, chunk)
        covered = [i for start, size in chunks for i in range(start, start + size)]
        self.assertEqual(covered, list(range(length)))
        self.assertLessEqual(max(size for _, size in chunks) * 256, chunk)
        self.assertTrue(all(size % 2 == 0 for _, size in chunks[:-1]))


@pytest.mark.gpu
class DeviceTest(parameterized.TestCase):
    @parameterized.parameters(
        ((1, 4096, 4096, 3000, 2621), jnp.bfloat16),
        ((8, 4096, 4096, 3000, 2621), jnp.bfloat16),
        ((4, 1280, 2304, 1000, 999), jnp.float16),
        ((3, 768, 1280, 700, 5), jnp.float32),
        ((1, 512, 512, 8, 0), jnp.bfloat16),
    )
    def test_matches_reference(self, case, dtype):
        args = operands(*case, dtype=dtype)
        # small enough that float32 sums are exact; results may be rounded differently
        got = np.asarray(jax.jit(kernel)(*args), np.float32)
        want = np.asarray(_reference.active_ffn(*args), np.float32)
        limit = 2 * float(jnp.finfo(dtype).eps) * (1 + np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=limit)

    @parameterized.parameters(
        ((1, 2048, 4096, 24576, 0.08), jnp.bfloat16),
        ((1, 4096, 8192, 49152, 0.08), jnp.bfloat16),
        ((8, 2048, 4096, 32768, 0.08), jnp.bfloat16),
        ((4, 1280, 2304, 4000, 0.2), jnp.float16),
        ((3, 768, 1280, 2048, 1), jnp.float32),
        ((1, 512, 512, 256, 0), jnp.bfloat16),
    )
    def test_gated_matches_reference(self, case, dtype):
        args = gated_operands(*case, dtype=dtype)
        got = np.asarray(jax.jit(gated_kernel)(*args), np.float32)
        want = np.asarray(_gated._reference(*args), np.float32)
        limit = 2 * float(jnp.finfo(dtype).eps) * (1 + np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=limit)

    @parameterized.parameters(
        ((1, 2048, 4096, 32768, 0.08), jnp.bfloat16, jax.nn.gelu),
        ((8, 2048, 4096, 32768, 0.08), jnp.bfloat16, None),
        ((3, 768, 1280, 2048, 0.2), jnp.float32, jax.nn.silu),
    )
    def test_threshold_matches_reference(self, case, dtype, activation):
        args, _ = threshold_operands(*case, dtype=dtype)
        fn = jax.jit(
            lambda *a: gated_kernel(*a[:4], threshold=a[4], activation=activation)
        )
        got = np.asarray(fn(*args), np.float32)
        want = np.asarray(_gated._reference(*args, activation=activation), np.float32)
        limit = 2 * float(jnp.finfo(dtype).eps) * (1 + np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=limit)

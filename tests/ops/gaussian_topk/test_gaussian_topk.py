"""gaussian_topk: the reference against NumPy, the kernels against the reference."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.experimental import pallas as pl

from sparsejax import ops
from sparsejax.ops import _rows
from sparsejax.ops.gaussian_topk import _mosaic_gpu, _pallas_tpu, _reference
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter

ATOL = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
RTOL = {"float32": 1e-4, "float16": 2**-10, "bfloat16": 2**-7}


def operands(shape, dtype=jnp.float32, seed=0):
    """Rows, of which one is constant, and a gradient."""
    keys = jax.random.split(jax.random.key(seed), 2)
    x = 2 * jax.random.normal(keys[0], shape) + 0.3
    x = x.at[..., -1, :].set(1.5)
    g = jax.random.normal(keys[1], shape)
    return x.astype(dtype), g.astype(dtype)


def activated_operands(width, dtype, with_up):
    """A gradient, rows, their z, maybe `up`: a NaN, an unchanged and a constant row."""
    x, g = operands((5, width), dtype)
    up, _ = operands((5, width), dtype, seed=1)
    x = x.at[1, 3].set(jnp.nan)
    z = jnp.array([[1.0], [0.5], [-np.inf], [0.0], [1.5]])
    return (g, x, z, up) if with_up else (g, x, z)


def row_oracle(row, grad, z, delta):
    """(out, dx, dz) of one row in float64, from the formulas of the docstring."""
    mean, std = row.mean(), row.std()
    if z == -np.inf:
        return row, grad, 0.0
    u = row - (mean + z * std)
    if delta:
        out = np.where(u <= delta, u**2 / (2 * delta), u - delta / 2) * (u > 0)
        slope = np.clip(u / delta, 0, 1)
    else:
        out, slope = np.maximum(u, 0), (u > 0).astype(float)
    total = (grad * slope).sum()
    away = (row - mean) / std if std else 0.0
    dx = grad * slope - total * (1 + z * away) / len(row)
    return out, dx, -total * std


def gelu_oracle(x):
    """GELU in its tanh form, and its derivative, in float64."""
    c = np.sqrt(2 / np.pi)
    tanh = np.tanh(c * (x + 0.044715 * x**3))
    inner = c * (1 + 3 * 0.044715 * x**2)
    return x * (1 + tanh) / 2, (1 + tanh + x * (1 - tanh**2) * inner) / 2


def activated_row_oracle(row, grad, z, delta, up):
    """(out, dx, dz, dup) of one row under GELU and a product: the chain rule."""
    survived = row_oracle(row, grad, z, delta)[0]
    value, slope = gelu_oracle(survived)
    _, dx, dz = row_oracle(row, grad * up * slope, z, delta)
    return value * up, dx, dz, grad * value


def value_and_gradients(fn, g, *operands):
    """Output and all gradients of <g, fn(*operands)>."""

    def loss(*operands):
        out = fn(*operands)
        return jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32)), out

    argnums = tuple(range(len(operands)))
    run = jax.jit(jax.value_and_grad(loss, argnums=argnums, has_aux=True))
    (_, out), grads = run(*operands)
    return out, *grads


@pytest.mark.usefixtures("compile_fast")
class ReferenceTest(parameterized.TestCase):
    @parameterized.product(huber_delta=[0.0, 0.4], per_row=[True, False])
    def test_matches_oracle(self, huber_delta, per_row):
        x, g = operands((2, 3, 40))
        z = jnp.array([[[1.0], [-0.5], [2.0]], [[-np.inf], [0.0], [0.3]]])
        z = z if per_row else jnp.float32(1.2)
        fn = functools.partial(ops.gaussian_topk, huber_delta=huber_delta)
        out, dx, dz = value_and_gradients(fn, g, x, z)
        want = [np.zeros(x.shape), np.zeros(x.shape), np.zeros((2, 3, 1))]
        zs = np.broadcast_to(z, (2, 3, 1))
        for i in np.ndindex(2, 3):
            row = np.asarray(x[i], np.float64), np.asarray(g[i], np.float64)
            for array, value in zip(
                want, row_oracle(*row, float(zs[i][0]), huber_delta), strict=True
            ):
                array[i] = value
        np.testing.assert_allclose(out, want[0], atol=4e-6)
        np.testing.assert_allclose(dx, want[1], atol=4e-6)
        np.testing.assert_allclose(
            dz, want[2] if per_row else want[2].sum(), rtol=1e-5, atol=1e-5
        )

    @parameterized.parameters(0.0, 0.4)
    def test_activated_matches_oracle(self, huber_delta):
        x, g = operands((4, 40))
        up, _ = operands((4, 40), seed=1)
        z = jnp.array([[1.0], [-0.5], [-np.inf], [0.3]])
        fn = functools.partial(
            ops.gaussian_topk, activation=jax.nn.gelu, huber_delta=huber_delta
        )
        got = value_and_gradients(fn, g, x, z, up)
        for i in range(4):
            row, grad, z_row, up_row = (
                np.asarray(a[i], np.float64) for a in (x, g, z, up)
            )
            want = activated_row_oracle(row, grad, z_row[0], huber_delta, up_row)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=2e-5)

    def test_activated_is_rounded_once(self):
        x, up = operands((3, 256), jnp.bfloat16)
        theta = jax.jit(ops.gaussian_threshold)(x, 0.5)
        x_wide, theta, up_wide = (np.asarray(a, np.float64) for a in (x, theta, up))
        want = gelu_oracle(np.maximum(x_wide - theta, 0))[0] * up_wide
        for fn in (
            ops.gaussian_topk,
            functools.partial(_pallas_tpu.gaussian_topk, interpret=True),
        ):
            fn = functools.partial(fn, activation=jax.nn.gelu)
            got = np.asarray(jax.jit(fn)(x, 0.5, up), np.float64)
            # half a unit in the last of 8 places
            np.testing.assert_allclose(got, want, rtol=1.001 * 2**-8, atol=1e-7)

    def test_threshold(self):
        x, _ = operands((4, 32))
        want = np.asarray(x).mean(-1) + 0.7 * np.asarray(x).std(-1)
        got = jax.jit(ops.gaussian_threshold)(x, 0.7)
        self.assertEqual(got.shape, (4, 1))
        np.testing.assert_allclose(got[:, 0], want, rtol=1e-6)
        np.testing.assert_array_equal(ops.gaussian_threshold(x, -np.inf), -np.inf)

    def test_errors(self):
        x = jnp.ones((2, 8))
        fn = ops.gaussian_topk
        with self.assertRaisesRegex(TypeError, r"`x` must be floating; got int32\[3\]"):
            fn(jnp.arange(3), 1.0)
        with self.assertRaisesRegex(TypeError, r"`x` must be floating; got int32\[3\]"):
            ops.gaussian_threshold(jnp.arange(3), 1.0)
        with self.assertRaisesRegex(ValueError, "`x` must have at least one axis"):
            fn(jnp.float32(1), 1.0)
        with self.assertRaisesRegex(ValueError, r"`z` must be a scalar.*got shape \(8"):
            fn(x, jnp.ones(8))
        with self.assertRaisesRegex(ValueError, "`huber_delta` must be.*got -1"):
            fn(x, 1.0, huber_delta=-1)
        with self.assertRaisesRegex(ValueError, r"`up` must be like `x`.*got bfloat16"):
            fn(x, 1.0, x.astype(jnp.bfloat16))
        with self.assertRaisesRegex(ValueError, r"`up` must be like.*got float32\[8\]"):
            fn(x, 1.0, x[0])
        with self.assertRaisesRegex(TypeError, "`where` must be bool; got float32"):
            fn(x, 1.0, where=x)
        with self.assertRaisesRegex(ValueError, r"`where` must broadcast.*got \(3,\)"):
            fn(x, 1.0, where=[True] * 3)
        with self.assertRaisesRegex(ValueError, "`implementation` must be None or one"):
            fn(x, 1.0, implementation="triton")


@pytest.mark.usefixtures("compile_fast")
class KernelTest(parameterized.TestCase):
    """Values and gradients of both kernels, run on a CPU."""

    def check(self, kernel, g, *operands, **options):
        reference = functools.partial(_reference.gaussian_topk, **options)
        kernel = functools.partial(kernel, **options)
        got = value_and_gradients(kernel, g, *operands)
        want = value_and_gradients(reference, g, *operands)
        tolerance = {"atol": ATOL[g.dtype.name], "rtol": RTOL[g.dtype.name]}
        for a, b in zip(got, want, strict=True):
            self.assertEqual(a.dtype, b.dtype)
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, **tolerance)

    @parameterized.parameters(
        ((5, 512), jnp.float32, 0.0),
        ((3, 7, 1536), jnp.bfloat16, 0.4),
    )
    def test_tpu(self, shape, dtype, huber_delta):
        x, g = operands(shape, dtype)
        kernel = functools.partial(_pallas_tpu.gaussian_topk, interpret=True)
        self.check(kernel, g, x, jnp.float32(1.2), huber_delta=huber_delta)

    def test_tpu_with_a_last_block_that_reaches_past_the_end(self):
        x, g = operands((37, 16384), jnp.bfloat16)
        kernel = functools.partial(_pallas_tpu.gaussian_topk, interpret=True)
        self.check(kernel, g, x, jnp.float32(1.4))

    def test_tpu_rows_of_their_own_z(self):
        x, g = operands((4, 256))
        x = x.at[1, 3].set(jnp.nan).at[2, 3].set(jnp.inf)
        z = jnp.array([[1.0], [0.5], [-np.inf], [-np.inf]])
        kernel = functools.partial(_pallas_tpu.gaussian_topk, interpret=True)
        self.check(kernel, g, x, z)
        got = jax.jit(jax.vmap(kernel))(x[:, None], z)
        want = jax.jit(_reference.gaussian_topk)(x, z)
        np.testing.assert_allclose(got[:, 0], want, atol=2e-6)

    # More rows than blocks of threads; a slot that holds one row alone.
    @parameterized.parameters(
        ((1000, 16384), jnp.bfloat16, 0.0),
        ((600, 13824), jnp.bfloat16, 0.1),
        ((900, 1024), jnp.float32, 0.0),
        ((2, 150, 51200), jnp.float16, 0.0),
    )
    @pytest.mark.gpu
    def test_on_a_gpu(self, shape, dtype, huber_delta):
        x, g = operands(shape, dtype)
        self.check(
            _mosaic_gpu.gaussian_topk, g, x, jnp.float32(1.2), huber_delta=huber_delta
        )

    @parameterized.parameters(
        ((1000, 6144), jnp.bfloat16, 0.0),
        ((300, 33792), jnp.bfloat16, 0.1),
        ((900, 1024), jnp.float32, 0.0),
    )
    @pytest.mark.gpu
    def test_activated_on_a_gpu(self, shape, dtype, huber_delta):
        (x, g), (up, _) = operands(shape, dtype), operands(shape, dtype, seed=1)
        self.check(
            _mosaic_gpu.gaussian_topk,
            g,
            x,
            jnp.float32(1.2),
            up,
            activation=jax.nn.gelu,
            huber_delta=huber_delta,
        )

    def check_gpu(self, g, *operands, tiles, **options):
        kernel = functools.partial(
            _mosaic_gpu.gaussian_topk, tiles=tiles, grad_tiles=tiles
        )
        with gpu_interpreted():
            self.check(kernel, g, *operands, **options)

    # Few blocks, so that every one refills its ring; a ring longer than the rows.
    @parameterized.parameters(
        ((9, 1024), jnp.float32, 0.0, _mosaic_gpu.Tiles(2, 1, 512, 2)),
        ((7, 1536), jnp.bfloat16, 0.4, _mosaic_gpu.Tiles(3, 1, 1024, 1)),
        ((3, 512), jnp.float32, 0.0, _mosaic_gpu.Tiles(1, 1, 512, 1)),
        ((2, 2, 512), jnp.float16, 0.0, _mosaic_gpu.Tiles(8, 2, 4096, 3)),
    )
    @needs_gpu_interpreter
    def test_gpu(self, shape, dtype, huber_delta, tiles):
        x, g = operands(shape, dtype)
        self.check_gpu(g, x, jnp.float32(1.2), tiles=tiles, huber_delta=huber_delta)

    @parameterized.parameters(0.0, 0.4)
    @needs_gpu_interpreter
    def test_gpu_rows_of_their_own_z(self, huber_delta):
        x, g = operands((4, 512))
        x = x.at[1, 3].set(jnp.nan).at[2, 3].set(jnp.inf)
        z = jnp.array([[1.0], [0.5], [-np.inf], [-np.inf]])
        self.check_gpu(g, x, z, tiles=None, huber_delta=huber_delta)

    # jax.nn.relu has a derivative rule of its own.
    @parameterized.parameters(
        (jnp.bfloat16, jax.nn.gelu, True, 0.4),
        (jnp.float32, jax.nn.relu, False, 0.0),
    )
    @needs_gpu_interpreter
    def test_gpu_activated(self, dtype, activation, with_up, huber_delta):
        self.check_gpu(
            *activated_operands(1024, dtype, with_up),
            tiles=_mosaic_gpu.Tiles(2, 1, 512, 2),
            activation=activation,
            huber_delta=huber_delta,
        )

    @parameterized.parameters(
        (jnp.float32, jax.nn.gelu, True, 0.4),
        (jnp.bfloat16, jax.nn.gelu, True, 0.0),
        (jnp.float32, jax.nn.relu, False, 0.0),
        (jnp.float32, None, True, 0.0),
    )
    def test_tpu_activated(self, dtype, activation, with_up, huber_delta):
        self.check(
            functools.partial(_pallas_tpu.gaussian_topk, interpret=True),
            *activated_operands(256, dtype, with_up),
            activation=activation,
            huber_delta=huber_delta,
        )

    @needs_gpu_interpreter
    def test_gpu_under_vmap(self):
        x, _ = operands((3, 2, 512))
        z = jnp.array([0.5, 1.0, 1.5])
        with gpu_interpreted():
            got = jax.jit(jax.vmap(_mosaic_gpu.gaussian_topk))(x, z)
        want = jax.jit(_reference.gaussian_topk)(x, z[:, None, None])
        np.testing.assert_allclose(got, want, atol=2e-6)


class LoweringTest(parameterized.TestCase):
    """Programs for a GPU and a TPU, exported from a CPU."""

    @parameterized.parameters(
        ("mosaic_gpu", "cuda", "mosaic_gpu", 16384, jnp.bfloat16, 0.0),
        ("mosaic_gpu", "cuda", "mosaic_gpu", 13824, jnp.bfloat16, 0.1),
        ("mosaic_gpu", "cuda", "mosaic_gpu", 16384, jnp.float32, 0.0),
        ("mosaic_gpu", "cuda", "mosaic_gpu", 51200, jnp.float16, 0.0),
        ("mosaic_gpu", "cuda", "mosaic_gpu", 6144, jnp.bfloat16, 0.0, jax.nn.gelu),
        ("mosaic_gpu", "cuda", "mosaic_gpu", 16896, jnp.float32, 0.1, jax.nn.silu),
        ("mosaic_gpu", "cuda", "mosaic_gpu", 512, jnp.float16, 0.0, jax.nn.relu),
        ("pallas_tpu", "tpu", "tpu_custom_call", 16384, jnp.bfloat16, 0.0),
        ("pallas_tpu", "tpu", "tpu_custom_call", 13824, jnp.float32, 0.1),
        ("pallas_tpu", "tpu", "tpu_custom_call", 16384, jnp.bfloat16, 0.0, jax.nn.gelu),
    )
    def test_exports(
        self, implementation, platform, call, width, dtype, huber_delta, activation=None
    ):
        fn = functools.partial(
            ops.gaussian_topk,
            activation=activation,
            huber_delta=huber_delta,
            implementation=implementation,
        )

        def step(*operands):
            loss = lambda *operands: fn(*operands).astype(jnp.float32).sum()  # noqa: E731
            argnums = tuple(range(len(operands)))
            return fn(*operands), jax.grad(loss, argnums=argnums)(*operands)

        x = jax.ShapeDtypeStruct((64, width), dtype)
        z = jax.ShapeDtypeStruct((), jnp.float32)
        arguments = (x, z) if activation is None else (x, z, x)
        exported = jax.export.export(jax.jit(step), platforms=[platform])(*arguments)
        self.assertGreaterEqual(exported.mlir_module().count(f"@{call}"), 3)

    def test_scan_over_layers(self):
        def layers(x, z):
            def layer(x, z):
                return ops.gaussian_topk(x, z, implementation="mosaic_gpu"), None

            return jax.lax.scan(layer, x, z)[0]

        x, z = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16), jnp.zeros(3)
        exported = jax.export.export(jax.jit(layers), platforms=["cuda"])(x, z)
        self.assertIn("mosaic_gpu", exported.mlir_module())

    @parameterized.parameters(
        ("mosaic_gpu", (4, 1000), "float32", "must be a multiple of 512; got 1000"),
        ("mosaic_gpu", (4, 0), "float32", "must be a multiple of 512; got 0"),
        ("mosaic_gpu", (0, 512), "float32", "there must be a row"),
        ("mosaic_gpu", (4, 65536), "bfloat16", "at most 51200 entries; got 65536"),
        ("mosaic_gpu", (4, 512), "float8_e4m3fn", "must be bfloat16, float16 or"),
        ("pallas_tpu", (4, 100), "float32", "a multiple of 128, at most 16384"),
        ("pallas_tpu", (4, 32768), "bfloat16", "at most 16384; got 32768"),
        ("pallas_tpu", (4, 128), "float16", "must be bfloat16 or float32"),
        ("pallas_tpu", (0, 128), "float32", "there must be a row"),
    )
    def test_unsupported_operands(self, implementation, shape, dtype, reason):
        x = jax.ShapeDtypeStruct(shape, dtype)
        fn = functools.partial(ops.gaussian_topk, implementation=implementation)
        with self.assertRaisesRegex(
            NotImplementedError, f"implementation='{implementation}': .*{reason}"
        ):
            jax.eval_shape(fn, x, 1.0)

    @parameterized.parameters(("mosaic_gpu", "cuda"), ("pallas_tpu", "tpu"))
    def test_exports_every_operation_of_activations(self, implementation, platform):
        def activation(x):
            y = jnp.log(jnp.exp(x) + 1) * jax.lax.rsqrt(jnp.square(x) + 1) / 3
            y = y + jax.nn.silu(x) * jnp.tanh(x) - abs(-x)
            kept = (x > 0) | (x >= 1) | (x < 2) | (x <= 3) | (x == 4) | (x != 5)
            return jnp.where(kept, jnp.clip(y, -6, 6), jax.nn.relu(x**3))

        def loss(x):
            fn = functools.partial(ops.gaussian_topk, implementation=implementation)
            return fn(x, 1.0, x, activation=activation).sum()

        x = jax.ShapeDtypeStruct((8, 512), jnp.float32)
        jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(x)

    def test_other_activations_take_the_reference(self):
        x = jax.ShapeDtypeStruct((4, 512), jnp.float32)
        slope = jnp.arange(512.0)
        gelu = functools.partial(jax.nn.gelu, approximate=False)
        for activation, reason in (
            (gelu, "none but operations of kernels; got .*erfc"),
            (lambda x: 1 / (1 + x), "got integer_pow of -2"),
            (lambda x: jax.lax.fori_loop(0, 2, lambda _, y: y * y, x), "got .*scan"),
            (lambda x: x * slope[:8], "must not close over arrays"),
        ):
            fn = functools.partial(ops.gaussian_topk, activation=activation)
            for name in ("mosaic_gpu", "pallas_tpu"):
                with self.assertRaisesRegex(NotImplementedError, reason):
                    jax.eval_shape(functools.partial(fn, implementation=name), x, 1.0)

    def test_rows_with_up_are_shorter(self):
        x = jax.ShapeDtypeStruct((4, 34304), jnp.bfloat16)
        fn = functools.partial(ops.gaussian_topk, implementation="mosaic_gpu")
        self.assertEqual(jax.eval_shape(fn, x, 1.0).shape, x.shape)
        with self.assertRaisesRegex(NotImplementedError, "with `up` .*33792 entries; "):
            jax.eval_shape(fn, x, 1.0, x)

    @parameterized.parameters("mosaic_gpu", "pallas_tpu")
    def test_only_the_reference_takes_where_and_axis_name(self, implementation):
        fn = functools.partial(ops.gaussian_topk, implementation=implementation)
        x = jnp.ones((4, 512))
        with self.assertRaisesRegex(NotImplementedError, "only the reference takes `w"):
            fn(x, 1.0, where=x > 0)
        with self.assertRaisesRegex(NotImplementedError, "only the reference takes `a"):
            fn(x, 1.0, axis_name="model")


class TilesTest(parameterized.TestCase):
    @parameterized.product(width=[512, 13824, 25600], rows=[1, 2, 3])
    def test_default_fits_into_shared_memory(self, width, rows):
        slot = 2 * width * rows
        tiles = _mosaic_gpu.Tiles.default(slot)
        rows_held = (
            tiles.slots * tiles.blocks_per_sm
        )  # that one loads while one computes
        self.assertGreaterEqual(rows_held, min(2, 200 * 1024 // slot))
        self.assertEqual(_mosaic_gpu.Tiles.default(200 * 1024).slots, 1)
        used = tiles.blocks_per_sm * tiles.slots * slot
        self.assertLessEqual(used, 200 * 1024)

    @parameterized.product(width=[128, 256, 2048], with_up=[False, True])
    def test_blocks_of_a_tpu_fit_with_their_columns(self, width, with_up):
        """A column takes a lane's width of VMEM, as the compiler's reports say."""
        calls = []
        call = pl.pallas_call

        def noted(*args, in_specs, out_specs, **settings):
            calls.append([spec.block_shape for spec in (*in_specs, *out_specs)])
            return call(*args, in_specs=in_specs, out_specs=out_specs, **settings)

        def loss(x, up):
            up = up if with_up else None
            y = ops.gaussian_topk(x, 1.0, up, implementation="pallas_tpu")
            return y.sum()

        x = jax.ShapeDtypeStruct((2**16, width), jnp.float32)
        with mock.patch.object(pl, "pallas_call", noted):
            jax.eval_shape(jax.grad(loss), x, x)
        self.assertLen(calls, 2)
        for shapes in calls:
            entries = sum(rows * max(columns, 128) for rows, columns in shapes)
            self.assertLessEqual(4 * entries, 3 * 2**20)
            self.assertGreaterEqual(shapes[0][0], 48)  # not needlessly few

    @parameterized.product(width=[512, 1536, 13824], chunk=[512, 4096])
    def test_chunks_cover_a_row(self, width, chunk):
        pieces = _rows.chunks(width // 256, chunk)
        covered = [i for p in pieces for i in range(p.start, p.start + p.size)]
        self.assertEqual(covered, list(range(width // 256)))
        self.assertTrue(all(p.size % 2 == 0 and p.size * 256 <= chunk for p in pieces))

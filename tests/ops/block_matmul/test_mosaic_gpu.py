"""The Hopper kernels of block_matmul: values in interpret mode, lowering, limits."""

import contextlib
import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax.formats import BlockMask, BlockSparse
from sparsejax.ops import block_matmul
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter

# by name: the function hides the package of that name
_mosaic_gpu, _dw, _reference, _split = (
    importlib.import_module(f"sparsejax.ops.block_matmul.{name}")
    for name in ("_mosaic_gpu", "_mosaic_gpu_dw", "_reference", "_split")
)
Tiles = _mosaic_gpu.Tiles

kernel = functools.partial(block_matmul, implementation="mosaic_gpu")


def integers(rng, shape, dtype):
    """Small, so that sums are exact and every order of them gives equal bits."""
    return jnp.asarray(rng.integers(-2, 3, shape), dtype)


def operands(kept, block_shape, num_rows, dtype, compact=False):
    """x, w, dy and the mask; NaN in all that no kept block has or meets."""
    rng = np.random.default_rng([num_rows, *block_shape])
    d_in, d_out = np.multiply(np.shape(kept), block_shape)
    x, dy = (
        integers(rng, (num_rows, d_in), dtype),
        integers(rng, (num_rows, d_out), dtype),
    )
    w = integers(rng, (d_in, d_out), dtype)
    met = (
        np.repeat(np.any(kept, axis=1 - axis), side)
        for axis, side in enumerate(block_shape)
    )
    x, dy = (jnp.where(m, a, jnp.nan) for m, a in zip(met, (x, dy), strict=True))

    @jax.jit
    def stored(kept_blocks, w):
        mask = BlockMask.from_blocks(kept_blocks, block_shape)
        w = jnp.where(mask.to_dense(), w, jnp.nan)
        if compact:
            w = BlockSparse.from_dense(w, mask, capacity=int(np.sum(kept)) + 1).values
        return w, mask

    w, mask = stored(np.asarray(kept, bool), w)
    return x, w, dy, mask


@jax.jit
def reference(x, w, dy, mask):
    """y, dx and dw."""
    y, vjp = jax.vjp(lambda x, w: _reference.block_matmul(x, w, mask), x, w)
    return y, *vjp(dy)


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), b.astype(jnp.float32))


@needs_gpu_interpreter
class InterpretTest(parameterized.TestCase):
    @parameterized.named_parameters(
        # blocks shared by the two warpgroups; an empty row and an empty column
        (
            "wide",
            ([[1, 0, 0], [0, 0, 0], [1, 0, 1]], (128, 128), 16, jnp.bfloat16),
            Tiles(128, 8, stages=2, parts=1, num_sms=2),
            Tiles(128, 8, stages=3, parts=1, num_sms=4),
            _dw.Tiles(stages=2, num_sms=2),
        ),
        # two row tiles in two windows; more programs than tiles; ragged rows
        (
            "narrow",
            ([[1, 1], [0, 1], [1, 0]], (64, 64), 60, jnp.float16),
            Tiles(64, 16, stages=2, parts=2, window=1, num_sms=3),
            Tiles(64, 16, stages=2, parts=2, window=2, num_sms=132),
            _dw.Tiles(stages=3, num_sms=4),
        ),
        # y of few rows, a unit for each program; dx in windows that do not divide its
        # rows, its programs together
        (
            "few",
            ([[1, 0, 1], [0, 0, 1], [1, 1, 1]], (128, 128), 24, jnp.bfloat16),
            Tiles(128, 24, stages=2, parts=1, num_sms=132),
            Tiles(128, 8, 2, parts=1, window=2, together=True, num_sms=6),
            _dw.Tiles(stages=2, num_sms=4),
        ),
        # one side of a block wide, the other narrow; kept blocks alone are stored
        (
            "compact",
            ([[1, 0], [1, 1], [0, 1]], (64, 128), 40, jnp.bfloat16, True),
            Tiles(128, 16, stages=2, parts=2, num_sms=2),
            Tiles(64, 24, stages=2, parts=1, num_sms=2),
            _dw.Tiles(stages=2, num_sms=2),
        ),
    )
    def test_products(self, case, tiles, tiles_dx, tiles_dw):
        x, w, dy, mask = operands(*case)
        with gpu_interpreted():
            y = jax.jit(functools.partial(_mosaic_gpu.forward, tiles=tiles))(
                x, w, mask, None, None
            )
            dx = jax.jit(functools.partial(_mosaic_gpu.grad_x, tiles=tiles_dx))(
                dy, w, mask
            )
            dw = jax.jit(functools.partial(_dw.grad_w, tiles=tiles_dw))(x, dy, mask, w)
        assert_equal((y, dx, dw), reference(x, w, dy, mask))

    @parameterized.parameters(
        # four programs: four whole tiles, and one whose rows are cut into pieces
        ([[1, 1, 0], [0, 0, 1], [1, 1, 1], [1, 0, 0]], (128, 128), jnp.bfloat16, 4),
        # three: both tiles are cut, in two rounds
        ([[1, 1], [0, 1]], (64, 64), jnp.float16, 3, True),
        # nothing is kept: no tile to look for, in blocks of one tile and of four
        ([[0]], (128, 128), jnp.bfloat16, 2),
        ([[0]], (256, 256), jnp.bfloat16, 2),
    )
    def test_dw_of_pieces(self, kept, block_shape, dtype, programs, compact=False):
        x, w, dy, mask = operands(kept, block_shape, 192, dtype, compact)
        tiles = _dw.Tiles(stages=2, num_sms=programs)
        with contextlib.ExitStack() as stack:
            # cuts that pay for so few rows
            for name, value in {"_COST": 0, "_SHORTEST": 1, "_GAIN": 1}.items():
                stack.enter_context(mock.patch.object(_split, name, value))
            stack.enter_context(gpu_interpreted())
            dw = jax.jit(functools.partial(_dw.grad_w, tiles=tiles))(x, dy, mask, w)
        assert_equal([dw], reference(x, w, dy, mask)[2:])

    def test_public_function(self):
        x, w, dy, mask = operands([[0, 1], [1, 0]], (64, 64), 8, jnp.bfloat16)
        bias = jnp.arange(128, dtype=jnp.bfloat16) - 64

        def fn(implementation, x, w, bias):
            return block_matmul(
                x.reshape(2, 4, -1),
                w,
                mask,
                bias=bias,
                activation=jax.nn.relu,
                implementation=implementation,
            )

        def both(implementation):
            call = functools.partial(fn, implementation)
            y, vjp = jax.vjp(call, x, w, bias)
            return call(x, w, bias), y, *vjp(dy.reshape(2, 4, -1))

        with gpu_interpreted():
            got = jax.jit(functools.partial(both, "mosaic_gpu"))()
        assert_equal(got, both("reference"))

    def test_the_gradient_of_the_bias_is_not_rounded(self):
        """It adds up float32, as the reference, also beyond what float16 holds."""
        x, w, dy, mask = operands([[1]], (64, 64), 8, jnp.float16)
        bias = jnp.linspace(-3, 3, 64)

        def of_bias(implementation):
            def fn(bias):
                return block_matmul(
                    x, w, mask, bias=bias, implementation=implementation,
                    activation=lambda z: 3e5 * jnp.tanh(z / 1e5),
                )  # fmt: skip

            return jax.vjp(fn, bias)[1](1e4 * dy)[0]

        with gpu_interpreted():
            got = jax.jit(functools.partial(of_bias, "mosaic_gpu"))()
        want = jax.jit(functools.partial(of_bias, "reference"))()
        self.assertGreater(jnp.abs(want).max(), 2**16)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1)

    def test_a_value_does_not_depend_on_its_gradient(self):
        """Sums beyond what float16 holds, and how fast SiLU ends."""
        x, w = jnp.full((8, 64), 40, jnp.float16), jnp.full((64, 64), -40, jnp.float16)
        mask = BlockMask.from_blocks(jnp.ones((1, 1), bool), (64, 64))

        def fn(x):
            return kernel(x, w, mask, activation=jax.nn.silu)

        @jax.jit
        def run(x):
            y, vjp = jax.vjp(fn, x)
            return fn(x), y, *vjp(jnp.ones_like(y))

        with gpu_interpreted():
            for got in run(x):
                np.testing.assert_array_equal(got, 0)


class LoweringTest(parameterized.TestCase):
    @parameterized.parameters("erf", "elu", "an array", "silu")
    def test_activations(self, name):
        """In the kernel or outside: of the sums one array is held, for the backward."""
        mask = BlockMask.from_blocks(jnp.ones((2, 3), bool), (64, 64))
        shapes = (40, 128), (128, 192)
        x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)

        def fn(slope, x, w):
            activation = {
                "erf": functools.partial(jax.nn.gelu, approximate=False),
                "elu": jax.nn.elu,
                "silu": jax.nn.silu,
                "an array": lambda z: jnp.where(z > 0, z, slope * z),
            }[name]
            y, vjp = jax.vjp(
                lambda *args: kernel(*args, mask, activation=activation), x, w
            )
            held = [a for a in jax.tree.leaves(vjp) if a.shape == y.shape]
            self.assertEqual([a.dtype for a in held], [jnp.float32])
            return kernel(x, w, mask, activation=activation), vjp(y)

        slope = jax.ShapeDtypeStruct((), jnp.float32)
        exported = jax.export.export(jax.jit(fn), platforms=["cuda"])(slope, x, w)
        # y, dx, dw; and where the activation is in the kernel, y is another
        num_kernels = 4 if name == "silu" else 3
        self.assertEqual(exported.mlir_module().count("@mosaic_gpu"), num_kernels)

    @parameterized.parameters(
        ((128, 128), 8192, jnp.bfloat16, jax.nn.silu, 2),
        ((64, 64), 1000, jnp.float16, None, 1),
        ((128, 256), 3, jnp.bfloat16, jax.nn.relu, 1),
    )
    def test_for_cuda(self, block_shape, num_rows, dtype, activation, for_dw):
        grid = (2048 // block_shape[0], 2048 // block_shape[1])
        mask = jax.eval_shape(
            lambda kept: BlockMask.from_blocks(kept, block_shape),
            jax.ShapeDtypeStruct(grid, jnp.bool_),
        )
        x = jax.ShapeDtypeStruct((num_rows, 2048), dtype)
        w = jax.ShapeDtypeStruct((2048, 2048), dtype)
        bias = jax.ShapeDtypeStruct((2048,), jnp.float32)

        def fn(x, w, mask, bias):
            def loss(x, w):
                return kernel(x, w, mask, bias=bias).astype(jnp.float32).sum()

            y = kernel(x, w, mask, bias=bias, activation=activation)
            return y, jax.grad(loss, (0, 1))(x, w)

        exported = jax.export.export(jax.jit(fn), platforms=["cuda"])(x, w, mask, bias)
        # y once with the activation; dx; dw, with its few tiles cut or not
        self.assertEqual(exported.mlir_module().count("@mosaic_gpu"), 2 + for_dw)

    def test_layers_of_equal_shapes_share_a_kernel(self):
        mask = jax.eval_shape(
            lambda: BlockMask.from_blocks(jnp.ones((4, 4), jnp.bool_), (64, 64))
        )
        x, w = (jax.ShapeDtypeStruct((n, 256), jnp.bfloat16) for n in (128, 256))

        def loss(ws, x, masks):
            for w, mask in zip(ws, masks, strict=True):
                x = kernel(x, w, mask)
            return x.astype(jnp.float32).sum()

        lowered = jax.export.export(jax.jit(jax.grad(loss)), platforms=["cuda"])(
            (w, w, w), x, (mask, mask, mask)
        )
        self.assertEqual(lowered.mlir_module().count("@mosaic_gpu"), 3)  # y, dx, dw

    def test_kept_blocks_alone_for_cuda(self):
        kept = jnp.asarray([[True, False], [True, True]])
        mask = BlockMask.from_blocks(kept, (128, 128))
        x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
        values = jax.ShapeDtypeStruct((4, 128, 128), jnp.bfloat16)

        def fn(x, values):
            def loss(x, values):
                y = kernel(x, BlockSparse(values, mask))
                return y.astype(jnp.float32).sum()

            return jax.grad(loss, (0, 1))(x, values)

        exported = jax.export.export(jax.jit(fn), platforms=["cuda"])(x, values)
        self.assertEqual(exported.mlir_module().count("@mosaic_gpu"), 2)  # dx, dw


class LimitsTest(parameterized.TestCase):
    @parameterized.parameters(
        ((64, 64), jnp.float32, 8, "must be bfloat16 or float16"),
        ((64, 32), jnp.bfloat16, 8, "multiples of 64; got \\(64, 32\\)"),
        ((64, 64), jnp.bfloat16, 0, "there must be a row"),
    )
    def test_says_why(self, block_shape, dtype, num_rows, reason):
        x, w, _, mask = operands([[1]], block_shape, num_rows, dtype)
        with self.assertRaisesRegex(NotImplementedError, reason):
            kernel(x, w, mask)


@pytest.mark.gpu
class DeviceTest(parameterized.TestCase):
    @parameterized.product(
        block_shape=[(128, 128), (64, 64), (64, 128), (128, 256)],
        num_rows=[3, 1000],
        compact=[False, True],
    )
    def test_products(self, block_shape, num_rows, compact):
        def products(implementation, x, w, dy, mask):
            def call(x, w):
                if compact:
                    return block_matmul(
                        x, BlockSparse(w, mask), implementation=implementation
                    )
                return block_matmul(x, w, mask, implementation=implementation)

            y, vjp = jax.vjp(call, x, w)
            return y, *vjp(dy)

        ours = jax.jit(functools.partial(products, "mosaic_gpu"))
        reference = jax.jit(functools.partial(products, "reference"))
        order = np.random.default_rng(num_rows).permutation(63).reshape(9, 7)
        for num_kept in (0, 20, 63):  # one compilation, unless the values are compact
            args = operands(
                order < num_kept, block_shape, num_rows, jnp.bfloat16, compact
            )
            assert_equal(ours(*args), reference(*args))

    @parameterized.product(block_shape=[(128, 128), (64, 64)], compact=[False, True])
    def test_dw_of_pieces(self, block_shape, compact):
        run = jax.jit(_dw.grad_w)
        order = np.random.default_rng(0).permutation(63).reshape(9, 7)
        x, w, dy, mask = operands(order < 20, block_shape, 4000, jnp.bfloat16, compact)
        assert_equal([run(x, dy, mask, w)], reference(x, w, dy, mask)[2:])

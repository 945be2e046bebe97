"""The TPU kernels of block_matmul: values in interpret mode, lowering, limits.

Operands are small integers, so that sums are exact and every order of them is right.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import sparsejax as sj
from sparsejax.ops import block_matmul
from tests.ops.interpret import interpreted

# by name: the function hides the package of that name
_pallas_tpu = importlib.import_module("sparsejax.ops.block_matmul._pallas_tpu")


def masks_of(rows, columns):
    """Blocks: some, with an empty row and an empty column; none; all."""
    some = np.random.default_rng(rows).random((rows, columns)) < 0.6
    some[0], some[-1], some[:, 1] = False, True, False
    return some, np.zeros_like(some), np.ones_like(some)


def operands(blocks_shape, block_shape, num_rows, dtype):
    """x, w, bias, dy."""
    rng = np.random.default_rng(num_rows)
    d_in, d_out = np.multiply(blocks_shape, block_shape)
    shapes = (num_rows, d_in), (d_in, d_out), (d_out,), (num_rows, d_out)
    return [jnp.asarray(rng.integers(-2, 3, shape), dtype) for shape in shapes]


def with_gradients(
    implementation, mask, x, w, bias, dy, full_dw=False, activation=None
):
    """The result and the gradients; with an activation also the result alone.

    `w` is dense, or the values of a `BlockSparse`.
    """
    settings = dict(activation=activation, implementation=implementation)

    def fn(x, w, bias):
        if w.ndim == 3:
            return block_matmul(x, sj.BlockSparse(w, mask), bias=bias, **settings)
        return block_matmul(x, w, mask, bias=bias, full_dw=full_dw, **settings)

    alone = None if activation is None else fn(x, w, bias)  # a fused epilogue
    y, vjp = jax.vjp(fn, x, w, bias)
    return alone, y, *vjp(dy)


def jitted(implementation, **settings):
    return jax.jit(functools.partial(with_gradients, implementation, **settings))


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_array_equal(a, b)


@functools.partial(jax.jit, static_argnames=("block_shape", "compact"))
def prepared(kept, w, block_shape, compact):
    """A mask, and w with NaN where it must not be read: dense, or its kept blocks.

    There is room for all blocks but one. That one counts as zero where all are kept.
    """
    mask = sj.BlockMask.from_blocks(kept, block_shape)
    w = jnp.where(mask.to_dense(), w, jnp.nan)
    if compact:
        w = sj.BlockSparse.from_dense(w, mask, capacity=kept.size - 1).values
        used = jnp.arange(len(w)) < mask.num.sum()
        w = jnp.where(used[:, None, None], w, jnp.nan)
    return mask, w


@jax.jit
def repadded(mask):
    """The same mask; entries beyond a count, which mean nothing, are others."""

    def other(num, indices):
        listed = jnp.arange(indices.shape[1]) < num[:, None]
        return jnp.where(listed, indices, 1 - jnp.minimum(indices, 1))

    return dataclasses.replace(
        mask,
        indices=other(mask.num, mask.indices),
        indices_t=other(mask.num_t, mask.indices_t),
    )


@pytest.mark.usefixtures("compile_fast")
class InterpretTest(parameterized.TestCase):
    # rows: two tiles, of which the second is not full; fewer than a tile; one tile
    @parameterized.parameters(
        ((3, 2), (128, 128), 520, jnp.float32, False, None),
        ((2, 3), (256, 128), 40, jnp.bfloat16, False, jax.nn.relu),
        ((3, 3), (128, 256), 5, jnp.bfloat16, True, jax.nn.relu),
        ((2, 3), (128, 128), 16, jnp.float32, True, None),
    )
    def test_values_and_gradients(
        self, blocks_shape, block_shape, num_rows, dtype, compact, activation
    ):
        x, w, bias, dy = operands(blocks_shape, block_shape, num_rows, dtype)
        kernel = jitted("pallas_tpu", activation=activation)
        reference = jitted("reference", activation=activation)
        for kept in masks_of(*blocks_shape):  # one program
            mask, part = prepared(kept, w, block_shape, compact)
            want = reference(mask, x, part, bias, dy)
            ragged = kept.any() and not kept.all()
            for same in (mask, repadded(mask)) if ragged else (mask,):
                with interpreted():
                    got = jax.block_until_ready(kernel(same, x, part, bias, dy))
                assert_equal(got, want)

    @parameterized.parameters("fused", "an array")
    def test_a_value_does_not_depend_on_its_gradient(self, name):
        """Nor is what the activation sees rounded, where it is not in the kernel."""
        keys = jax.random.split(jax.random.key(0), 3)
        x, w, dy = (jax.random.normal(k, (128, 128), jnp.bfloat16) for k in keys)
        mask = sj.BlockMask.from_blocks(jnp.ones((1, 1), bool), (128, 128))

        def fn(implementation, slope, x):
            slope = slope if name == "an array" else 0.25
            return block_matmul(
                *(x, w, mask),
                activation=lambda z: jnp.exp(slope * z),
                implementation=implementation,
            )

        @functools.partial(jax.jit, static_argnums=0)
        def run(implementation, slope, x):
            call = functools.partial(fn, implementation)
            y, vjp = jax.vjp(call, slope, x)
            return call(slope, x), y, *vjp(dy)

        with interpreted():
            got = jax.block_until_ready(run("pallas_tpu", jnp.float32(0.25), x))
        want = run("reference", jnp.float32(0.25), x)
        assert_equal(got[:2], want[:2])
        for a, b in zip(got[2:], want[2:], strict=True):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2 * jnp.abs(b).max())

    def test_dw_under_vmap(self):
        """Of it alone: of a batched grid the interpreter asks for more semantics."""
        x, w, _, dy = operands((2, 2), (128, 128), 16, jnp.float32)
        x, dy = x.reshape(2, 8, -1), dy.reshape(2, 8, -1)
        mask, w = prepared(masks_of(2, 2)[0], w, (128, 128), False)

        def of_one(x, dy):
            return jax.vjp(lambda w: block_matmul(x, w, mask), w)[1](dy)[0]

        with interpreted():
            of_kernel = jax.jit(jax.vmap(lambda *a: _pallas_tpu._grad_w(*a, mask, w)))
            got = jax.block_until_ready(of_kernel(x, dy))
        assert_equal(got, jax.jit(jax.vmap(of_one))(x, dy))


def shapes_of(blocks_shape, block_shape, num_rows, dtype, compact=None, capacity=None):
    """Shapes of mask, x, w, bias and dy; nothing is computed."""

    def build(kept):
        return sj.BlockMask.from_blocks(kept, block_shape, capacity=capacity)

    mask = jax.eval_shape(build, jax.ShapeDtypeStruct(blocks_shape, jnp.bool_))
    d_in, d_out = mask.shape
    w = (d_in, d_out) if compact is None else (compact, *block_shape)
    shapes = (num_rows, d_in), w, (d_out,), (num_rows, d_out)
    return mask, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


def num_kernels(fn, *args):
    exported = jax.export.export(jax.jit(fn), platforms=["tpu"])(*args)
    return exported.mlir_module().count("@tpu_custom_call")


class LoweringTest(parameterized.TestCase):
    """Programs for a TPU, exported from a CPU."""

    @parameterized.parameters(
        ((32, 128), (128, 128), 8192, jnp.bfloat16, None, jax.nn.silu),
        ((8, 32), (512, 512), 4096, jnp.bfloat16, 100, jax.nn.gelu),
        ((9, 4), (256, 128), 1000, jnp.float32, None, jax.nn.relu),
        ((4, 3), (128, 384), 3, jnp.float32, 5, jnp.tanh),
    )
    def test_exports(self, blocks, block_shape, num_rows, dtype, compact, activation):
        args = shapes_of(blocks, block_shape, num_rows, dtype, compact)
        fn = functools.partial(with_gradients, "pallas_tpu", activation=activation)
        self.assertEqual(num_kernels(fn, *args), 4)  # y with and without, dx, dw

    def test_full_dw(self):
        args = shapes_of((2, 2), (128, 128), 64, jnp.bfloat16)
        fn = functools.partial(with_gradients, "pallas_tpu")
        full = jax.ShapeDtypeStruct((), jnp.bool_)
        self.assertEqual(num_kernels(fn, *args, full), 3)  # one in a branch
        known = functools.partial(fn, full_dw=True)
        self.assertEqual(num_kernels(known, *args), 2)  # that of dw is not there

    def test_under_vmap(self):
        mask, x, w, *_ = shapes_of((2, 2), (128, 128), 64, jnp.bfloat16)
        stacked = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), (mask, x, w)
        )

        def fn(mask, x, w):
            return block_matmul(x, w, mask, implementation="pallas_tpu")

        self.assertEqual(num_kernels(jax.vmap(fn), *stacked), 1)
        of_x = jax.vmap(fn, in_axes=(None, 0, None))
        self.assertEqual(num_kernels(of_x, mask, stacked[1], w), 1)

        def grads(fn, mask, x, w):
            return jax.grad(lambda *args: fn(mask, *args).sum(), (0, 1))(x, w)

        self.assertEqual(
            num_kernels(functools.partial(grads, of_x), mask, stacked[1], w), 2
        )
        each = jax.vmap(functools.partial(grads, fn))
        self.assertEqual(num_kernels(each, *stacked), 2)

    @parameterized.parameters("erf", "softplus", "an array")
    def test_activations_outside_of_the_kernel(self, name):
        mask, x, w, bias, dy = shapes_of((2, 2), (128, 128), 64, jnp.bfloat16)

        def fn(slope, mask, x, w, bias, dy):
            activation = {
                "erf": functools.partial(jax.nn.gelu, approximate=False),
                "softplus": jax.nn.softplus,
                "an array": lambda z: jnp.where(z > 0, z, slope * z),
            }[name]
            return with_gradients(
                "pallas_tpu", mask, x, w, bias, dy, activation=activation
            )

        slope = jax.ShapeDtypeStruct((), jnp.float32)
        self.assertEqual(num_kernels(fn, slope, mask, x, w, bias, dy), 3)  # y, dx, dw


class UnsupportedTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(dtype="float16"), "must be bfloat16 or float32; got float16"),
        (dict(block_shape=(64, 128)), r"multiples of 128; got \(64, 128\)"),
        (dict(block_shape=(128, 192)), r"multiples of 128; got \(128, 192\)"),
        (dict(block_shape=(1024, 1024)), r"room for 128 rows .*\(1024, 1024\) of flo"),
        (dict(blocks_shape=(257, 256)), "at most 65536 entries .*; got 65792"),
        (dict(num_rows=0), r"may be empty; got shapes \(0, 256\)"),
        (dict(compact=0), r"may be empty; got .* \(0, 128, 128\)"),
    )
    def test_reasons(self, other, reason):
        given = dict(
            blocks_shape=(2, 2), block_shape=(128, 128), num_rows=16, dtype="float32"
        )
        args = shapes_of(**(given | other))
        fn = functools.partial(with_gradients, "pallas_tpu")
        with self.assertRaisesRegex(
            NotImplementedError, f"implementation='pallas_tpu': .*{reason}"
        ):
            jax.eval_shape(fn, *args)

    def test_capacity_is_what_counts(self):
        args = shapes_of((257, 256), (128, 128), 16, jnp.bfloat16, capacity=(99, 99))
        fn = functools.partial(with_gradients, "pallas_tpu")
        self.assertEqual(jax.eval_shape(fn, *args)[1].shape, (16, 256 * 128))

"""What the kernels for TPU share; and under settings of jax that reach into them."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import sparsejax as sj
from sparsejax.ops import _tpu, block_attention, block_matmul

NAME = "pallas_tpu"
ONES = jnp.ones((1, 1), jnp.bool_)


def product(x):
    mask = sj.BlockMask.from_blocks(ONES, (128, 128))
    return block_matmul(x, x, mask, implementation=NAME)


def attention(x):
    mask = sj.BlockMask.from_blocks(ONES, (128, 128))
    qkv = (x.reshape(1, 128, 1, 128),) * 3
    return block_attention(*qkv, mask, implementation=NAME)


def precisions(fn, *args):
    """Of all products of a program, those in kernels included."""
    found = set()

    def visit(value):
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            value = value.jaxpr
        if isinstance(value, jax.extend.core.Jaxpr):
            for eqn in value.eqns:
                if eqn.primitive.name == "dot_general":
                    found.add(eqn.params["precision"])
                visit(list(eqn.params.values()))
        elif isinstance(value, tuple | list):
            for inner in value:
                visit(inner)

    visit(jax.make_jaxpr(fn)(*args))
    return found


class PrecisionTest(parameterized.TestCase):
    """Mosaic takes two precisions alone, and 16-bit operands with one of them."""

    @parameterized.product(
        fn=[product, attention],
        case=[
            ("bfloat16", "highest", "DEFAULT"),
            ("bfloat16", "high", "DEFAULT"),
            ("bfloat16", None, "DEFAULT"),
            ("float32", None, "DEFAULT"),
            ("float32", "bfloat16", "DEFAULT"),
            ("float32", "tensorfloat32", "HIGHEST"),
            ("float32", "BF16_BF16_F32_X3", "HIGHEST"),
        ],
    )
    def test_is_one_that_kernels_can_have(self, fn, case):
        dtype, asked, want = case
        x = jax.ShapeDtypeStruct((128, 128), dtype)

        def grad(x):
            return jax.grad(lambda x: fn(x).astype(jnp.float32).sum())(x)

        with jax.default_matmul_precision(asked):
            self.assertEqual(precisions(grad, x), {(jax.lax.Precision[want],) * 2})

    def test_of_the_product(self):
        rng = np.random.default_rng(0)
        a, b = rng.integers(-2, 3, (2, 3, 4)).astype(np.float32)
        got = jax.jit(functools.partial(_tpu.dot, axes=(0, 0)))(a, b)
        np.testing.assert_array_equal(got, a.T @ b)

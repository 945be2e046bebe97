"""spark_weights: the reference and the kernel against NumPy, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import ops
from sparsejax.ops import _platform
from sparsejax.ops._rows import Tiles
from sparsejax.ops.spark_weights import _mosaic_gpu, _reference
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter

SCALES = 0.25, 2.0  # exact
RTOL = {"float32": 2e-5, "float16": 2**-9, "bfloat16": 2**-6}


def operands(shape, where_shape, dtype=jnp.float32):
    """A gradient, scores, z and `where`: rows that are empty, tied, or keep all."""
    keys = jax.random.split(jax.random.key(0), 4)
    grad, predicted, rest = (2 * jax.random.normal(k, shape) for k in keys[:3])
    # coarse steps: no threshold is within a rounding error of a score
    predicted = jnp.round(4 * predicted) / 4
    rest = rest.at[..., :9].set(jnp.linspace(-40, 40, 9))
    where = jax.random.uniform(keys[3], where_shape) < 0.6
    where = where.at[..., 1, :].set(False)
    # what is not seen is not read
    predicted, rest = (jnp.where(where, a, jnp.nan) for a in (predicted, rest))
    predicted = predicted.at[..., 2, :].set(-1.25)
    z = jnp.linspace(0.4, 1.5, shape[-2])[:, None].at[3].set(-jnp.inf)
    return grad.astype(dtype), predicted, rest, z, where


def row_oracle(grad, predicted, rest, z, where):
    """Weights of one row and the gradients of its scores, in float64."""
    found = np.zeros((3, len(grad)))
    if not where.any():
        return found
    scores = predicted[where]
    theta = -np.inf if z == -np.inf else scores.mean() + scores.std() * z
    kept = where & ((predicted > theta) | (predicted == scores.max()))
    powers = np.exp(predicted[kept] - scores.max())
    shares, softplus = powers / powers.sum(), np.logaddexp(rest[kept], 0)
    passed = grad[kept] * softplus
    found[0, kept] = shares * softplus
    found[1, kept] = shares * (passed - (shares * passed).sum())
    found[2, kept] = grad[kept] * shares / (1 + np.exp(-rest[kept]))
    return found


def oracle(grad, predicted, rest, z, where):
    rows = grad, predicted, rest, np.broadcast_to(where, grad.shape)
    grad, predicted, rest, where = (np.asarray(a) for a in rows)
    z = np.broadcast_to(z, (*grad.shape[:-1], 1))
    want = np.zeros((3, *grad.shape))
    for i in np.ndindex(grad.shape[:-1]):
        row = (np.asarray(a[i], np.float64) for a in (grad, predicted, rest))
        want[:, *i] = row_oracle(*row, z[i][0], where[i])
    return want


def value_and_gradients(fn, grad, predicted, rest, z, where):
    """The scores are given multiplied, and divided by `scales`."""
    scores = jnp.stack([predicted / SCALES[0], rest / SCALES[1]], axis=-2)

    def both(scores):
        out, pull = jax.vjp(lambda s: fn(s, z, where, scales=SCALES), scores)
        predicted, rest = jnp.split(pull(grad)[0], 2, axis=-2)
        return out, predicted[..., 0, :] / SCALES[0], rest[..., 0, :] / SCALES[1]

    return jax.jit(both)(scores)


class SparkWeightsTest(parameterized.TestCase):
    def check(self, fn, *operands):
        dtype = operands[0].dtype
        fn = functools.partial(fn, dtype=dtype)
        got = value_and_gradients(fn, *operands)
        self.assertEqual([a.dtype for a in got], [dtype, jnp.float32, jnp.float32])
        rtols = RTOL[dtype.name], RTOL["float32"], RTOL["float32"]
        atols = 1e-6, 3e-5, 1e-6  # of `predicted` it is a difference of large numbers
        for a, b, rtol, atol in zip(got, oracle(*operands), rtols, atols, strict=True):
            a = np.asarray(a, np.float64)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

    @parameterized.parameters(((2, 3, 5, 40), (2, 1, 5, 40)), ((5, 40), (5, 40)))
    def test_reference(self, shape, where_shape):
        self.check(_reference.spark_weights, *operands(shape, where_shape))

    def test_mixed_dtypes(self):
        self.check(ops.spark_weights, *operands((4, 64), (4, 64), jnp.bfloat16))

    # A `where` for several rows, for each its own; few blocks, which refill their ring.
    @parameterized.parameters(
        ((2, 2, 4, 512), (2, 1, 4, 512), jnp.bfloat16, None),
        ((6, 1024), (6, 1024), jnp.float32, Tiles(2, 1, 512, 2)),
    )
    @needs_gpu_interpreter
    def test_gpu(self, shape, where_shape, dtype, tiles):
        fn = functools.partial(_mosaic_gpu.spark_weights, tiles=tiles, grad_tiles=tiles)
        with gpu_interpreted():
            self.check(fn, *operands(shape, where_shape, dtype))

    def test_softplus_of_the_kernel(self):
        x = jnp.linspace(-80, 80, 401)
        got, slope = jax.jit(_mosaic_gpu._softplus)(x)
        wide = np.asarray(x, np.float64)
        np.testing.assert_allclose(got, np.logaddexp(wide, 0), rtol=5e-7)
        np.testing.assert_allclose(slope, 1 / (1 + np.exp(-wide)), rtol=5e-7)

    @needs_gpu_interpreter
    def test_nan_stays_in_its_row(self):
        _, predicted, rest, z, where = operands((5, 512), (5, 512))
        predicted = predicted.at[3:, 7].set(jnp.nan)
        where = where.at[3:, 7].set(True)
        scores = jnp.stack([predicted, rest], axis=-2)
        run = functools.partial(ops.spark_weights, scores, z, where)
        with gpu_interpreted():
            for implementation in ("reference", "mosaic_gpu"):
                nan = np.isnan(run(implementation=implementation))
                self.assertFalse(nan[:3].any())
                self.assertTrue(nan[3:].all())

    @parameterized.parameters(
        ((8, 4, 512), (8, 1, 512), jnp.bfloat16),
        ((3, 4, 4096), (1, 1, 4096), jnp.bfloat16),
        ((2, 3, 200, 1024), (1, 1, 200, 1024), jnp.bfloat16),
        ((2, 3, 40, 8192), (2, 1, 40, 8192), jnp.float32),
        ((1500, 1536), (1500, 1536), jnp.float16),
    )
    @pytest.mark.gpu
    def test_on_a_gpu(self, shape, where_shape, dtype):
        self.check(_mosaic_gpu.spark_weights, *operands(shape, where_shape, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lowers_for_hopper(dtype):
    fn = functools.partial(ops.spark_weights, dtype=dtype, implementation="mosaic_gpu")
    shapes = (4, 2, 8, 1024), (1, 1, 8, 1024)
    rows = jax.eval_shape(lambda: operands(*shapes, jnp.dtype(dtype)))
    step = functools.partial(value_and_gradients, fn)
    exported = jax.export.export(jax.jit(step), platforms=["cuda"])(*rows)
    assert exported.mlir_module().count("@mosaic_gpu") >= 2


@pytest.mark.parametrize(
    ("keys", "scores", "dtype", "reason"),
    [
        (1000, "float32", "float32", "multiple of 512, at most 11776; got 1000"),
        (13824, "float32", "bfloat16", "at most 13312; got 13824"),
        (512, "bfloat16", "bfloat16", "`scores` must be float32; got bfloat16"),
        (512, "float32", "float8_e4m3fn", "`dtype` must be bfloat16, float16 or"),
    ],
)
def test_unsupported_operands(keys, scores, dtype, reason):
    fn = functools.partial(ops.spark_weights, dtype=dtype, implementation="mosaic_gpu")
    scores = jax.ShapeDtypeStruct((4, 2, keys), scores)
    where = jax.ShapeDtypeStruct((1, keys), jnp.bool_)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(fn, scores, 1.0, where)


def test_errors():
    fn, x, where = ops.spark_weights, jnp.ones((3, 2, 8)), jnp.ones((1, 8), bool)
    with pytest.raises(TypeError, match=r"must be floating; got int32\[8\]"):
        fn(jnp.arange(8), 1.0, where)
    for scores in (x[0, 0], x[:, :1]):
        with pytest.raises(ValueError, match="`scores` must have shape"):
            fn(scores, 1.0, where)
    with pytest.raises(TypeError, match="`where` must be bool; got float32"):
        fn(x, 1.0, x[:, 0])
    for shape in ((8,), (3, 1), (2, 8)):
        with pytest.raises(ValueError, match=r"`where` must have the shape \(3, 8\)"):
            fn(x, 1.0, jnp.ones(shape, bool))
    for shape in ((8,), (2, 1), (1, 3, 1)):
        with pytest.raises(ValueError, match=r"`z` must be a scalar or .*\(3, 1\)"):
            fn(x, jnp.ones(shape), where)


@pytest.mark.parametrize("num_rows, by_kernel", [(1023, False), (1024, True)])
def test_few_rows_take_the_reference(num_rows, by_kernel, monkeypatch):
    monkeypatch.setattr(_platform, "visible_kernels", lambda: {"mosaic_gpu"})
    scores, where = jnp.zeros((num_rows, 2, 512)), jnp.ones((1, 512), jnp.bool_)
    jaxpr = jax.make_jaxpr(ops.spark_weights)(scores, 0.0, where)
    assert ("run_scoped" in str(jaxpr)) == by_kernel  # a kernel's own memory

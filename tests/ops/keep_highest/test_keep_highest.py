"""keep_highest: each of its ways against a sorted list of Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jaxlib.mlir import ir

from sparsejax import ops
from sparsejax.ops.keep_highest import _reference
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter

WAYS = (_reference._by_sorting, _reference._by_counting)


def oracle(rows, num_kept):
    """Numbers from the highest, NaN after them; of equal ones those further left."""
    kept = np.zeros(rows.shape, bool)
    for at in np.ndindex(rows.shape[:-1]):
        row = rows[at]
        numbers = [i for i in range(len(row)) if not np.isnan(row[i])]
        order = sorted(numbers, key=lambda i, row=row: (-row[i], i))
        order += [i for i in range(len(row)) if np.isnan(row[i])]
        kept[*at, order[: np.broadcast_to(num_kept, rows.shape[:-1])[at]]] = True
    return kept


def rows(size, lead=(2, 3)):
    """Many ties, both zeros, and a row without."""
    rng = np.random.default_rng(size)
    found = rng.integers(-2, 3, (*lead, size)).astype(np.float32)
    for value in (np.nan, np.inf, -np.inf, -0.0):
        found[rng.random(found.shape) < 0.15] = value
    found[0] = rng.normal(size=found[0].shape)
    return found


class WaysTest(parameterized.TestCase):
    @parameterized.product(size=[1, 2, 9, 70])
    def test_keeps_the_highest(self, size):
        values = rows(size)
        for num_kept in {1, size // 2 or 1, size}:
            want = oracle(values, num_kept)
            for way in WAYS:
                got = jax.jit(functools.partial(way, num_kept=num_kept))(values)
                np.testing.assert_array_equal(got, want)

    def test_keeps_as_many_as_each_row_asks(self):
        values, counts = rows(20), np.arange(6).reshape(2, 3) * 5  # up to more than all
        for way in WAYS:
            got = jax.jit(way)(values, counts)
            np.testing.assert_array_equal(got, oracle(values, counts))

    @parameterized.parameters((jnp.float32, 100), (jnp.bfloat16, 256))
    @needs_gpu_interpreter
    def test_gpu(self, dtype, size):
        values = jnp.asarray(rows(size, (5, 15)), dtype)  # two programs
        counts = jnp.asarray(np.arange(75).reshape(5, 15) * 2)
        with gpu_interpreted():
            got = ops.keep_highest(values, counts, implementation="mosaic_gpu")
        want = oracle(np.asarray(values, np.float32), counts)
        np.testing.assert_array_equal(got, want)

    @parameterized.parameters((jnp.float32, 1), (jnp.float32, 100), (jnp.bfloat16, 256))
    @pytest.mark.gpu
    def test_on_a_gpu(self, dtype, size):
        values = jnp.asarray(rows(size, (20, 150)), dtype)
        values = values.at[10:].set(-jnp.abs(values[10:]))  # none above 0
        counts = jnp.asarray(np.arange(3000).reshape(20, 150) % (size + 2))
        got = ops.keep_highest(values, counts, implementation="mosaic_gpu")
        want = oracle(np.asarray(values, np.float32), counts)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lowers_for_hopper(dtype, monkeypatch):
    signs = set()
    compare = FragmentedArray._compare

    def recorded(array, *operands, **predicates):
        if array.mlir_dtype == ir.IntegerType.get_signless(32):
            signs.add(array.is_signed)
        return compare(array, *operands, **predicates)

    def layers(x):  # mapped, and beside a gradient
        kept = jax.vmap(functools.partial(ops.keep_highest, **options))(x)
        return jnp.sum(jnp.where(kept, x, 0).astype(jnp.float32))

    monkeypatch.setattr(FragmentedArray, "_compare", recorded)
    options = {"num_kept": 3, "implementation": "mosaic_gpu"}
    x = jax.ShapeDtypeStruct((2, 96, 200), dtype)
    exported = jax.export.export(jax.jit(jax.grad(layers)), platforms=["cuda"])(x)
    assert "mosaic_gpu" in exported.mlir_module()
    assert signs == {True}  # the interpreter does not tell


def test_errors():
    x, fn = jnp.ones((2, 300)), ops.keep_highest
    with pytest.raises(TypeError, match=r"`x` must be floating; got int32\[3\]"):
        fn(jnp.arange(3), 1)
    with pytest.raises(ValueError, match=r"rows with entries; got shape \(2, 0\)"):
        fn(x[:, :0], 1)
    with pytest.raises(ValueError, match="`num_kept` must be at least 1; got 0"):
        fn(x, 0)
    with pytest.raises(TypeError, match="of integers; got ~float32"):
        fn(x, 1.5)
    with pytest.raises(ValueError, match=r"to the rows, \(2,\); got shape \(3,\)"):
        fn(x, jnp.array([1, 2, 3]))
    with pytest.raises(NotImplementedError, match=r"at most 256 .* shape \(2, 300\)"):
        fn(x, 1, implementation="mosaic_gpu")

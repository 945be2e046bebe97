"""changed_weights, update_sparsity and dense_update."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import metrics

WEIGHT = st.floats(-4, 4, width=32) | st.sampled_from([0.0, 1.0, 2.0, 1 + 2**-7, 1e-30])
WEIGHTS = st.lists(WEIGHT, min_size=6, max_size=6)


def steps_apart(a, b):
    """Numbers of bfloat16 from the one to the other, counted by nextafter."""
    at, to = (np.asarray(x, ml_dtypes.bfloat16) for x in (min(a, b), max(a, b)))
    count = 0
    while at != to:
        at, count = np.nextafter(at, np.asarray(np.inf, ml_dtypes.bfloat16)), count + 1
    return count


@given(before=WEIGHTS, after=WEIGHTS)
def test_exact_equals_numpy(before, after):
    before, after = np.array(before, np.float32), np.array(after, np.float32)
    got = metrics.update_sparsity(before, after)
    assert got.num_kept == np.count_nonzero(before != after)
    assert metrics.update_sparsity(after, before) == got
    narrow = [x.astype(ml_dtypes.bfloat16) for x in (before, after)]
    got = metrics.update_sparsity(before, after, dtype=jnp.bfloat16)
    assert got.num_kept == np.count_nonzero(narrow[0] != narrow[1])
    near = np.abs(before - after) <= 0.5
    got = metrics.changed_weights(before, after, mode="atol", atol=0.5)
    np.testing.assert_array_equal(got, ~near)


@pytest.mark.parametrize("ulps", [1, 2, 3])
def test_ulps(ulps):
    # within one binade, where a spacing is one thing
    grid = np.array([1 + k * 2**-7 for k in range(6)], np.float32)
    before, after = (x.ravel() for x in np.meshgrid(grid, grid))
    got = metrics.changed_weights(
        before, after, mode="ulp", ulps=ulps, dtype=jnp.bfloat16
    )
    far = [steps_apart(a, b) >= ulps for a, b in zip(before, after, strict=True)]
    np.testing.assert_array_equal(got, far)


@pytest.mark.parametrize(
    ("size", "equal", "near"),
    [
        (1e-6, 98.1, 100),
        (1e-5, 84.5, 89.9),
        (3e-5, 69.6, 69.6),
        (1e-4, 11.8, 11.8),
        (3e-4, 0, 0),
    ],
)
def test_what_rounding_alone_leaves(size, equal, near):
    # bfloat16 weights of 0.02, each changed by as much in float32: percent, to a point
    before = 0.02 * jax.random.normal(jax.random.key(0), (40_000,))
    before = before.astype(jnp.bfloat16).astype(jnp.float32)
    dense = metrics.dense_update(before, before + size, key=jax.random.key(1))
    assert metrics.update_sparsity(before, dense).sparsity < 1e-3
    rounded = {"dtype": jnp.bfloat16}
    got = metrics.update_sparsity(before, dense, **rounded)
    assert 100 * got.sparsity == pytest.approx(equal, abs=1)
    got = metrics.update_sparsity(before, dense, mode="atol", **rounded)
    assert 100 * got.sparsity == pytest.approx(near, abs=1)


class UpdatesTest(parameterized.TestCase):
    def test_a_tree(self):
        before = {
            "a": jnp.zeros((2, 3)),
            "b": None,
            "c": jnp.arange(3),
            "d": jnp.ones(4, jnp.bfloat16),
        }
        after = {
            "a": jnp.zeros((2, 3)).at[0, 1].set(1e-6),
            "b": None,
            "c": jnp.zeros(3, int),
            "d": jnp.ones(4),
        }
        got = jax.jit(metrics.changed_weights)(before, after)
        a = jnp.zeros((2, 3), bool).at[0, 1].set(True)
        want = {"a": a, "b": None, "c": None, "d": jnp.zeros(4, bool)}
        chex.assert_trees_all_equal(got, want)
        report = metrics.update_sparsity(before, after)
        self.assertEqual(report.sparsity, 0.9)  # of all weights, no mean over leaves
        self.assertEqual([leaf.num_kept for leaf in report.leaves], [1, 0])
        by_order = metrics.update_sparsity(before, list(after.values()))
        self.assertEqual(by_order, report)

    def test_what_is_not_finite(self):
        values = jnp.array([jnp.nan, jnp.inf, -jnp.inf, jnp.inf])
        other = values.at[3].set(-jnp.inf)
        for mode in ("exact", "atol", "ulp"):
            got = metrics.changed_weights(values, other, mode=mode)
            np.testing.assert_array_equal(got, [True, False, False, True])

    def test_dense_update_has_the_size_of_each_leaf(self):
        before = {"a": jnp.ones((4, 8)), "b": jnp.zeros(16), "c": jnp.arange(3)}
        after = {"a": before["a"].at[0, 0].add(3), "b": before["b"] + 2, "c": None}
        with self.assertRaisesRegex(ValueError, r"None in `after` only at \['c'\]"):
            metrics.dense_update(before, after, key=jax.random.key(0))
        after["c"] = jnp.zeros(3, int)
        got = metrics.dense_update(before, after, key=jax.random.key(0))
        chex.assert_trees_all_equal_shapes_and_dtypes(got, before)
        np.testing.assert_allclose(abs(got["a"] - 1), (9 / 32) ** 0.5, rtol=1e-6)
        np.testing.assert_array_equal(abs(got["b"]), 2)
        self.assertLess(0, jnp.sum(got["b"] > 0))
        self.assertGreater(16, jnp.sum(got["b"] > 0))
        np.testing.assert_array_equal(got["c"], before["c"])

    def test_subnormals_have_one_spacing(self):
        a, b = ({"k": jnp.full(2, 2.0**-e, jnp.float16)} for e in (24, 23))
        for ulps in (1, 2):
            found = metrics.changed_weights(a, b, mode="ulp", ulps=ulps)["k"]
            np.testing.assert_array_equal(found, ulps == 1)

    def test_refusals(self):
        weight = jnp.ones(3)
        unknown: Any = "near"
        with self.assertRaisesRegex(ValueError, "`mode` must be"):
            metrics.update_sparsity(weight, weight, mode=unknown)
        with self.assertRaisesRegex(ValueError, "`atol` must be at least 0"):
            metrics.update_sparsity(weight, weight, atol=-1.0)
        with self.assertRaisesRegex(ValueError, "`ulps` at least 1"):
            metrics.update_sparsity(weight, weight, ulps=0)
        with self.assertRaisesRegex(ValueError, "`dtype` must be .* got int8"):
            metrics.changed_weights(weight, weight, dtype=jnp.int8)
        with self.assertRaisesRegex(ValueError, r"one shape.*\(3,\).*\(2,\)"):
            metrics.changed_weights(weight, jnp.ones(2))
        with self.assertRaisesRegex(TypeError, "float32 or wider; got bfloat16"):
            narrow = weight.astype(jnp.bfloat16)
            metrics.dense_update(narrow, narrow, key=jax.random.key(0))

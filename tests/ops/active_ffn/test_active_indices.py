"""active_indices against `np.flatnonzero`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.ops import active_indices
from sparsejax.ops.active_ffn import _indices

indices_of = jax.jit(active_indices, static_argnames="capacity")


def oracle(active, capacity):
    found = np.flatnonzero(active)
    listed = found[:capacity]
    last = listed[-1] if len(listed) else 0
    padded = np.full(capacity, last)
    padded[: len(listed)] = listed
    return padded, len(listed), len(found) > capacity


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


class ActiveIndicesTest(parameterized.TestCase):
    @parameterized.parameters((1, 1), (33, 64), (1024, 1), (1025, 2000), (40_000, 4000))
    def test_matches_oracle(self, size, capacity):
        for density in (0.0, 0.08, 0.5, 1.0):
            active = np.random.default_rng(size).random(size) < density
            got = indices_of(active, capacity=capacity)
            assert_same(got, oracle(active, capacity))
            self.assertEqual([a.dtype for a in got], [jnp.int32, jnp.int32, jnp.bool_])

    @parameterized.parameters(0, 31, 32, 1023, 1024, 2047)
    def test_a_single_neuron(self, neuron):
        active = np.zeros(2048, bool)
        active[neuron] = True
        assert_same(indices_of(active, capacity=3), ([neuron] * 3, 1, False))

    def test_overflow_is_reported_and_the_list_is_full(self):
        active = np.ones(100, bool)
        assert_same(indices_of(active, capacity=100), (np.arange(100), 100, False))
        assert_same(indices_of(active, capacity=99), (np.arange(99), 99, True))

    def test_sums_of_a_gpu(self):
        counts = np.random.default_rng(0).integers(0, 33, 45, np.int32)
        want = np.cumsum([0, *counts])
        for x64 in (False, True):
            with jax.enable_x64(x64):
                got = _indices._sums(jnp.asarray(counts))
            np.testing.assert_array_equal(got, want)
            self.assertEqual(got.dtype, jnp.int32)

    def test_vmap(self):
        active = np.random.default_rng(0).random((3, 70)) < [[0.1], [0.5], [0.9]]
        fn = functools.partial(active_indices, capacity=40)
        for i, got in enumerate(zip(*jax.jit(jax.vmap(fn))(active), strict=True)):
            assert_same(got, oracle(active[i], 40))

    def test_does_not_retrace(self):
        fn = jax.jit(chex.assert_max_traces(active_indices, n=1), static_argnums=1)
        for seed in range(3):
            active = np.random.default_rng(seed).random(50) < 0.3
            assert_same(fn(active, 20), oracle(active, 20))

    def test_errors(self):
        with pytest.raises(TypeError, match=r"`active` must be bool; got int32\[3\]"):
            active_indices(jnp.ones(3, jnp.int32), 2)
        with pytest.raises(ValueError, match=r"one axis.*got shape \(2, 3\).*jnp.any"):
            active_indices(jnp.ones((2, 3), bool), 2)
        with pytest.raises(ValueError, match=r"one axis.*got shape \(0,\)"):
            active_indices(jnp.ones(0, bool), 2)
        with pytest.raises(ValueError, match="`capacity` must be at least 1; got 0"):
            active_indices(jnp.ones(3, bool), 0)
        for wrong in (2.5, True):
            with pytest.raises(
                TypeError, match=f"`capacity` .* Python int; got {wrong}"
            ):
                active_indices(jnp.ones(3, bool), wrong)


@settings(max_examples=50)
@given(flags=st.lists(st.booleans(), min_size=97, max_size=97))
def test_any_flags(flags):
    assert_same(indices_of(np.array(flags), capacity=30), oracle(np.array(flags), 30))

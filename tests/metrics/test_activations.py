"""Counts of activations against loops."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax import metrics

counts_of = jax.jit(metrics.activation_counts)


def sparse_activations(shape, seed=0, dtype=np.float32):
    """ReLU of normal numbers, about half of them zero."""
    a = np.maximum(np.random.default_rng(seed).normal(size=shape), 0).astype(dtype)
    a.flat[0] = -0.0  # equal to zero
    return a


def counts_oracle(a, where=None):
    """Li et al., 2022: (nonzeros, entries, per_neuron, tokens)."""
    per_neuron, tokens = [0] * a.shape[-1], 0
    for index in np.ndindex(a.shape[:-1]):
        if where is not None and not where[index]:
            continue
        tokens += 1
        for i, value in enumerate(a[index]):
            per_neuron[i] += value != 0
    return sum(per_neuron), tokens * a.shape[-1], per_neuron, tokens


def assert_counts(got, want):
    nonzeros, entries, per_neuron, tokens = want
    assert (int(got.nonzeros), int(got.entries)) == (nonzeros, entries)
    np.testing.assert_array_equal(got.per_neuron, per_neuron)
    assert int(got.tokens) == tokens
    np.testing.assert_allclose(got.density, nonzeros / max(entries, 1), rtol=1e-6)
    frequency = np.array(per_neuron) / max(tokens, 1)
    np.testing.assert_allclose(got.neuron_frequency, frequency, rtol=1e-6)


class CountsTest(parameterized.TestCase):
    @parameterized.product(
        shape=[(5,), (4, 3), (2, 3, 7)],
        dtype=[jnp.float32, jnp.bfloat16],
        masked=[False, True],
    )
    def test_matches_loop(self, shape, dtype, masked):
        a = jnp.asarray(sparse_activations(shape), dtype)
        where = np.random.default_rng(1).random(shape[:-1]) < 0.6 if masked else None
        got = counts_of(a, where=where)
        assert_counts(got, counts_oracle(np.asarray(a, np.float32), where))
        self.assertEqual(got.per_neuron.dtype, jnp.uint32)
        self.assertEqual(got.density.dtype, jnp.float32)

    def test_relu_of_normal_is_half_dense(self):
        a = jax.nn.relu(jax.random.normal(jax.random.key(0), (2000, 100)))
        self.assertAlmostEqual(float(counts_of(a).density), 0.5, delta=0.005)
        density = jax.jit(metrics.activation_density)(a)
        self.assertAlmostEqual(float(density.mean()), 0.5, delta=0.005)

    def test_padding_does_not_count(self):
        a = sparse_activations((3, 4))
        padded = np.concatenate([a, np.full((2, 4), np.nan, np.float32)])
        got = counts_of(padded, where=np.arange(5) < 3)
        chex.assert_trees_all_equal(got, counts_of(a))
        # a mask of sequences is broadcast to their tokens
        rows = np.array([[True], [False]])
        got = counts_of(np.stack([a, a + 1]), where=rows)
        chex.assert_trees_all_equal(got, counts_of(a))

    def test_many_entries_do_not_overflow(self):
        # two tokens of 2**32 - 1 fit; their entries do not fit 32 bits
        full = metrics.ActivationCounts(
            per_neuron=jnp.array([2**32 - 1, 2**31, 0, 0], jnp.uint32),
            tokens=jnp.array(2**32 - 1, jnp.uint32),
        )
        self.assertEqual(int(full.nonzeros), 2**32 - 1 + 2**31)
        self.assertEqual(int(full.entries), 4 * (2**32 - 1))
        self.assertAlmostEqual(float(full.density), 0.375, delta=1e-6)

    def test_nothing_counted(self):
        zero = counts_of(jnp.zeros((0, 3)))
        assert_counts(zero, (0, 0, [0, 0, 0], 0))
        some = counts_of(sparse_activations((4, 3)))
        chex.assert_trees_all_equal(jax.tree.map(jnp.add, zero, some), some)

    def test_layers_stack(self):
        a = sparse_activations((3, 6, 4))
        _, scanned = jax.lax.scan(lambda c, x: (c, counts_of(x)), None, jnp.asarray(a))
        chex.assert_trees_all_equal(scanned, jax.vmap(counts_of)(a))
        chex.assert_shape([scanned.density, scanned.nonzeros, scanned.entries], (3,))
        chex.assert_shape(scanned.neuron_frequency, (3, 4))
        for layer in range(3):
            got = jax.tree.map(lambda x, layer=layer: x[layer], scanned)
            assert_counts(got, counts_oracle(a[layer]))
        density = jax.jit(lambda counts: counts.density)(scanned)
        chex.assert_trees_all_close(density, scanned.density)

    def test_devices_add_up(self):
        a = jnp.asarray(sparse_activations((16, 4)))
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

        def count(part):
            return jax.lax.psum(metrics.activation_counts(part), "data")

        total = jax.jit(
            jax.shard_map(count, mesh=mesh, in_specs=P("data"), out_specs=P())
        )
        chex.assert_trees_all_equal(total(a), counts_of(a))

    def test_errors(self):
        a = jnp.ones((2, 3))
        with self.assertRaisesRegex(ValueError, r"at least one neuron; got shape \(\)"):
            metrics.activation_counts(jnp.float32(1))
        with self.assertRaisesRegex(ValueError, r"broadcast to \(2,\).*bool\[2,3\]"):
            metrics.activation_counts(a, where=jnp.ones((2, 3), bool))
        with self.assertRaisesRegex(TypeError, "got float32. Pass `where != 0`"):
            metrics.activation_counts(a, where=jnp.ones(2))
        with self.assertRaisesRegex(ValueError, "fewer than 2.*4294967296.*in parts"):
            shape = jax.ShapeDtypeStruct((2**16, 2**16, 1), jnp.bfloat16)
            jax.eval_shape(metrics.activation_counts, shape)


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 99))
def test_any_split_gives_the_same_counts(cuts, seed):
    a = sparse_activations((12, 3), seed)
    where = np.random.default_rng(seed).random(12) < 0.7
    edges = [0, *sorted(cuts), 12]
    # eager: each length would compile anew
    parts = [
        metrics.activation_counts(a[start:end], where=where[start:end])
        for start, end in itertools.pairwise(edges)
    ]
    total = functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)
    assert_counts(total, counts_oracle(a, where))


class DensityTest(parameterized.TestCase):
    @parameterized.product(axis=[0, 1, 2, -1, -2], masked=[False, True])
    def test_matches_loop(self, axis, masked):
        a = sparse_activations((2, 3, 5))
        moved = np.moveaxis(a, axis, -1)
        where = np.random.default_rng(1).random(moved.shape[:-1]) < 0.6
        want = np.zeros(moved.shape[:-1], np.float32)
        for index in np.ndindex(want.shape):
            if where[index] or not masked:
                values = moved[index]
                want[index] = sum(v != 0 for v in values) / len(values)
        density = jax.jit(metrics.activation_density, static_argnames="axis")
        got = density(a, where=where if masked else None, axis=axis)
        chex.assert_trees_all_close(got, want)
        self.assertEqual(got.dtype, jnp.float32)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, r"got axis=2 for shape \(2, 3\)"):
            metrics.activation_density(jnp.ones((2, 3)), axis=2)
        with self.assertRaisesRegex(ValueError, r"at least one; got axis=-1"):
            metrics.activation_density(jnp.ones((2, 0)))
        with self.assertRaisesRegex(ValueError, r"broadcast to \(2,\)"):
            metrics.activation_density(jnp.ones((2, 3)), where=jnp.ones(3, bool))


class UnionTest(parameterized.TestCase):
    @parameterized.product(batch=[1, 2, 3, 6], masked=[False, True])
    def test_matches_loop(self, batch, masked):
        a = sparse_activations((2, 6, 10)) * (sparse_activations((2, 6, 10), 1) > 0.5)
        where = np.random.default_rng(2).random((2, 6)) < 0.7
        want = np.zeros((2, 6 // batch), np.float32)
        for row, group in np.ndindex(want.shape):
            used = set()
            for token in range(group * batch, (group + 1) * batch):
                if where[row, token] or not masked:
                    used |= {i for i in range(10) if a[row, token, i] != 0}
            want[row, group] = len(used) / 10
        union = jax.jit(metrics.union_density, static_argnames="batch")
        got = union(a, batch=batch, where=where if masked else None)
        chex.assert_trees_all_close(got, want)
        if batch == 1 and not masked:
            chex.assert_trees_all_close(got, metrics.activation_density(a))

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "number of tokens, 6; got 4"):
            metrics.union_density(jnp.ones((6, 2)), 4)
        with self.assertRaisesRegex(ValueError, "number of tokens, 6; got 0"):
            metrics.union_density(jnp.ones((6, 2)), 0)
        with self.assertRaisesRegex(ValueError, r"tokens, d_ff\]; got shape \(6,\)"):
            metrics.union_density(jnp.ones(6), 1)

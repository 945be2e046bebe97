"""CETT and its threshold (Luo et al., 2024) against loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax import metrics

cett = jax.jit(metrics.cett)
cett_threshold = jax.jit(metrics.cett_threshold, static_argnames="num_steps")


def layer(tokens=6, d_ff=12, d_model=5, seed=0):
    """Gated activations and an output kernel whose rows have different norms."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(tokens, d_ff)) * np.maximum(rng.normal(size=(tokens, d_ff)), 0)
    w_out = rng.normal(size=(d_ff, d_model)) * rng.uniform(0.2, 2, size=(d_ff, 1))
    return a.astype(np.float32), w_out.astype(np.float32)


def norms_of(a, w_out):
    """What each neuron contributes to each token."""
    return np.abs(a) * np.linalg.norm(w_out.astype(np.float64), axis=-1)


def cett_oracle(a, w_out, threshold, where=None):
    """Token by token and neuron by neuron, in float64."""
    a, w_out = a.astype(np.float64), w_out.astype(np.float64)
    ratios = []
    for token in range(len(a)):
        if where is not None and not where[token]:
            continue
        whole, weak = np.zeros(w_out.shape[1]), np.zeros(w_out.shape[1])
        for i in range(len(w_out)):
            term = a[token, i] * w_out[i]
            whole += term
            if abs(a[token, i]) * np.sqrt(sum(w_out[i] ** 2)) <= threshold:
                weak += term
        if np.linalg.norm(whole) > 0:
            ratios.append(np.linalg.norm(weak) / np.linalg.norm(whole))
    return np.mean(ratios) if ratios else 0.0


class CettTest(parameterized.TestCase):
    @parameterized.product(
        quantile=[0.1, 0.5, 0.8, 0.95], masked=[False, True], seed=[0, 1]
    )
    def test_matches_loop(self, quantile, masked, seed):
        a, w_out = layer(seed=seed)
        where = np.array([True, False, True, True, False, True]) if masked else None
        v = np.sort(norms_of(a, w_out).ravel())
        at = int(quantile * v.size)
        threshold = (v[at - 1] + v[at]) / 2  # between norms: no tie to round
        got = cett(a, w_out, threshold, where=where)
        want = cett_oracle(a, w_out, threshold, where)
        np.testing.assert_allclose(got, want, rtol=2e-6)
        self.assertEqual((got.dtype, got.shape), (jnp.float32, ()))

    def test_ends(self):
        a, w_out = layer()
        a = np.where(a == 0, 1, a)
        v = norms_of(a, w_out)
        self.assertEqual(float(cett(a, w_out, 0.999 * v.min())), 0)
        self.assertEqual(float(cett(a, w_out, 1.001 * v.max())), 1)
        self.assertEqual(float(cett(a, w_out, jnp.inf)), 1)
        self.assertEqual(float(cett(a, w_out, 0)), 0)

    def test_token_axes_are_flattened(self):
        a, w_out = layer()
        where = np.array([True, True, False, True, False, True])
        flat = cett(a, w_out, 0.5, where=where)
        got = cett(a.reshape(2, 3, -1), w_out, 0.5, where=where.reshape(2, 3))
        chex.assert_trees_all_close(got, flat)
        one = cett(a[0], w_out, 0.5)  # no token axis at all
        chex.assert_trees_all_close(one, cett(a[:1], w_out, 0.5))

    def test_tokens_without_output_are_left_out(self):
        a, w_out = layer()
        w_out[1] = -w_out[0]
        silent, cancelled = np.zeros((2, 1, 12), np.float32)
        cancelled[:, :2] = 3.0
        # the terms of this one cancel up to rounding
        w_out[2:5] = np.array([[0.1], [0.2], [-0.3]], np.float32) * w_out[2]
        rounded = np.zeros((1, 12), np.float32)
        rounded[:, 2:5] = 1
        more = np.concatenate([a, silent, cancelled, rounded])
        got = cett(more, w_out, 0.5)
        chex.assert_trees_all_close(got, cett(a, w_out, 0.5), rtol=1e-6)
        self.assertEqual(float(cett(silent, w_out, 0.5)), 0)
        self.assertEqual(float(cett(np.concatenate([silent, rounded]), w_out, 9.0)), 0)

    def test_padding_may_be_nan(self):
        a, w_out = layer()
        padded = np.concatenate([a, np.full_like(a[:1], np.nan)])
        where = np.arange(len(padded)) < len(a)
        got = cett(padded, w_out, 0.5, where=where)
        chex.assert_trees_all_close(got, cett(a, w_out, 0.5))
        self.assertTrue(np.isnan(cett(padded, w_out, 0.5)))
        target = cett_threshold(padded, w_out, 0.2, where=where)
        chex.assert_trees_all_close(target, cett_threshold(a, w_out, 0.2))
        self.assertTrue(np.isnan(cett_threshold(padded, w_out, 0.2)))

    @parameterized.parameters(np.nan, np.inf)
    def test_padding_feeds_no_gradient(self, filler):
        w_out, where = np.eye(2, dtype=np.float32), np.array([True, False])
        grad = jax.jit(jax.grad(metrics.cett, argnums=(0, 1)))
        a = np.array([[4, 3], [filler, 1]], np.float32)
        got = grad(a, w_out, 3.5, where=where)
        a[1] = 0
        chex.assert_trees_all_equal(got, grad(a, w_out, 3.5, where=where))
        chex.assert_tree_all_finite(got)

    def test_bfloat16_is_computed_in_float32(self):
        a, w_out = (jnp.asarray(x, jnp.bfloat16) for x in layer())
        upcast = [np.asarray(x, np.float32) for x in (a, w_out)]
        np.testing.assert_allclose(
            cett(a, w_out, 0.5), cett_oracle(*upcast, 0.5), rtol=2e-6
        )

    def test_gradients(self):
        a, w_out = layer(tokens=3, d_ff=6, d_model=4)
        a[0] = 0  # no output
        a[1] = np.where(norms_of(a, w_out)[1] <= 0.5, 0, a[1])  # no error
        grads = jax.jit(jax.grad(metrics.cett, argnums=(0, 1)))(a, w_out, 0.5)
        chex.assert_tree_all_finite(grads)
        step = 1e-6
        for operand, grad in zip((0, 1), grads, strict=True):
            x = (a, w_out)[operand]
            want = np.zeros(x.shape)
            for index in np.ndindex(x.shape):
                if operand == 0 and index[0] < 2:
                    continue  # at a zero norm there is no derivative
                ends = []
                for sign in (-1, 1):
                    moved = [a.astype(np.float64), w_out.astype(np.float64)]
                    moved[operand][index] += sign * step
                    ends.append(cett_oracle(*moved, 0.5))
                want[index] = (ends[1] - ends[0]) / (2 * step)
            if operand == 1:
                np.testing.assert_allclose(grad, want, atol=1e-4)
            else:
                np.testing.assert_allclose(grad[2:], want[2:], atol=1e-4)

    def test_errors(self):
        a, w_out = jnp.ones((2, 3)), jnp.ones((3, 4))
        for fn in (metrics.cett, metrics.cett_threshold):
            with self.assertRaisesRegex(ValueError, r"w_out float32\[4,3\]. Transpose"):
                fn(a, w_out.T, 0.5)
            with self.assertRaisesRegex(ValueError, r"broadcast to \(2,\)"):
                fn(a, w_out, 0.5, where=jnp.ones(3, bool))
            with self.assertRaisesRegex(TypeError, "`where` must be bool.*got int32"):
                fn(a, w_out, 0.5, where=jnp.ones(2, jnp.int32))
            with self.assertRaisesRegex(ValueError, r"scalar; got shape \(2,\)"):
                fn(a, w_out, jnp.ones(2))
        for target in (-0.1, np.nan):
            with self.assertRaisesRegex(ValueError, f"at least 0.*got {target}"):
                metrics.cett_threshold(a, w_out, target)
        for num_steps in (0, 32):
            with self.assertRaisesRegex(ValueError, rf"\[1, 31\]; got {num_steps}"):
                metrics.cett_threshold(a, w_out, 0.5, num_steps=num_steps)
        with self.assertRaisesRegex(ValueError, r"threshold float32\[2\]"):
            metrics.cett_neuron_thresholds(jnp.ones(2), w_out)
        with self.assertRaisesRegex(ValueError, r"w_out float32\[4\]"):
            metrics.cett_neuron_thresholds(0.1, jnp.ones(4))


class ThresholdTest(parameterized.TestCase):
    @parameterized.product(target=[0.0, 0.05, 0.2, 0.5, 0.99], seed=[0, 1])
    def test_matches_exhaustive_search(self, target, seed):
        # Nothing cancels where all is positive, so CETT is monotone.
        a, w_out = map(np.abs, layer(seed=seed))
        v = np.unique(norms_of(a, w_out))
        errors = np.array([cett_oracle(a, w_out, t * (1 + 1e-12)) for t in v])
        self.assertTrue(np.all(np.diff(errors) >= 0))
        first_too_large = v[errors > target][0]
        got = float(cett_threshold(a, w_out, target))
        # the largest threshold is the last number before that norm
        self.assertLess(got, first_too_large * (1 + 1e-6))
        self.assertGreater(got, first_too_large * (1 - 2**-15))
        exact = float(cett_threshold(a, w_out, target, num_steps=31))
        np.testing.assert_allclose(exact, first_too_large, rtol=1e-6)

    @parameterized.product(target=[0.05, 0.2, 0.6], seed=[0, 1, 2])
    def test_brackets_the_target(self, target, seed):
        a, w_out = layer(tokens=20, seed=seed)
        threshold = cett_threshold(a, w_out, target)
        self.assertLessEqual(float(cett(a, w_out, threshold)), target)
        above = cett(a, w_out, threshold * (1 + 2**-15))
        self.assertGreater(float(above), target)

    def test_monotone_in_the_target(self):
        a, w_out = layer(tokens=20)
        targets = jnp.linspace(0, 1, 20)
        got = jax.jit(jax.vmap(metrics.cett_threshold, (None, None, 0)))(
            a, w_out, targets
        )
        self.assertTrue(np.all(np.diff(got) >= 0))
        np.testing.assert_allclose(got[-1], norms_of(a, w_out).max(), rtol=1e-6)

    @parameterized.parameters(4.0, 0.125, 3.0)
    def test_scale_invariance(self, scale):
        a, w_out = layer(tokens=20)
        scaled = a * np.float32(scale), w_out / np.float32(scale)
        kept = []
        for x, w in ((a, w_out), scaled):
            threshold = cett_threshold(x, w, 0.2)
            kept.append(np.abs(x) > metrics.cett_neuron_thresholds(threshold, w))
        np.testing.assert_array_equal(*kept)

    def test_equal_norms_rank_by_magnitude(self):
        a, w_out = layer(tokens=20)
        w_out = 0.7 * w_out / np.linalg.norm(w_out, axis=1, keepdims=True)
        threshold = cett_threshold(a, w_out, 0.2)
        tau = metrics.cett_neuron_thresholds(threshold, w_out)
        np.testing.assert_allclose(tau, float(threshold) / 0.7, rtol=1e-6)
        weak = norms_of(a, w_out) <= float(threshold)
        self.assertLess(np.abs(a)[weak].max(), np.abs(a)[~weak].min())

    @parameterized.parameters(0.0, 0.01, 0.2)
    def test_dead_neurons_are_weak(self, target):
        a, w_out = layer(tokens=30)
        a = np.maximum(a, 0)
        a[:, 3] = 0
        w_out[5] = 0  # writes nothing, however active it is
        threshold = cett_threshold(a, w_out, target)
        tau = metrics.cett_neuron_thresholds(threshold, w_out)
        self.assertEqual(float(tau[5]), np.inf)
        kept = metrics.activation_counts(jnp.where(np.abs(a) > tau, a, 0.0))
        zeros = metrics.activation_counts(a)
        self.assertEqual(int(kept.per_neuron[3]), 0)
        self.assertEqual(int(kept.per_neuron[5]), 0)
        self.assertTrue(np.all(kept.per_neuron <= zeros.per_neuron))
        if target:
            self.assertLess(float(kept.density), float(zeros.density))

    def test_neuron_thresholds_give_the_weak_set(self):
        a, w_out = layer(tokens=50)
        threshold = float(cett_threshold(a, w_out, 0.2))
        tau = jax.jit(metrics.cett_neuron_thresholds)(threshold, w_out)
        self.assertEqual((tau.shape, tau.dtype), ((12,), jnp.float32))
        strong = norms_of(a, w_out) > threshold
        np.testing.assert_array_equal(np.abs(a) > tau, strong)
        kept = jnp.where(np.abs(a) > tau, a, 0)
        errors = np.linalg.norm((a - kept) @ w_out, axis=1)
        ratio = np.mean(errors / np.linalg.norm(a @ w_out, axis=1))
        self.assertLessEqual(ratio, 0.2 + 1e-6)

    def test_stacked_layers(self):
        layers = [layer(seed=seed) for seed in range(3)]
        a, w_out = (np.stack(x) for x in zip(*layers, strict=True))
        fn = jax.vmap(lambda a, w: metrics.cett_threshold(a, w, 0.2))
        got = jax.jit(fn)(a, w_out)
        want = jnp.stack([cett_threshold(*x, 0.2) for x in layers])
        np.testing.assert_allclose(got, want, rtol=2**-15)
        _, scanned = jax.lax.scan(
            lambda c, x: (c, metrics.cett_threshold(*x, 0.2)), None, (a, w_out)
        )
        np.testing.assert_allclose(scanned, want, rtol=2**-15)
        tau = metrics.cett_neuron_thresholds(got, w_out)
        chex.assert_shape(tau, (3, 12))
        one = metrics.cett_neuron_thresholds(got[1], w_out[1])
        chex.assert_trees_all_close(tau[1], one)

    def test_one_trace_for_all_targets(self):
        fn = jax.jit(chex.assert_max_traces(metrics.cett_threshold, n=1))
        a, w_out = layer()
        for target in (0.1, 0.2, 0.3):
            fn(a, w_out, target)

    @parameterized.product(axis_type=[AxisType.Auto, AxisType.Explicit])
    def test_neurons_on_several_devices(self, axis_type):
        # The sum over neurons must be complete before its norm is taken.
        a, w_out = layer(tokens=8, d_ff=16)
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)

        def put(x, *axes):
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

        sharded = put(a, "data", "model"), put(w_out, "model")
        want = cett(a, w_out, 0.5)
        np.testing.assert_allclose(cett(*sharded, 0.5), want, rtol=1e-6)
        got, want = cett_threshold(*sharded, 0.2), cett_threshold(a, w_out, 0.2)
        np.testing.assert_allclose(got, want, rtol=2**-15)
        where = put(np.arange(8) < 5, "data")
        got = cett(*sharded, 0.5, where=where)
        want = cett(a, w_out, 0.5, where=np.arange(8) < 5)
        np.testing.assert_allclose(got, want, rtol=1e-6)

    def test_no_memory_for_many_thresholds(self):
        a, w_out = jnp.ones((64, 32)), jnp.ones((32, 16))
        compiled = cett_threshold.lower(a, w_out, 0.2).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        self.assertLess(temporary, 8 * a.nbytes)

    def test_gradient_is_zero(self):
        a, w_out = layer()
        grads = jax.grad(metrics.cett_threshold, argnums=(0, 1))(a, w_out, 0.2)
        chex.assert_trees_all_equal(grads, jax.tree.map(np.zeros_like, (a, w_out)))

    def test_no_token(self):
        a, w_out = layer()
        none = np.zeros(len(a), bool)
        self.assertEqual(float(cett_threshold(a, w_out, 0.2, where=none)), 0)
        self.assertEqual(float(cett_threshold(np.zeros_like(a), w_out, 0.2)), 0)
        self.assertEqual(float(cett_threshold(a[:0], w_out, 0.2)), 0)

    def test_an_output_that_cancels_counts_as_none(self):
        w_out = np.array([[1.0], [-1.0]], np.float32)
        self.assertEqual(float(cett_threshold(np.ones((1, 2)), w_out, 0.5)), 0)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), target=st.floats(0, 0.99))
def test_error_at_the_threshold_is_within_the_target(seed, target):
    a, w_out = layer(seed=seed)
    threshold = cett_threshold(a, w_out, target)
    assert cett_oracle(a, w_out, float(threshold)) <= target + 1e-6

"""The Spark FFN against NumPy, as in You et al., 2025, and as in Gemma 3n."""

import statistics

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from sparsejax import nn


def make(k, split, d_model=16, d_ff=96, seed=0, **options):
    return nn.SparkFFN(d_model, d_ff, k=k, split=split, rngs=nnx.Rngs(seed), **options)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def hidden_oracle(layer, x, k):
    gate, up = (
        np.asarray(kernel[...], np.float64)
        for kernel in (layer.gate.kernel, layer.up.kernel)
    )
    x = np.asarray(x, np.float64)
    if layer.split is None:
        first, second = x @ gate, x @ up
    else:
        first, second = x[:, : layer.split] @ gate, x[:, layer.split :] @ up
    d = first.shape[1]
    if k < d:
        z = statistics.NormalDist().inv_cdf(1 - k / d)
        theta = first.mean(1, keepdims=True) + first.std(1, keepdims=True) * z
        first = np.maximum(first - theta, 0)
    return gelu_tanh(first) * second


class SparkFFNTest(parameterized.TestCase):
    @parameterized.parameters((None, 8), (None, 96), (1, 8), (8, 7.5), (8, 96), (15, 8))
    def test_equals_the_oracle(self, split, k):
        layer = make(k, split)
        x = jax.random.normal(jax.random.key(1), (5, 16))
        y, density = nnx.jit(lambda m, x: m(x, with_density=True))(layer, x)
        hidden = hidden_oracle(layer, x, k)
        want = hidden @ np.asarray(layer.down.kernel[...], np.float64)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(density, (hidden != 0).mean(axis=1), rtol=1e-6)
        np.testing.assert_allclose(layer(x), y, rtol=1e-5, atol=1e-6)

    @parameterized.product(
        split=[None, 8], k=[None, 8, 96], dtype=[jnp.float32, jnp.bfloat16]
    )
    def test_scores_and_threshold_make_the_gate(self, split, k, dtype):
        layer = make(13, split, dtype=dtype)
        x = jax.random.normal(jax.random.key(1), (2, 3, 16), dtype)
        scores, threshold = layer.gate_scores(x, k=k)
        self.assertEqual((scores.dtype, threshold.dtype), (dtype, dtype))
        self.assertEqual((scores.shape, threshold.shape), ((2, 3, 96), (2, 3, 1)))
        kept = jax.nn.relu(scores - threshold) if k != 96 else scores
        chex.assert_trees_all_equal(layer.gate_values(x, k=k), jax.nn.gelu(kept))

    def test_has_the_weights_of_a_gated_ffn_of_two_thirds_the_width(self):
        def count(layer):
            return sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)))

        gated = nn.GatedFFN(16, 64, rngs=nnx.Rngs(0))
        self.assertEqual(count(make(8, 8)), count(gated))

    def test_a_known_k_is_static(self):
        self.assertIsInstance(make(jnp.float32(7.5), 8).k, float)

    def test_gradients_equal_finite_differences(self):
        with jax.enable_x64(True):
            graph, state = nnx.split(
                make(9, 8, dtype=jnp.float64, param_dtype=jnp.float64)
            )
            x = jax.random.normal(jax.random.key(1), (3, 16), jnp.float64)

            def loss(state, x):
                return jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))

            options = dict(modes=["rev"], eps=1e-6, atol=1e-4, rtol=1e-4)
            jax.test_util.check_grads(jax.jit(loss), (state, x), order=1, **options)

    def test_layers_of_different_k_share_a_scan(self):
        layers = 3
        ks = jnp.array([4.0, 24.0, 96.0])

        @nnx.vmap(in_axes=0, out_axes=0)
        def create(key):
            return nn.SparkFFN(16, 96, k=8, split=8, rngs=nnx.Rngs(key))

        stacked = create(jax.random.split(jax.random.key(0), layers))
        x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 16)), jnp.float32)

        @nnx.jit
        def scanned(stacked, x):
            @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
            def apply(x, layer, k):
                y, density = layer(x, k=k, with_density=True)
                return x + y, density

            return apply(x, stacked, ks)

        @nnx.jit
        def one_by_one(stacked, x):
            graph, state = nnx.split(stacked)
            for i, k in enumerate((4, 24, 96)):
                layer = nnx.merge(graph, jax.tree.map(lambda s, i=i: s[i], state))
                x = x + layer(x, k=k)
            return x

        got, densities = scanned(stacked, x)
        want = one_by_one(stacked, x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        self.assertEqual(densities.shape, (3, 50))
        np.testing.assert_allclose(densities.mean(axis=1), [4 / 96, 0.25, 1], atol=0.04)

    def test_constant_rows_and_nan(self):
        """Zero variance: nothing survives, and no NaN. A NaN stays in its row."""
        layer = make(8, 8)
        graph, state = nnx.split(layer)

        @jax.jit
        def total(state, x):
            return nnx.merge(graph, state)(x).sum()

        x = jnp.zeros((2, 16))
        self.assertFalse(layer(x).any())
        chex.assert_tree_all_finite(jax.grad(total, argnums=(0, 1))(state, x))
        y = layer(x.at[0, 3].set(jnp.nan))
        self.assertTrue(jnp.isnan(y[0]).all() and not jnp.isnan(y[1]).any())

    def test_density_without_a_threshold_is_one(self):
        layer = nn.GatedFFN(16, 32, rngs=nnx.Rngs(0))
        _, density = layer(jnp.ones((2, 3, 16)), with_density=True)
        np.testing.assert_array_equal(density, np.ones((2, 3)))


@pytest.mark.parametrize(
    ("k", "split", "message"),
    [
        (0.5, 8, "`k` must be at least 1; got k=0.5"),
        (float("nan"), 8, "`k` must be at least 1"),
        (8, 0, "got split=0 and d_model=16"),
        (8, 16, "got split=16 and d_model=16"),
        (8, -3, "got split=-3"),
        (8, 0.5, "`split` must be a Python int; got 0.5"),
        ("8", 8, "`k` must be a number"),
    ],
)
def test_bad_settings_raise(k, split, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(k, split)


@pytest.mark.parametrize("shape", [(2, 8), ()])
def test_inputs_of_another_width_raise(shape):
    for layer in (make(8, 8), nn.GatedFFN(16, 32, rngs=nnx.Rngs(0))):
        name = type(layer).__name__
        with pytest.raises(ValueError, match=rf"\(.*\) for {name} of d_model=16"):
            layer(jnp.ones(shape))


def test_another_activation():
    how = dict(k=4, split=8, activation=jax.nn.relu)
    layer = nn.SparkFFN(16, 32, **how, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 16))
    want = layer.gate_values(x) * layer.up(layer.parts(x)[1])
    np.testing.assert_allclose(layer.hidden(x), want, rtol=1e-5, atol=1e-6)

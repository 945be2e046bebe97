"""The Spark attention layer: rotation of both parts, windows, density, scan."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from sparsejax import attention, nn


def make(k=4, split=4, seed=0, **options):
    return nn.SparkAttention(
        16, 4, k=k, split=split, rngs=nnx.Rngs(seed), head_dim=8, **options
    )


def inputs(batch=2, seq=20):
    x = np.random.default_rng(1).normal(size=(batch, seq, 16))
    return jnp.asarray(x, jnp.float32), jnp.broadcast_to(jnp.arange(seq), (batch, seq))


class SparkAttentionTest(parameterized.TestCase):
    @parameterized.parameters((1, None), (2, 6), (None, 6))
    def test_equals_its_parts(self, num_kv_heads, window):
        layer = make(num_kv_heads=num_kv_heads, window=window)
        x, positions = inputs()
        got, density = nnx.jit(lambda m: m(x, positions, with_density=True))(layer)

        @nnx.jit
        def by_parts(layer):
            def heads(linear):
                return (x @ linear.kernel[...]).reshape(2, 20, -1, 8)

            def rotate(y):  # each part by the frequencies of its own width
                parts = [y[..., :4], y[..., 4:]]
                return jnp.concatenate(
                    [nn.apply_rope(p, positions, base=1e4) for p in parts], -1
                )

            query, key = rotate(heads(layer.query)), rotate(heads(layer.key))
            valid = attention.causal_mask(positions, positions, window=window)
            out, attended = attention.spark_attention(
                query, key, heads(layer.value), valid, k=4, split=4
            )
            return out.reshape(2, 20, -1) @ layer.out.kernel[...], attended

        want, attended = by_parts(layer)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        seen = np.minimum(np.arange(20) + 1, window or 20)
        share = attended.sum(axis=3).mean(axis=1) / seen
        np.testing.assert_allclose(density, share, rtol=1e-5)
        np.testing.assert_array_equal(density[:, :4], np.ones((2, 4)))

    def test_only_distances_count(self):
        layer, call = make(k=100), nnx.jit(nn.SparkAttention.__call__)
        x, positions = inputs()
        np.testing.assert_allclose(
            call(layer, x, positions + 50),
            call(layer, x, positions),
            rtol=1e-3,
            atol=1e-4,
        )

    def test_layers_of_different_k_share_a_scan(self):
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(key):
            return nn.SparkAttention(
                16, 4, k=4, split=4, head_dim=8, rngs=nnx.Rngs(key)
            )

        stacked = create(jax.random.split(jax.random.key(0), 2))
        x, positions = inputs()

        @nnx.jit
        def scanned(stacked, x):
            @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
            def apply(x, layer, k):
                y, density = layer(x, positions, k=k, with_density=True)
                return x + y, density

            return apply(x, stacked, jnp.array([2.0, 100.0]))

        y, density = scanned(stacked, x)
        self.assertTrue(jnp.isfinite(y).all())
        self.assertLess(density[0, :, 10:].mean(), 0.4)
        np.testing.assert_array_equal(density[1], np.ones((2, 20)))

    def test_gradients_are_finite_and_reach_every_kernel(self):
        graph, state = nnx.split(make(k=2))
        x, positions = inputs()

        def loss(state):
            return jnp.sum(nnx.merge(graph, state)(x, positions) ** 2)

        grads = jax.jit(jax.grad(loss))(state)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            self.assertTrue(jnp.isfinite(grad).all() and grad.any(), path)


class DenseAttentionTest(parameterized.TestCase):
    @parameterized.product(window=[None, 1, 5])
    def test_window_equals_a_mask(self, window):
        layer = nn.Attention(16, 4, num_kv_heads=2, window=window, rngs=nnx.Rngs(0))
        x, positions = inputs()
        parts = layer.project(x, positions)
        valid = attention.causal_mask(positions, positions, window=window)
        masked, _ = layer.attend(*parts, valid)
        plain, density = layer.attend(*parts)
        np.testing.assert_allclose(plain, masked, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(density, np.ones((2, 20)))

    def test_the_implementation_serves_whole_sequences(self):
        layer = nn.Attention(16, 4, implementation="cudnn", rngs=nnx.Rngs(0))
        x, positions = inputs()
        parts = layer.project(x, positions)
        valid = attention.causal_mask(positions, positions)
        asked = []

        def attend(query, *rest, implementation, **options):
            asked.append(implementation)
            return query

        with mock.patch.object(jax.nn, "dot_product_attention", attend):
            layer.attend(*parts)
            layer.attend(*parts, valid)  # a cache: cuDNN would read the mask as a bias
        self.assertEqual(asked, ["cudnn", None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be at least 1"),
        ({"split": 0}, "got split=0 and head_dim=8"),
        ({"split": 8}, "got split=8 and head_dim=8"),
        ({"split": 3}, "`split` must be even"),
        ({"split": 4.0}, "`split` must be a Python int; got 4.0"),
        ({"k": "4"}, "`k` must be a number"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 and num_heads=4"),
        ({"window": 0}, "`window` must be at least 1; got 0"),
    ],
)
def test_bad_settings_raise(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(**options)


@pytest.mark.parametrize("shape", [(2, 4, 8), (4, 16)])
def test_inputs_of_another_shape_raise(shape):
    for layer in (make(), nn.Attention(16, 4, rngs=nnx.Rngs(0))):
        words = r"\[batch, seq, d_model\]; got .* for " + type(layer).__name__
        with pytest.raises(ValueError, match=words):
            layer(jnp.ones(shape), jnp.zeros(shape[:2], jnp.int32))


def test_a_query_without_keys_counts_as_dense():
    layer = nn.SparkAttention(16, 2, k=2, split=4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    valid = jnp.tri(4, dtype=bool).at[0].set(False)[None, None]
    _, density = layer.attend(x, x, x, valid)
    assert density[0, 0] == 1

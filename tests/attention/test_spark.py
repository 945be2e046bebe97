"""Spark attention against a loop over queries and keys (You et al., 2025)."""

import functools
import statistics

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import attention
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter


def threshold_oracle(scores, k):
    """mean + std * Q(1 - k/n) of the valid scores; -inf if all of them are kept."""
    n = len(scores)
    if n <= k:
        return -np.inf
    z = statistics.NormalDist().inv_cdf(1 - k / n)
    return scores.mean() + scores.std() * z


def attention_oracle(query, key, value, valid, k, split):
    """One query at a time, float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, num_queries, heads, dim = query.shape
    group = heads // key.shape[2]
    out = np.zeros((batch, num_queries, heads, value.shape[-1]))
    attended = np.zeros((batch, heads, num_queries, key.shape[1]), bool)
    for b, i, h in np.ndindex(batch, num_queries, heads):
        seen = np.flatnonzero(
            np.broadcast_to(valid, (batch, 1, *valid.shape[2:]))[b, 0, i]
        )
        if not len(seen):
            continue
        q, keys = query[b, i, h], key[b, seen, h // group]
        s1 = keys[:, :split] @ q[:split] / np.sqrt(split)
        s2 = keys[:, split:] @ q[split:] / np.sqrt(dim - split)
        kept = (s1 > threshold_oracle(s1, k)) | (s1 == s1.max())
        p = np.where(kept, np.exp(s1 - s1.max()), 0)
        weights = p / p.sum() * np.log1p(np.exp(s2))
        out[b, i, h] = weights @ value[b, seen, h // group]
        attended[b, h, i, seen] = kept
    return out, attended


def operands(batch=2, seq=24, heads=4, kv_heads=2, dim=8, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (batch, seq, heads, dim)),
        jax.random.normal(keys[1], (batch, seq, kv_heads, dim)),
        jax.random.normal(keys[2], (batch, seq, kv_heads, dim)),
    )


def causal(seq, window=None):
    positions = jnp.arange(seq)[None]
    return attention.causal_mask(positions, positions, window=window)


jitted = jax.jit(attention.spark_attention, static_argnames=("k", "split"))


class SparkAttentionTest(parameterized.TestCase):
    @parameterized.parameters(
        # window, split, k, kv_heads
        (None, 4, 1, 2),
        (None, 2, 3.5, 1),
        (7, 6, 3.5, 2),
        (7, 4, 5, 4),
        (None, 4, 100, 2),
    )
    def test_equals_the_oracle(self, window, split, k, kv_heads):
        x = operands(batch=1, seq=16, kv_heads=kv_heads)
        valid = causal(16, window)
        got = jitted(*x, valid, k=k, split=split)
        want = attention_oracle(*x, np.asarray(valid), k, split)
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)

    @parameterized.parameters((2, 2), (6, 1))
    def test_one_query_is_like_the_last_of_many(self, split, kv_heads):
        """Its two scores come from one product."""
        query, key, value = operands(kv_heads=kv_heads)
        valid = causal(24)
        want = jitted(query, key, value, valid, k=3.5, split=split)
        last = query[:, -1:], key, value, valid[:, :, -1:]
        got = jitted(*last, k=3.5, split=split)
        np.testing.assert_array_equal(got[1], want[1][:, :, -1:])
        np.testing.assert_allclose(got[0], want[0][:, -1:], rtol=1e-4, atol=1e-5)

    @pytest.mark.once
    def test_of_few_queries_the_order_of_the_product_is_that_of_the_platform(self):
        """So it is in the gradient, which is the same."""
        query, key, _ = operands(seq=24)
        query = query[:, -1:]

        def loss(query, key):
            return jnp.sum(jnp.sin(attention.scaled_scores(query, key)))

        def plain(query, key):
            key = jnp.repeat(key, 2, axis=2)
            return jnp.sum(jnp.sin(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5))

        grad = jax.jit(jax.grad(loss, (0, 1)))
        for platform, found in (("cpu", "2x2x24x2x1"), ("cuda", "2x2x2x1x24")):
            exported = jax.export.export(grad, platforms=[platform])(query, key)
            self.assertRegex(
                exported.mlir_module(), rf"dot_general.* -> tensor<{found}xf32>"
            )
        want = jax.grad(plain, (0, 1))(query, key)
        chex.assert_trees_all_close(grad(query, key), want, atol=1e-5)

    def test_a_traced_k_gives_the_same(self):
        x, valid = operands(), causal(24)
        run = jax.jit(
            chex.assert_max_traces(
                lambda k: attention.spark_attention(*x, valid, k=k, split=4), n=1
            )
        )
        for k in (1.0, 4.0, 30.0):
            fixed = jitted(*x, valid, k=k, split=4)
            chex.assert_trees_all_close(run(k), fixed, rtol=1e-5, atol=1e-6)

    def test_a_query_without_keys_gives_zeros_and_finite_gradients(self):
        x = operands()
        valid = causal(24).at[:, :, 3].set(False).at[:, :, 0].set(False)

        def loss(x):
            return jnp.sum(attention.spark_attention(*x, valid, k=3, split=4)[0] ** 2)

        out, attended = jitted(*x, valid, k=3, split=4)
        self.assertFalse(out[:, 3].any() or attended[:, :, 3].any())
        self.assertTrue(out[:, 4].any())
        grads = jax.jit(jax.grad(loss))(x)
        chex.assert_tree_all_finite(grads)
        self.assertFalse(grads[0][:, 3].any())

    @pytest.mark.once
    def test_equal_and_two_valued_scores_keep_the_highest(self):
        """Here the threshold alone would leave none, and NaN."""
        query = jnp.ones((1, 1, 1, 4))
        signs = jnp.where(jnp.arange(64) % 2, 1.0, -1.0)
        key = jnp.broadcast_to(signs[None, :, None, None], (1, 64, 1, 4))
        value = jax.random.normal(jax.random.key(0), (1, 64, 1, 4))
        for keys, share in ((key, 0.5), (jnp.ones_like(key), 1.0)):

            def run(q, keys=keys):
                valid = jnp.ones((1, 1, 1, 64), bool)
                return jitted(q, keys, value, valid, k=5, split=2)

            out, attended = run(query)
            self.assertEqual(attended.mean(), share)
            grad = jax.grad(lambda q, run=run: run(q)[0].sum())(query)
            chex.assert_tree_all_finite((out, grad))

    def test_gradients_equal_those_of_a_masked_softmax(self):
        """The selection has no gradient: the same as with the attended keys fixed."""
        x, valid = operands(), causal(24)
        _, attended = jitted(*x, valid, k=4, split=4)

        def plain(query, key, value):
            key, value = (jnp.repeat(y, 2, axis=2) for y in (key, value))
            s1, s2 = (
                jnp.einsum("bqhd,bkhd->bhqk", query[..., p], key[..., p]) / 2
                for p in (slice(4), slice(4, None))
            )
            p = jax.nn.softmax(jnp.where(attended, s1, -1e30)) * jax.nn.softplus(s2)
            return jnp.sum(jnp.sin(jnp.einsum("bhqk,bkhd->bqhd", p, value)))

        def spark(*x):
            return jnp.sum(
                jnp.sin(attention.spark_attention(*x, valid, k=4, split=4)[0])
            )

        grads = [jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*x) for f in (plain, spark)]
        chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-5)

    @pytest.mark.once
    def test_about_k_are_attended(self):
        scores = jax.random.normal(jax.random.key(0), (500, 2048))
        valid = jnp.ones((1, 2048), bool)
        count = attention.spark_selection(scores, valid, k=164).sum(axis=-1)
        self.assertAlmostEqual(float(count.mean()), 164, delta=1.5)
        self.assertAlmostEqual(float(count.std()), 0.172 * 2048**0.5, delta=0.6)

    def test_nan_stays_in_its_row(self):
        x, valid = operands(), causal(24)
        query = x[0].at[0, 5].set(jnp.nan)
        out, _ = jitted(query, *x[1:], valid, k=3, split=4)
        self.assertTrue(jnp.isnan(out[0, 5]).all())
        clean, _ = jitted(*x, valid, k=3, split=4)
        chex.assert_trees_all_equal(out.at[0, 5].set(0), clean.at[0, 5].set(0))

    @needs_gpu_interpreter
    def test_gpu(self):
        """Few of many queries, as the interpreter is slow."""
        query, key, value = operands(batch=1, seq=512, heads=2, kv_heads=1)
        query, valid = query[:, ::250], causal(512)[:, :, ::250]

        def run(query, implementation):
            return attention.spark_attention(
                query, key, value, valid, k=9, split=4, implementation=implementation
            )

        def both(implementation):
            fn = functools.partial(run, implementation=implementation)
            grad = jax.grad(lambda query: jnp.sum(fn(query)[0] ** 2))
            return jax.jit(lambda query: (fn(query), grad(query)))(query)

        with gpu_interpreted():
            got = both("mosaic_gpu")
        chex.assert_trees_all_close(got, both("reference"), rtol=1e-4, atol=1e-5)

    def test_bfloat16(self):
        x = jax.tree.map(lambda y: y.astype(jnp.bfloat16), operands())
        out, _ = jitted(*x, causal(24), k=100, split=4)
        self.assertEqual(out.dtype, jnp.bfloat16)
        wide = jax.tree.map(lambda y: y.astype(jnp.float32), x)
        want, _ = jitted(*wide, causal(24), k=100, split=4)
        np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.05)

    @pytest.mark.once
    def test_valid_broadcasts(self):
        x, valid = operands(), causal(24)
        want = jitted(*x, valid, k=3, split=4)
        for given in (valid[0, 0], jnp.broadcast_to(valid, (2, 1, 24, 24))):
            got = attention.spark_attention(*x, given, k=3, split=4)
            chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(0, -1, 8)
    def test_split(self, split):
        with self.assertRaisesRegex(ValueError, f"got split={split} and head_dim=8"):
            attention.spark_attention(*operands(), causal(24), k=3, split=split)

    @parameterized.parameters(
        ({"key": (2, 24, 3, 8)}, "the key heads must divide the query heads"),
        ({"key": (2, 24, 2, 9)}, "equal in batch and head_dim"),
        ({"value": (2, 23, 2, 8)}, r"`value` must have the .*got \(2, 23, 2, 8\)"),
        ({"value": (24, 2, 8)}, r"`value` must be \[batch, seq, heads, head_dim\]"),
    )
    def test_shapes(self, shapes, message):
        names = ("query", "key", "value")
        x = dict(zip(names, operands(), strict=True))
        x |= {name: jnp.ones(shape) for name, shape in shapes.items()}
        with self.assertRaisesRegex(ValueError, message):
            attention.spark_attention(**x, valid=causal(24), k=3, split=4)

    def test_valid(self):
        scores = jnp.ones((2, 8))
        with self.assertRaisesRegex(TypeError, "`valid` must be bool; got float32"):
            attention.spark_selection(scores, scores, k=3)
        for shape in ((), (1,), (3, 8), (1, 2, 8)):
            with self.assertRaisesRegex(
                ValueError, r"`valid` must broadcast to \(2, 8"
            ):
                attention.spark_selection(scores, jnp.ones(shape, bool), k=3)
        with self.assertRaisesRegex(ValueError, r"`valid` must .*\(2, 1, 24, 24\)"):
            attention.spark_attention(*operands(), causal(23), k=3, split=4)


def test_causal_mask_equals_the_definition():
    queries, keys = jnp.array([[5, 7], [0, 2]]), jnp.arange(8)[None]
    for window in (None, 1, 3):
        got = np.asarray(attention.causal_mask(queries, keys, window=window))
        assert got.shape == (2, 1, 2, 8)
        for b, i, j in np.ndindex(2, 2, 8):
            distance = int(queries[b, i]) - j
            want = 0 <= distance < (window or 100)
            assert got[b, 0, i, j] == want
    with pytest.raises(ValueError, match="`window` must be at least 1; got 0"):
        attention.causal_mask(queries, keys, window=0)

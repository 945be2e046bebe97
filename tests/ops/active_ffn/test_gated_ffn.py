"""gated_ffn against a loop over neurons in NumPy; its errors; no gradient."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import strategies as st

from sparsejax.ops import active_ffn, active_indices, gated_ffn


def oracle(x, gate, up, down):
    """Neuron by neuron, in float64; rows of unused neurons are not looked at."""
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    y = np.zeros((len(x), down.shape[1]))
    for j in np.flatnonzero((gate != 0).any(axis=0)):
        for b in range(len(x)):
            y[b] += gate[b, j] * (up[j] @ x[b]) * down[j]
    return y


def operands(batch, d_in, d_ff, d_model, share, dtype=jnp.float32):
    """Random operands; what unused neurons hold is not finite."""
    rng = np.random.default_rng([batch, d_in, d_ff, d_model])
    x = rng.normal(size=(batch, d_in))
    gate = rng.normal(size=(batch, d_ff)) * (rng.random((batch, d_ff)) < share)
    idle = (gate == 0).all(axis=0)[:, None]
    up = np.where(idle, np.nan, rng.normal(size=(d_ff, d_in)) / d_in**0.5)
    down = np.where(idle, np.inf, rng.normal(size=(d_ff, d_model)) / d_ff**0.5)
    return tuple(jnp.asarray(a, dtype) for a in (x, gate, up, down))


def gate_oracle(scores, threshold, activation):
    """Score by score: float32, rounded to the dtype of the scores after each step."""
    dtype = np.asarray(scores).dtype
    gate = np.zeros(scores.shape, dtype)
    for b, j in np.ndindex(*scores.shape):
        score, theta = (np.float32(a) for a in (scores[b, j], threshold[b, 0]))
        kept = score if theta == -np.inf else np.float32(max(score - theta, 0.0))
        gate[b, j] = activation(np.float32(dtype.type(kept)))
    return gate


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "none": (None, lambda x: x),
    "gelu": (jax.nn.gelu, gelu_tanh),
    "relu2": (lambda x: jax.nn.relu(x) ** 2, lambda x: max(x, 0) ** 2),
    "sin": (jnp.sin, np.sin),  # which no kernel has
}


class GatedFFNTest(parameterized.TestCase):
    @parameterized.product(
        implementation=["reference", None],
        case=[
            (1, 32, 64, 48, 0.1),
            (3, 7, 13, 5, 0.5),
            (2, 8, 9, 8, 0),
            (4, 8, 9, 8, 1),
        ],
    )
    def test_matches_oracle(self, implementation, case):
        args = operands(*case)
        fn = jax.jit(gated_ffn, static_argnames="implementation")
        got = fn(*args, implementation=implementation)
        self.assertEqual(got.dtype, jnp.float32)
        np.testing.assert_allclose(got, oracle(*args), rtol=1e-5, atol=1e-5)

    @parameterized.parameters((jnp.bfloat16, 1e-2), (jnp.float16, 2e-3))
    def test_half_precision_accumulates_in_float32(self, dtype, tolerance):
        args = operands(2, 512, 600, 16, 0.9, dtype)
        got = gated_ffn(*args)
        self.assertEqual(got.dtype, dtype)
        want = oracle(*args)
        limit = tolerance * (1 + np.abs(want).max())
        np.testing.assert_allclose(np.asarray(got, float), want, rtol=0, atol=limit)

    def test_is_active_ffn_of_the_listed_neurons(self):
        x, gate, up, down = operands(2, 16, 40, 12, 0.2)
        indices, num, _ = active_indices(jnp.any(gate != 0, axis=0), 40)
        want = active_ffn(x, gate[:, indices], indices, num, up, down)
        chex.assert_trees_all_close(gated_ffn(x, gate, up, down), want, rtol=1e-5)

    def test_a_gate_of_nan_is_not_0(self):
        x, gate, up, down = (jnp.nan_to_num(a) for a in operands(2, 8, 16, 8, 0.2))
        got = gated_ffn(x, gate.at[1, 3].set(jnp.nan), up, down)
        self.assertTrue(jnp.isnan(got[1]).all())
        chex.assert_trees_all_close(got[0], gated_ffn(x, gate, up, down)[0], rtol=1e-6)

    @parameterized.product(
        activation=list(ACTIVATIONS), dtype=[jnp.float32, jnp.bfloat16]
    )
    def test_threshold_matches_oracle(self, activation, dtype):
        ours, plain = ACTIVATIONS[activation]
        x, _, up, down = operands(4, 32, 64, 48, 1, dtype)
        scores = jax.random.normal(jax.random.key(0), (4, 64), dtype)
        threshold = jnp.asarray([[1.1], [0.2], [-jnp.inf], [9.0]], dtype)
        # a score that equals its threshold does not exceed it
        scores = scores.at[0, 7].set(threshold[0, 0])
        gate = gate_oracle(scores, threshold, plain)
        for rows in (slice(0, 1), slice(0, 2), slice(None), slice(3, 4)):
            idle = (gate[rows] == 0).all(axis=0)[:, None]
            args = (x[rows], scores[rows], *(jnp.where(idle, jnp.nan, up), down))
            fn = jax.jit(gated_ffn, static_argnames="activation")
            got = fn(*args, threshold=threshold[rows], activation=ours)
            self.assertEqual(got.dtype, dtype)
            want = oracle(x[rows], gate[rows], up, down)
            limit = 4 * float(jnp.finfo(dtype).eps) * (1 + np.abs(want).max())
            np.testing.assert_allclose(np.asarray(got, float), want, atol=limit)

    def test_threshold_is_cast(self):
        x, _, up, down = operands(1, 8, 16, 8, 1, jnp.bfloat16)
        scores = jnp.ones((1, 16), jnp.bfloat16)
        threshold = jnp.full((1, 1), 1 - 2.0**-12)  # rounded, it is 1
        self.assertFalse(gated_ffn(x, scores, up, down, threshold=threshold).any())

    def test_activation_alone(self):
        x, gate, up, down = operands(2, 8, 16, 8, 1)
        got = gated_ffn(x, gate, up, down, activation=jax.nn.relu)
        want = oracle(x, np.maximum(gate, 0), up, down)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def test_vmap(self):
        layers = [operands(2, 8, 24, 8, share) for share in (0.1, 0.6)]
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
        for got, args in zip(jax.vmap(gated_ffn)(*stacked), layers, strict=True):
            np.testing.assert_allclose(got, oracle(*args), rtol=1e-5, atol=1e-5)

    def test_has_no_gradient(self):
        x, *rest = operands(1, 4, 8, 4, 0.5)
        with self.assertRaisesRegex(NotImplementedError, r"`gated_ffn`.*no gradient"):
            jax.grad(lambda x: jnp.sum(gated_ffn(x, *rest)))(x)
        with self.assertRaisesRegex(NotImplementedError, r"`gated_ffn`.*no gradient"):
            jax.grad(lambda t: jnp.sum(gated_ffn(x, *rest, threshold=t)))(x[:, :1])


@hypothesis.given(
    sizes=st.tuples(*[st.integers(1, 9)] * 4), share=st.sampled_from([0, 0.1, 0.5, 1])
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_odd_sizes(sizes, share):
    args = operands(*sizes, share)
    np.testing.assert_allclose(gated_ffn(*args), oracle(*args), rtol=1e-4, atol=1e-5)


def test_errors_come_before_any_work():
    args = operands(2, 4, 8, 6, 0.5)
    bad = [
        (0, jnp.ones((2, 3)), ValueError, r"`x` and `up` must agree on d_in"),
        (0, jnp.ones((2, 4), jnp.int32), TypeError, r"`x` must be floating; got int32"),
        (1, jnp.ones(8), ValueError, r"`gate` must have 2 axes; got shape \(8,\)"),
        (1, jnp.ones((3, 8)), ValueError, r"`x` and `gate` must agree on the batch"),
        (1, jnp.ones((2, 5)), ValueError, r"`gate` and `up` must agree on d_ff"),
        (3, jnp.ones((7, 6)), ValueError, r"`up` and `down` must agree on d_ff"),
    ]
    for position, value, error, message in bad:
        changed = [*args[:position], value, *args[position + 1 :]]
        with pytest.raises(error, match=message):
            gated_ffn(*changed)
    for threshold, error, message in [
        (jnp.ones(2), ValueError, r"`threshold` must have 2 axes; got shape \(2,\)"),
        (jnp.ones((1, 1)), ValueError, r"must have shape \(2, 1\).*got shape \(1, 1\)"),
        (jnp.ones((2, 8)), ValueError, r"must have shape \(2, 1\).*got shape \(2, 8\)"),
        (jnp.ones((2, 1), int), TypeError, r"`threshold` must be floating; got int32"),
    ]:
        with pytest.raises(error, match=message):
            gated_ffn(*args, threshold=threshold)
    with pytest.raises(ValueError, match=r"must be None or one of.*got 'cuda'"):
        gated_ffn(*args, implementation="cuda")
    with pytest.raises(NotImplementedError, match="has no such"):
        gated_ffn(*args, implementation="pallas_tpu")

"""active_ffn against a loop over neurons in NumPy; its errors; no gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax.ops import active_ffn, active_indices

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}
IMPLEMENTATIONS = ["reference", "xla", None]
ffn = jax.jit(active_ffn, static_argnames="implementation")


def oracle(x, gate, indices, num_active, up, down):
    """Neuron by neuron, in float64."""
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    y = np.zeros((len(x), down.shape[1]))
    for b in range(len(x)):
        for j in range(int(num_active)):
            neuron = int(indices[j])
            y[b] += gate[b, j] * (up[neuron] @ x[b]) * down[neuron]
    return y


def operands(batch, d_in, d_ff, d_model, capacity, num_active, dtype=jnp.float32):
    """Random operands; what lies beyond `num_active` is garbage, in range."""
    rng = np.random.default_rng([batch, d_in, d_ff, capacity, num_active])
    x = rng.normal(size=(batch, d_in))
    gate = rng.normal(size=(batch, capacity)) * (rng.random((batch, capacity)) < 0.7)
    neurons = np.sort(rng.choice(d_ff, num_active, replace=False))
    padding = rng.integers(0, d_ff, capacity - num_active)
    up = rng.normal(size=(d_ff, d_in)) / d_in**0.5
    down = rng.normal(size=(d_ff, d_model)) / max(num_active, 1) ** 0.5
    indices = jnp.asarray(np.concatenate([neurons, padding]), jnp.int32)
    x, gate, up, down = (jnp.asarray(a, dtype) for a in (x, gate, up, down))
    return x, gate, indices, jnp.int32(num_active), up, down


def assert_close(got, want, dtype):
    limit = TOLERANCE[dtype] * (1 + np.abs(want).max(initial=0))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=limit)


class ActiveFFNTest(parameterized.TestCase):
    @parameterized.product(
        implementation=IMPLEMENTATIONS,
        case=[
            # batch, d_in, d_ff, d_model, capacity, num_active
            (1, 32, 64, 48, 24, 17),
            (1, 7, 13, 5, 13, 13),  # no axis divides anything; all neurons
            (4, 6, 40, 10, 3, 1),  # capacity below one step of the loop
            (8, 16, 50, 8, 20, 0),  # nothing is active
            (40, 8, 30, 4, 16, 16),  # a batch beyond what it is made for
        ],
    )
    def test_matches_oracle(self, implementation, case):
        args = operands(*case)
        got = ffn(*args, implementation=implementation)
        self.assertEqual(got.dtype, jnp.float32)
        assert_close(got, oracle(*args), jnp.float32)

    @parameterized.product(
        implementation=["reference", "xla"], dtype=[jnp.bfloat16, jnp.float16]
    )
    def test_half_precision_accumulates_in_float32(self, implementation, dtype):
        args = operands(2, 512, 600, 16, 600, 580, dtype=dtype)
        got = ffn(*args, implementation=implementation)
        self.assertEqual(got.dtype, dtype)
        assert_close(got, oracle(*args), dtype)

    @parameterized.parameters(*IMPLEMENTATIONS)
    def test_padding_adds_exactly_zero(self, implementation):
        x, gate, indices, num_active, up, down = operands(2, 16, 32, 12, 20, 9)
        spare = np.setdiff1d(np.arange(32), np.asarray(indices[:9]))
        indices = indices.at[9:].set(jnp.asarray(spare[:11]))
        want = ffn(
            x, gate, indices, num_active, up, down, implementation=implementation
        )
        gate = gate.at[:, 9:].set(jnp.nan)
        up, down = up.at[spare].set(jnp.inf), down.at[spare].set(jnp.nan)
        got = ffn(x, gate, indices, num_active, up, down, implementation=implementation)
        np.testing.assert_array_equal(got, want)

    def test_traced_count_does_not_retrace_and_is_clipped(self):
        x, gate, indices, _, up, down = operands(1, 8, 16, 8, 12, 12)
        fn = jax.jit(chex.assert_max_traces(active_ffn, n=1))
        for count, used in [(0, 0), (5, 5), (12, 12), (40, 12), (-3, 0)]:
            got = fn(x, gate, indices, jnp.int32(count), up, down)
            want = oracle(x, gate, indices, used, up, down)
            assert_close(got, want, jnp.float32)

    @parameterized.parameters(*IMPLEMENTATIONS)
    def test_is_the_dense_ffn_when_the_gate_is_zero_elsewhere(self, implementation):
        rng = np.random.default_rng(0)
        x, up, down = (
            jnp.asarray(rng.normal(size=shape), jnp.float32)
            for shape in [(3, 16), (96, 16), (96, 16)]
        )
        gate = jax.nn.relu(jnp.asarray(rng.normal(size=(3, 96)) - 1, jnp.float32))
        active = jnp.any(gate > 0, axis=0)
        indices, num_active, overflowed = active_indices(active, capacity=70)
        self.assertFalse(overflowed)
        got = ffn(
            *(x, gate[:, indices], indices, num_active, up, down),
            implementation=implementation,
        )
        gate, x, up, down = (np.asarray(a, np.float64) for a in (gate, x, up, down))
        assert_close(got, (gate * (x @ up.T)) @ down, jnp.float32)

    @parameterized.parameters(*IMPLEMENTATIONS)
    def test_where_ints_are_int64(self, implementation):
        args = operands(2, 8, 24, 8, 12, 7)
        with jax.enable_x64(True):
            got = active_ffn(*args, implementation=implementation)
        self.assertEqual(got.dtype, jnp.float32)
        assert_close(got, oracle(*args), jnp.float32)

    @parameterized.parameters(*IMPLEMENTATIONS)
    def test_vmap_and_scan(self, implementation):
        layers = [operands(2, 8, 24, 8, 12, n) for n in (3, 12)]
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)

        def one(args):
            return active_ffn(*args, implementation=implementation)

        mapped = jax.jit(jax.vmap(one))(stacked)
        scanned = jax.jit(lambda s: jax.lax.scan(lambda c, a: (c, one(a)), 0, s)[1])
        chex.assert_trees_all_close(mapped, scanned(stacked), atol=1e-6)
        for got, args in zip(mapped, layers, strict=True):
            assert_close(got, oracle(*args), jnp.float32)

    @parameterized.parameters(*IMPLEMENTATIONS)
    def test_has_no_gradient(self, implementation):
        x, *rest = operands(1, 4, 8, 4, 4, 2)

        def loss(x):
            return jnp.sum(active_ffn(x, *rest, implementation=implementation))

        with self.assertRaisesRegex(NotImplementedError, r"no gradient.*stop_gradient"):
            jax.grad(loss)(x)
        jax.grad(lambda x: loss(jax.lax.stop_gradient(x)) + x.sum())(x)


def test_errors_come_before_any_work():
    args = operands(2, 4, 8, 6, 5, 3)
    bad = [
        (
            0,
            jnp.ones((2, 3)),
            ValueError,
            r"`x` and `up` must agree on d_in; .*\(2, 3\)",
        ),
        (0, jnp.ones(4), ValueError, r"`x` must have 2 axes; got shape \(4,\)"),
        (0, jnp.ones((2, 4), jnp.int32), TypeError, r"`x` must be floating; got int32"),
        (
            1,
            jnp.ones((3, 5)),
            ValueError,
            r"agree on the batch; got x of shape \(2, 4\)",
        ),
        (
            1,
            jnp.ones((2, 4)),
            ValueError,
            r"`gate` and `indices` must agree on capacity",
        ),
        (2, jnp.ones(5), TypeError, r"`indices` must be integer; got float32\[5\]"),
        (2, jnp.ones(0, jnp.int32), ValueError, r"`indices` must not be empty"),
        (3, 6, ValueError, r"`num_active` must be in \[0, 5\].*got 6"),
        (3, -1, ValueError, r"`num_active` must be in \[0, 5\].*got -1"),
        (3, jnp.ones(2, jnp.int32), TypeError, r"must be one integer.*got int32\[2\]"),
        (3, 2.0, TypeError, r"`num_active` must be one integer"),
        (5, jnp.ones((4, 8)), ValueError, r"`up` and `down` must agree on d_ff"),
    ]
    for position, value, error, message in bad:
        changed = [*args[:position], value, *args[position + 1 :]]
        with pytest.raises(error, match=message):
            active_ffn(*changed)
    with pytest.raises(ValueError, match=r"must be None or one of.*got 'cuda'"):
        active_ffn(*args, implementation="cuda")
    with pytest.raises(NotImplementedError, match="has no such"):
        active_ffn(*args, implementation="pallas_tpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_over_the_batch_of_a_mesh(implementation):
    x, gate, *rest = operands(4, 8, 32, 8, 12, 9)

    def local(x, gate):
        return active_ffn(x, gate, *rest, implementation=implementation)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert_close(jax.jit(mapped)(x, gate), oracle(x, gate, *rest), jnp.float32)

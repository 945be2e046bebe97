"""Allocations against the fixed point of Evci et al., 2020, in Python numbers."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import allocation

MLP = [(784, 300), (300, 100), (100, 10)]
CONV = [(3, 3, 3, 16), (3, 3, 16, 16), (3, 3, 16, 32), (3, 3, 32, 32), (32, 10)]


def as_params(shapes):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def densities(allocate, shapes, sparsity, **kwargs):
    # by that name three axes are a convolution too
    tree = allocate({"conv": as_params(shapes)}, sparsity, **kwargs)["conv"]
    return np.array([1 - s for s in tree], np.float64)


def oracle(raw, sizes, sparsity, *, all_at_once=False):
    """The solver released with Evci et al., 2020, in Python numbers."""
    density, dense = 1 - sparsity, set()
    while True:
        rest = [i for i in range(len(raw)) if i not in dense]
        if not rest:
            return [1.0] * len(raw)
        rhs = sum(density * sizes[i] for i in rest)
        rhs -= sum(sparsity * sizes[i] for i in dense)
        eps = rhs / sum(raw[i] * sizes[i] for i in rest)
        highest = max(raw[i] for i in rest)
        if highest * eps <= 1:
            return [1.0 if i in dense else eps * raw[i] for i in range(len(raw))]
        if all_at_once:
            dense |= {i for i in rest if raw[i] * eps > 1}
        else:
            dense |= {i for i in rest if raw[i] == highest}


def raw_erk(shape):
    return sum(shape) / math.prod(shape)


def raw_er(shape):
    return sum(shape[-2:]) / math.prod(shape[-2:])


class GoldenTest(parameterized.TestCase):
    """Numbers that the released solver's equations give in float64."""

    @parameterized.product(
        allocate=[allocation.erdos_renyi, allocation.erdos_renyi_kernel],
        row=[
            (0.05, (0.038484, 0.111334, 0.918507)),
            (0.2, (0.162241, 0.469362, 1)),
            (0.5, (0.434099, 1, 1)),
        ],
    )
    def test_mlp(self, allocate, row):
        density, want = row
        got = densities(allocate, MLP, 1 - density)
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-7)

    @parameterized.parameters(
        ("erk", 0.05, (0.213286, 0.060787, 0.043191, 0.027994, 0.483734)),
        ("er", 0.05, (0.221394, 0.069914, 0.052435, 0.034957, 0.073410)),
        ("erk", 0.2, (0.945732, 0.269534, 0.191511, 0.124127, 1)),
        ("erk", 0.5, (1, 0.782707, 0.556134, 0.360457, 1)),
        ("er", 0.5, (1, 0.748132, 0.561099, 0.374066, 0.785538)),
    )
    def test_conv(self, rule, density, want):
        rules = {"er": allocation.erdos_renyi, "erk": allocation.erdos_renyi_kernel}
        got = densities(rules[rule], CONV, 1 - density)
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-7)


SHAPES = st.lists(
    st.lists(st.integers(1, 40), min_size=2, max_size=5).map(tuple),
    min_size=1,
    max_size=8,
)


@given(shapes=SHAPES, sparsity=st.floats(0, 0.999), kernel=st.booleans())
def test_equals_the_published_iteration(shapes, sparsity, kernel):
    allocate = allocation.erdos_renyi_kernel if kernel else allocation.erdos_renyi
    raw = [(raw_erk if kernel else raw_er)(shape) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    got = densities(allocate, shapes, sparsity)
    for all_at_once in (False, True):  # both reach the same fixed point
        want = oracle(raw, sizes, sparsity, all_at_once=all_at_once)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert (got >= 0).all() and (got <= 1).all()
    assert abs(np.dot(got, sizes) / sum(sizes) - (1 - sparsity)) < 1e-9


@given(shapes=SHAPES, sparsity=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_a_permutation_of_the_leaves_permutes_the_densities(shapes, sparsity, seed):
    order = np.random.default_rng(seed).permutation(len(shapes))
    got = densities(allocation.erdos_renyi_kernel, shapes, sparsity)
    permuted = [shapes[i] for i in order]
    again = densities(allocation.erdos_renyi_kernel, permuted, sparsity)
    np.testing.assert_allclose(again, got[order], rtol=1e-9, atol=1e-12)


class TracedTest(parameterized.TestCase):
    @parameterized.product(
        allocate=[
            allocation.uniform,
            allocation.erdos_renyi,
            allocation.erdos_renyi_kernel,
        ],
        shapes=[MLP, CONV, [(8, 8)] * 3],
    )
    def test_equals_static_without_retrace(self, allocate, shapes):
        params = as_params(shapes)
        traced = jax.jit(chex.assert_max_traces(lambda s: allocate(params, s), 1))
        sizes = np.array([math.prod(shape) for shape in shapes], np.float64)
        for sparsity in (0.0, 0.1, 0.5, 0.8, 0.95, 0.99):
            got = np.array([1 - s for s in traced(jnp.float32(sparsity))])
            want = densities(allocate, shapes, sparsity)
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
            self.assertAlmostEqual(got @ sizes / sizes.sum(), 1 - sparsity, delta=2e-6)


class LeavesTest(parameterized.TestCase):
    @parameterized.product(
        allocate=[allocation.erdos_renyi, allocation.erdos_renyi_kernel],
        sparsity=[0.3, 0.9],
    )
    def test_stacked_layers_count_one_by_one(self, allocate, sparsity):
        stacked = {"a": jnp.ones((4, 32, 8)), "b": jnp.ones((4, 16, 16))}
        apart = {"a": [jnp.ones((32, 8))] * 4, "b": [jnp.ones((16, 16))] * 4}
        got = allocate(stacked, sparsity, stacked=1)
        want = allocate(apart, sparsity)
        for name in ("a", "b"):
            np.testing.assert_allclose([got[name]] * 4, want[name], rtol=1e-9)

    def test_excluded_leaves_take_no_part(self):
        params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4), "hole": None}
        for allocate in (allocation.uniform, allocation.erdos_renyi_kernel):
            tree = allocate(params, 0.75)
            self.assertIsNone(tree["bias"])
            self.assertIsNone(tree["hole"])
            self.assertAlmostEqual(tree["kernel"], 0.75)
            self.assertIsInstance(tree["kernel"], float)

    def test_where(self):
        params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
        where = {"a": True, "b": False}
        tree = allocation.erdos_renyi_kernel(params, 0.5, where=where)
        self.assertAlmostEqual(tree["a"], 0.5)
        self.assertIsNone(tree["b"])

    def test_empty_leaves(self):
        shapes = [(0, 5), (8, 8)]
        got = densities(allocation.erdos_renyi_kernel, shapes, 0.5)
        self.assertAlmostEqual(got[1], 0.5)
        self.assertTrue(np.isfinite(got).all())

    @parameterized.product(
        allocate=[
            allocation.uniform,
            allocation.erdos_renyi,
            allocation.erdos_renyi_kernel,
        ]
    )
    def test_errors(self, allocate):
        with self.assertRaisesRegex(ValueError, "`sparsity` must be"):
            allocate({"a": jnp.ones((2, 2))}, 1.0)
        with self.assertRaisesRegex(ValueError, "at least one leaf"):
            allocate({"a": jnp.ones(2)}, 0.5)


class AttentionKernelTest(parameterized.TestCase):
    @parameterized.parameters(((64, 4, 16), 0), ((2, 64, 4, 16), 1))
    def test_erdos_renyi_does_not_guess_which_axes_are_heads(self, shape, stacked):
        params = {
            "query": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)},
            "conv1d": {"kernel": jax.ShapeDtypeStruct((5, 64, 16), jnp.float32)},
        }
        stacks = {"query": stacked, "conv1d": 0}
        with self.assertRaisesRegex(
            ValueError, r"3 axes .* at \['query'\]\['kernel'\]"
        ):
            allocation.erdos_renyi(params, 0.5, stacked=stacks)
        of_kernel = allocation.erdos_renyi_kernel(params, 0.5, stacked=stacks)
        assert 0 < of_kernel["query"]["kernel"] < 1
        del params["query"], stacks["query"]
        alone = allocation.erdos_renyi(params, 0.5, stacked=stacks)
        np.testing.assert_allclose(alone["conv1d"]["kernel"], 0.5)


@pytest.mark.parametrize(
    "allocate", [allocation.erdos_renyi, allocation.erdos_renyi_kernel]
)
def test_sparsity_zero_is_exactly_dense(allocate):
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((7, 300))}
    assert allocate(params, 0.0) == {"a": 0.0, "b": 0.0}

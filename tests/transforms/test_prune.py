"""One-shot pruning: the selection oracle under every pattern, allocation and scope."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import sparsejax as sj
from tests.transforms import _oracles as oracle

CONV_SHAPES = {
    "conv1": (3, 3, 3, 16),
    "conv2": (3, 3, 16, 16),
    "conv3": (3, 3, 16, 32),
    "conv4": (3, 3, 32, 32),
    "head": (32, 10),
}
PATTERNS = [
    sj.Unstructured(),
    sj.NM(2, 4),
    sj.NM(3, 4, axis=-1),
    sj.NM(1, 2, axis=1),  # counted from the first: the inputs of a stacked kernel
    sj.Block((2, 2)),
    sj.Block((4,)),
    sj.Channel(-1),
    sj.Channel(-2),
]


class PruneTest(parameterized.TestCase):
    @parameterized.product(pattern=PATTERNS, levels=[None, 3])
    def test_matches_oracle(self, pattern, levels):
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((3, 8, 4)).astype(np.float32)
        if levels:  # ties, zeros of both signs
            weights = np.round(weights) / levels
        sparsity = None if isinstance(pattern, sj.NM) else 0.4
        got = oracle.jit(
            lambda p: sj.prune(p, sparsity, pattern=pattern, stacked=1)["kernel"]
        )({"kernel": weights})
        spec = oracle.Spec(pattern, 1)
        want = oracle.select(abs(weights), spec, sparsity)
        np.testing.assert_array_equal(got, want)
        oracle.assert_pattern(np.asarray(got), spec, sparsity)

    @parameterized.product(sparsity=[0.0, 0.3, 0.999])
    def test_across_leaves_matches_oracle(self, sparsity):
        rng = np.random.default_rng(1)
        params = {"a": rng.integers(-3, 4, (5, 4)), "b": rng.integers(-3, 4, (2, 3, 4))}
        params = jax.tree.map(lambda p: p.astype(np.float32), params)
        got = oracle.jit(lambda p: sj.prune(p, sparsity, across_leaves=True))(params)
        both = np.concatenate([abs(p).ravel() for p in params.values()])
        want = oracle.top(both, oracle.num_kept(sparsity, both.size))
        got = np.concatenate([np.ravel(mask) for mask in got.values()])
        np.testing.assert_array_equal(got, want)

    def test_across_leaves_warns_of_a_lost_layer(self):
        weights = jnp.arange(1.0, 17.0).reshape(2, 4, 2)
        small = weights / jnp.array([1, 99])[:, None, None]
        params = {"large": weights, "small": small}
        with pytest.warns(match=r"0.00% of a layer at \['small'\]") as seen:
            sj.prune(params, 0.5, across_leaves=True, stacked=1)
        assert len(seen) == 1
        sj.prune(params, 0.5, across_leaves=True)  # half of the leaf is kept

    def test_erdos_renyi_kernel(self):
        rng = np.random.default_rng(2)
        params = {
            name: rng.standard_normal(shape).astype(np.float32)
            for name, shape in CONV_SHAPES.items()
        }
        solved = oracle.erk(CONV_SHAPES, 0.8)
        densities = [0.945732, 0.269534, 0.191511, 0.124127, 1]  # the last is full
        np.testing.assert_allclose(
            1 - np.array([*solved.values()]), densities, atol=1e-6
        )
        got = oracle.jit(lambda p: sj.prune(p, 0.8, allocation=sj.erdos_renyi_kernel))(
            params
        )
        for name, weights in params.items():
            want = oracle.select(abs(weights), oracle.Spec(), solved[name])
            np.testing.assert_array_equal(got[name], want)

    def test_each_leaf_its_pattern_sparsity_and_stack(self):
        rng = np.random.default_rng(3)
        params = {
            "a": rng.standard_normal((8, 4)).astype(np.float32),
            "b": {"c": rng.standard_normal((2, 6, 4)).astype(np.float32)},
            "d": rng.standard_normal((4, 4)).astype(np.float32),
        }
        prune = functools.partial(
            sj.prune,
            sparsity={"a": None, "b": 0.25, "d": None},
            pattern={"a": sj.NM(1, 4), "b": sj.Channel(-1), "d": sj.Unstructured()},
            stacked=lambda path, leaf: leaf.ndim - 2,
        )
        got = oracle.jit(prune)(params)
        want = oracle.select(abs(params["a"]), oracle.Spec(sj.NM(1, 4)))
        np.testing.assert_array_equal(got["a"], want)
        spec = oracle.Spec(sj.Channel(-1), 1)
        want = oracle.select(abs(params["b"]["c"]), spec, 0.25)
        np.testing.assert_array_equal(got["b"]["c"], want)
        assert got["d"] is None  # no sparsity: dense

    def test_a_traced_sparsity_gives_the_same_masks(self):
        params = {"kernel": np.random.default_rng(4).standard_normal((9, 7))}
        params = jax.tree.map(np.float32, params)
        prune = oracle.jit(lambda p, s: sj.prune(p, s)["kernel"])
        for sparsity in (0.0, 0.125, 0.9):
            want = oracle.select(abs(params["kernel"]), oracle.Spec(), sparsity)
            np.testing.assert_array_equal(prune(params, sparsity), want)

    def test_apply_masks_leaves_exact_zeros_and_the_rest(self):
        params = {"kernel": jnp.arange(1.0, 9).reshape(4, 2), "bias": jnp.ones(2)}
        masks = sj.prune(params, 0.5)
        pruned = sj.apply_masks(params, masks)
        assert masks["bias"] is None and pruned["bias"] is params["bias"]
        np.testing.assert_array_equal(
            pruned["kernel"], np.where(masks["kernel"], params["kernel"], 0)
        )

    def test_nan_raises_eagerly_and_ranks_lowest_under_jit(self):
        weights = np.arange(1.0, 9, dtype=np.float32).reshape(4, 2)
        weights[3, 1] = np.nan
        params = {"a": {"kernel": weights}, "b": {"kernel": np.ones((2, 2), "f")}}
        with pytest.raises(ValueError, match=r"got 1 of 8 NaN at \['a'\]\['kernel'\]"):
            sj.prune(params, 0.5)
        for pattern, sparsity in ((sj.Unstructured(), 0.5), (sj.NM(2, 4), None)):
            prune = oracle.jit(
                lambda p, s=sparsity, q=pattern: sj.prune(
                    p, s, pattern=q, where={"a": True, "b": False}
                )
            )
            want = oracle.select(abs(weights), oracle.Spec(pattern), sparsity)
            assert not want[3, 1]
            np.testing.assert_array_equal(prune(params)["a"]["kernel"], want)


BAD = {
    "percentage": (dict(sparsity=50), "divide by 100"),
    "nan": (dict(sparsity=float("nan")), "got nan"),
    "missing": (dict(), "`sparsity` must be given"),
    "contradiction": (dict(sparsity=0.6, pattern=sj.NM(2, 4)), "is 0.5; got 0.6"),
    "divide": (dict(pattern=sj.NM(2, 3)), r"m=3 for axis -2.*\(4, 2\)"),
    "block": (dict(sparsity=0.5, pattern=sj.Block((3, 1))), r"\(3, 1\) must divide"),
    "axis": (dict(pattern=sj.NM(1, 2, axis=5)), "axis 5"),
    "no leaf": (dict(sparsity=0.5, where=lambda p, x: False), "at least one leaf"),
    "prefix": (dict(sparsity={"nothing": 0.5}), "no entry at or above"),
    "two": (
        dict(sparsity={"kernel": 0.5}, allocation=sj.erdos_renyi),
        "one of the two",
    ),
    "across": (
        dict(sparsity=0.5, allocation=sj.erdos_renyi, across_leaves=True),
        "`allocation`.*`across_leaves`.*one of the two",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        sj.prune({"kernel": jnp.ones((4, 2))}, **kwargs)


def test_dense_general_under_the_default_axis_raises():
    with pytest.raises(ValueError, match=r"contraction axis.*\(8, 2, 4\)"):
        sj.prune({"query": jnp.ones((8, 2, 4))}, pattern=sj.NM(2, 4))
    masks = sj.prune({"query": jnp.ones((8, 2, 4))}, pattern=sj.NM(2, 4, axis=0))
    assert int(masks["query"].sum()) == 32


def test_governing_an_integer_leaf_raises():
    with pytest.raises(TypeError, match="floating; got int32"):
        sj.prune({"k": jnp.ones((4, 2), jnp.int32)}, 0.5, where={"k": True})


def test_no_warning_where_hardly_anything_was_asked_for():
    large, small = jnp.arange(1.0, 2001).reshape(2, 1000), jnp.full((2, 1000), 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sj.prune({"a": large, "b": small}, 0.995, across_leaves=True)

"""Weight scaling of CAST (Huang et al., 2025), equations 11-12, loop by loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import sparsejax as sj
from tests.transforms import _oracles as oracle

ws = sj.weight_scaling


def scaled_oracle(weight, scale):
    """`w[r, c] * a[r, c // (C / n)]`, here with inputs first."""
    out = np.zeros(weight.shape)
    groups = scale.shape[-2]
    for *lead, i, o in np.ndindex(weight.shape):
        group = i // (weight.shape[-2] // groups)
        out[(*lead, i, o)] = weight[(*lead, i, o)] * scale[(*lead, group, o)]
    return out


def make(seed=0, num_groups=2):
    rng = np.random.default_rng(seed)
    params = {
        "a": {"kernel": rng.standard_normal((16, 6)), "bias": rng.standard_normal(6)},
        "stack": {"kernel": rng.standard_normal((3, 8, 4))},
    }
    params = jax.tree.map(lambda p: p.astype(np.float32), params)
    scales = ws.init(params, num_groups=num_groups, stacked={"a": 0, "stack": 1})
    trained = jax.tree.map(lambda s: s * rng.uniform(0.5, 2, s.shape), scales)
    return params, scales, jax.tree.map(lambda s: s.astype(np.float32), trained)


class WeightScalingTest(parameterized.TestCase):
    @parameterized.product(num_groups=[1, 2, 4])
    def test_init_is_ones_of_one_scale_a_column_and_block(self, num_groups):
        params, scales, _ = make(num_groups=num_groups)
        assert jax.tree.map(np.shape, scales) == {
            "a": {"kernel": (num_groups, 6), "bias": None},
            "stack": {"kernel": (3, num_groups, 4)},
        }
        applied = ws.apply(params, scales)
        for got, want in zip(
            jax.tree.leaves(applied), jax.tree.leaves(params), strict=True
        ):
            np.testing.assert_array_equal(got, want)

    @parameterized.product(num_groups=[1, 2, 4])
    def test_apply_matches_oracle(self, num_groups):
        params, _, scales = make(num_groups=num_groups)
        got = oracle.jit(ws.apply)(params, scales)
        for path in (("a", "kernel"), ("stack", "kernel")):
            weight, scale = params[path[0]][path[1]], scales[path[0]][path[1]]
            want = scaled_oracle(weight, scale)
            np.testing.assert_allclose(got[path[0]][path[1]], want, rtol=1e-6)
        np.testing.assert_array_equal(got["a"]["bias"], params["a"]["bias"])

    def test_gradients_reach_weights_and_scales(self):
        params, _, scales = make()
        rng = np.random.default_rng(7)
        cotangent = jax.tree.map(
            lambda p: rng.standard_normal(p.shape).astype("f"), params
        )

        def loss(params, scales):
            out = ws.apply(params, scales)
            return sum(
                jax.tree.leaves(
                    jax.tree.map(lambda w, c: (w * c).sum(), out, cotangent)
                )
            )

        of_params, of_scales = oracle.jit(jax.grad(loss, (0, 1)))(params, scales)
        for name in ("a", "stack"):
            weight, scale = params[name]["kernel"], scales[name]["kernel"]
            c = cotangent[name]["kernel"].astype(np.float64)
            np.testing.assert_allclose(
                of_params[name]["kernel"], scaled_oracle(c, scale), rtol=1e-5
            )
            want = np.zeros(scale.shape)
            for *lead, i, o in np.ndindex(weight.shape):
                group = i // (weight.shape[-2] // scale.shape[-2])
                index = (*lead, i, o)
                want[(*lead, group, o)] += c[index] * weight[index]
            np.testing.assert_allclose(of_scales[name]["kernel"], want, rtol=1e-4)
        np.testing.assert_array_equal(of_params["a"]["bias"], cotangent["a"]["bias"])

    @parameterized.product(pattern=[sj.NM(2, 4), sj.NM(1, 2)])
    def test_the_pattern_of_scaled_and_unscaled_weights_is_the_same(self, pattern):
        params, _, scales = make()
        stacked = {"a": 0, "stack": 1}
        prune = oracle.jit(lambda p: sj.prune(p, pattern=pattern, stacked=stacked))
        for values in (params, jax.tree.map(np.round, params)):  # with ties too
            plain, scaled = prune(values), prune(ws.apply(values, scales))
            for got, want in zip(
                jax.tree.leaves(scaled), jax.tree.leaves(plain), strict=True
            ):
                np.testing.assert_array_equal(got, want)

    def test_a_group_across_two_blocks_can_change_the_pattern(self):
        # why d_in / num_groups must be a multiple of m
        params = {"kernel": jnp.array([[3.0], [2.0], [1.9], [1.0]])}
        scales = {"kernel": jnp.array([[0.1], [1.0]])}
        plain = sj.prune(params, pattern=sj.NM(2, 4))
        scaled = sj.prune(ws.apply(params, scales), pattern=sj.NM(2, 4))
        assert (plain["kernel"] != scaled["kernel"]).any()

    def test_fold_prunes_then_scales(self):
        params, _, scales = make()
        stacked = {"a": 0, "stack": 1}
        prune = oracle.jit(lambda p: sj.prune(p, pattern=sj.NM(2, 4), stacked=stacked))
        masks = prune(params)
        got = oracle.jit(ws.fold)(params, scales, masks)
        for name, spec in (
            ("a", oracle.Spec(sj.NM(2, 4))),
            ("stack", oracle.Spec(sj.NM(2, 4), 1)),
        ):
            weight, scale = params[name]["kernel"], scales[name]["kernel"]
            mask = oracle.select(abs(weight), spec)
            want = scaled_oracle(np.where(mask, weight, 0), scale)
            np.testing.assert_allclose(got[name]["kernel"], want, rtol=1e-6)
            np.testing.assert_array_equal(got[name]["kernel"] != 0, mask)
        np.testing.assert_array_equal(got["a"]["bias"], params["a"]["bias"])
        # the folded weights with scales of one are what the scaled forward saw
        pruned = sj.apply_masks(params, masks)
        again = ws.apply(got, make()[1])
        for a, b in zip(
            jax.tree.leaves(again),
            jax.tree.leaves(ws.apply(pruned, scales)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6)

    def test_where_and_dtype(self):
        params = {"a": jnp.ones((4, 2), jnp.bfloat16), "b": jnp.ones((4, 2))}
        scales = ws.init(params, where={"a": True, "b": False})
        assert scales["b"] is None and scales["a"].dtype == jnp.bfloat16
        got = ws.apply(params, scales)
        assert got["a"].dtype == jnp.bfloat16 and got["b"] is params["b"]
        got = ws.apply(params, {"a": jnp.ones((2, 2)), "b": None})  # float32 scales
        assert got["a"].dtype == jnp.bfloat16


BAD = {
    "divide": (jnp.ones((6, 2)), dict(num_groups=4), r"got 4 for shape \(6, 2\).*'k'"),
    "zero": (jnp.ones((6, 2)), dict(num_groups=0), "got 0"),
    "heads": (jnp.ones((8, 2, 4)), dict(), r"\(8, 2, 4\) with stacked=0 at.*'k'"),
    "none": (jnp.ones(3), dict(), "at least one leaf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    leaf, kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ws.init({"k": leaf}, **kwargs)


@pytest.mark.parametrize("shape", [(4, 2), (2, 3), (3, 2, 2), (2,), (0, 2)])
def test_scales_of_another_kernel_raise(shape):
    with pytest.raises(ValueError, match=r"num_groups, d_out\].*for a kernel \(6, 2\)"):
        ws.apply({"a": jnp.ones((6, 2))}, {"a": jnp.ones(shape)})


def test_trees_of_another_size_raise():
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="1 leaves for a tree with 2"):
        ws.apply(params, {"a": jnp.ones((2, 2))})

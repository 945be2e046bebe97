"""Static masks: drawn once, exact in count, and never changed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from flax import nnx

import sparsejax as sj
from tests.transforms import _oracles as oracle

KEY = jax.random.key(3)
STACKED = oracle.Problem.STACKED
ERK_SHAPES = {"dense/kernel": (8, 6), "stack/kernel": (8, 4)}
ERK_SIZES = {"dense/kernel": 48, "stack/kernel": 96}


def drawn_masks(problem, pattern, sparsities):
    """Random scores by the room of scores, everything else by the oracle."""
    scores = oracle.flat(sj.scores.random(problem.params, key=KEY))
    return {
        name: oracle.select(scores[name], spec, sparsities[name])
        for name, spec in problem.specs(pattern).items()
    }


def static_oracle(problem, masks, inner):
    params = oracle.wide(problem.params)
    inner.init(params)
    for step in range(problem.steps):
        params, _ = oracle.hard_step(problem, step, params, masks, inner)
        yield params, masks, inner


class StaticSparseTest(parameterized.TestCase):
    @parameterized.parameters(
        (sj.Unstructured(), oracle.momentum),
        (sj.Unstructured(), oracle.adamw),
        (sj.NM(2, 4), oracle.adamw),
        (sj.NM(1, 2, axis=-1), oracle.momentum),
        (sj.Block((4, 2)), oracle.adamw),
        (sj.Channel(-1), oracle.momentum),
    )
    def test_matches_oracle(self, pattern, inner):
        problem, inner = oracle.Problem(), inner()
        sparsity = None if isinstance(pattern, sj.NM) else 0.6
        masks = drawn_masks(problem, pattern, dict.fromkeys(ERK_SHAPES, sparsity))
        tx = sj.static_sparse(
            inner.optax, sparsity, key=KEY, pattern=pattern, stacked=STACKED
        )
        got = oracle.train(tx, problem)
        oracle.assert_equal_run(got, static_oracle(problem, masks, inner))

    @parameterized.product(sparsity=[0.02, 0.8])
    def test_erdos_renyi_kernel(self, sparsity):
        problem, inner = oracle.Problem(), oracle.momentum()
        sparsities = oracle.erk(ERK_SHAPES, sparsity, ERK_SIZES)
        assert (0 in sparsities.values()) == (sparsity == 0.02)  # saturates
        masks = drawn_masks(problem, sj.Unstructured(), sparsities)
        tx = sj.static_sparse(
            inner.optax,
            sparsity,
            key=KEY,
            stacked=STACKED,
            allocation=sj.erdos_renyi_kernel,
        )
        got = oracle.train(tx, problem)
        oracle.assert_equal_run(got, static_oracle(problem, masks, inner))

    def test_across_leaves_draws_one_count(self):
        problem = oracle.Problem()
        tx = sj.static_sparse(
            optax.sgd(0.1), 0.7, key=KEY, stacked=STACKED, across_leaves=True
        )
        scores = oracle.flat(sj.scores.random(problem.params, key=KEY))
        both = np.concatenate([scores[name].ravel() for name in ERK_SHAPES])
        want = oracle.top(both, oracle.num_kept(0.7, both.size))
        masks = oracle.first_masks(tx, problem.params)
        got = np.concatenate([masks[name].ravel() for name in ERK_SHAPES])
        np.testing.assert_array_equal(got, want)

    def test_brought_masks_match_oracle(self):
        problem, inner = oracle.Problem(), oracle.adamw()
        rng = np.random.default_rng(5)
        masks = {"dense/kernel": rng.random((8, 6)) < 0.4}  # the rest is not governed
        tree = oracle.leaves_like(problem, masks)
        tx = sj.static_sparse(inner.optax, masks=tree)
        got = oracle.train(tx, problem)
        oracle.assert_equal_run(got, static_oracle(problem, masks, inner))

    def test_brought_masks_of_prune_on_bfloat16(self):
        params = {"kernel": jnp.arange(1.0, 9).reshape(4, 2).astype(jnp.bfloat16)}
        masks = sj.prune(params, pattern=sj.NM(1, 2))
        tx = sj.static_sparse(optax.sgd(0.1), masks=masks, pattern=sj.NM(1, 2))
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        left = optax.apply_updates(params, updates)["kernel"]
        assert left.dtype == jnp.bfloat16
        np.testing.assert_array_equal(left != 0, masks["kernel"])

    def test_two_hundred_steps_keep_exact_zeros(self):
        problem, inner = oracle.Problem(steps=200), oracle.adamw()
        masks = drawn_masks(problem, sj.Unstructured(), dict.fromkeys(ERK_SHAPES, 0.8))
        tx = sj.static_sparse(inner.optax, 0.8, key=KEY, stacked=STACKED)
        got = oracle.train(tx, problem)
        for params, _ in got:
            for name, mask in masks.items():
                left = oracle.flat(params)[name]
                assert (left[~mask] == 0).all() and (left[mask] != 0).all()
        oracle.assert_equal_run(got, static_oracle(problem, masks, inner), rtol=1e-4)

    @parameterized.product(case=["sparsity 0", "n of n"])
    def test_sparsity_zero_is_the_inner_optimizer(self, case):
        problem, inner = oracle.Problem(), optax.adamw(0.02)
        if case == "sparsity 0":
            tx = sj.static_sparse(inner, 0.0, key=KEY)
        else:
            tx = sj.static_sparse(inner, key=KEY, pattern=sj.NM(4, 4), stacked=STACKED)
        got = oracle.train(tx, problem)[-1][0]
        want = oracle.train_inner(inner, problem)[-1]
        oracle.assert_close(oracle.wide(got), oracle.wide(want), 1e-6, 1e-7, "params")

    def test_gradient_of_the_forward_is_dense_and_the_inner_gets_it_masked(self):
        problem = oracle.Problem()
        tx = sj.static_sparse(optax.trace(0.9), 0.5, key=KEY)
        state = oracle.init(tx, problem.params)
        example = jax.tree.map(lambda x: x[0], problem.stream)
        loss = lambda p: oracle.loss_fn(sj.forward_params(state, p), example)  # noqa: E731
        grads = oracle.jit(jax.grad(loss))(problem.params)
        masks = oracle.flat(sj.masks_of(state))
        forward = oracle.masked(oracle.wide(problem.params), masks)
        want = problem.grad(0, forward)
        oracle.assert_close(oracle.wide(grads), want, 1e-6, 1e-6, "gradient")
        _, state = oracle.jit(tx.update)(grads, state, problem.params)
        trace = oracle.wide(state.inner_state.trace)
        oracle.assert_close(trace, oracle.masked(want, masks), 1e-6, 1e-6, "moments")


class DrawTest(parameterized.TestCase):
    @parameterized.product(shape=[(7, 3), (8, 8), (2, 3, 5)], sparsity=[0.0, 0.5, 0.97])
    def test_counts_are_exact(self, shape, sparsity):
        tx = sj.static_sparse(optax.sgd(0.1), sparsity, key=KEY)
        mask = oracle.first_masks(tx, {"kernel": jnp.ones(shape)})["kernel"]
        size = np.prod(shape)
        assert int(mask.sum()) == max(size - round(sparsity * size), 1)

    def test_same_key_same_mask_another_key_another(self):
        params = {"kernel": jnp.ones((16, 16))}
        a, b, c = (
            oracle.first_masks(sj.static_sparse(optax.sgd(0.1), 0.5, key=key), params)[
                "kernel"
            ]
            for key in (KEY, jax.random.key(3), jax.random.key(4))
        )
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()

    def test_layers_of_a_stack_differ_and_each_has_its_count(self):
        tx = sj.static_sparse(optax.sgd(0.1), 0.5, key=KEY, stacked=1)
        mask = oracle.first_masks(tx, {"kernel": jnp.ones((3, 8, 8))})["kernel"]
        np.testing.assert_array_equal(mask.sum((1, 2)), 32)
        assert (mask[0] != mask[1]).any()

    def test_adding_a_leaf_leaves_other_masks_unchanged(self):
        tx = sj.static_sparse(optax.sgd(0.1), 0.5, key=KEY)
        few = {"b": {"kernel": jnp.ones((8, 8))}, "d": {"kernel": jnp.ones((8, 8))}}
        more = {**few, "a": {"kernel": jnp.ones((8, 8))}, "c": jnp.ones((4, 4))}
        few, more = (oracle.first_masks(tx, p) for p in (few, more))
        for name, mask in few.items():
            np.testing.assert_array_equal(mask, more[name])
        assert (more["a/kernel"] != more["b/kernel"]).any()

    def test_a_density_is_met_on_average_everywhere(self):
        def mask(key):
            tx = sj.static_sparse(optax.sgd(0.1), 0.75, key=key)
            return sj.masks_of(tx.init({"kernel": jnp.ones((8, 8))}))["kernel"]

        drawn = oracle.jit(jax.vmap(mask))(jax.random.split(KEY, 400))
        mean = np.asarray(drawn).mean(0)
        np.testing.assert_allclose(mean, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 400))


BAD = {
    "neither": (dict(), "exactly one of `masks` and `sparsity`"),
    "no key": (dict(sparsity=0.5), "exactly one"),
    "both": (dict(sparsity=0.5, masks={"kernel": None}), "exactly one"),
    "key and masks": (dict(key=KEY, masks={"kernel": None}), "exactly one"),
    "schedule": (dict(sparsity=lambda t: 0.5, key=KEY), "constant `sparsity`"),
    "schedule in a tree": (
        dict(sparsity={"kernel": lambda t: 0.5}, key=KEY),
        "constant `sparsity`; got a schedule",
    ),
    "percentage": (dict(sparsity=50, key=KEY), r"\[0, 1\); got 50"),
    "one": (dict(sparsity=1.0, key=KEY), r"\[0, 1\); got 1.0"),
    "shape": (dict(masks={"kernel": jnp.ones((2, 2), bool)}), r"\(4, 2\).*'kernel'"),
    "dtype": (dict(masks={"kernel": jnp.ones((4, 2))}), "bool.*float32.*'kernel'"),
    "not made of blocks": (
        dict(masks={"kernel": jnp.eye(4, 2, dtype=bool)}, pattern=sj.Block((2, 1))),
        r"made of its pattern, Block\(shape=\(2, 1\)\); that at \['kernel'\]",
    ),
    "not n of m": (
        dict(masks={"kernel": jnp.ones((4, 2), bool)}, pattern=sj.NM(2, 4)),
        r"made of its pattern, NM\(n=2, m=4",
    ),
    "nothing": (dict(masks={"kernel": None}), "at least one leaf"),
    "missing": (dict(key=KEY), "`sparsity` must be given.*'kernel'"),
    "across": (
        dict(
            sparsity=0.5, key=KEY, allocation=sj.erdos_renyi_kernel, across_leaves=True
        ),
        "`allocation`.*`across_leaves`.*one of the two",
    ),
    "not read": (
        dict(masks={"kernel": jnp.ones((4, 2), bool)}, where={"kernel": True}),
        "not read beside `masks`; got where.",
    ),
    "none read": (
        dict(
            masks={"kernel": jnp.ones((4, 2), bool)},
            allocation=sj.erdos_renyi,
            across_leaves=True,
        ),
        "not read beside `masks`; got allocation, across_leaves.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        sj.static_sparse(optax.sgd(0.1), **kwargs).init({"kernel": jnp.ones((4, 2))})


def test_update_needs_params():
    tx = sj.static_sparse(optax.sgd(0.1), 0.5, key=KEY)
    state = tx.init({"kernel": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"static_sparse.*needs `params`"):
        tx.update({"kernel": jnp.ones((4, 2))}, state)


def test_brought_masks_outlive_a_donated_state():
    params = {"kernel": jnp.arange(8.0).reshape(4, 2)}
    mask = {"kernel": jnp.arange(8).reshape(4, 2) % 2 == 0}
    tx = sj.static_sparse(optax.sgd(0.1), masks=mask)
    jax.jit(tx.update, donate_argnums=1)(params, tx.init(params), params)
    assert int(mask["kernel"].sum()) == 4


@pytest.mark.parametrize("key", [nnx.Rngs(0), nnx.Rngs(0).params, 0, jnp.arange(2)])
def test_what_is_no_key(key):
    with pytest.raises(TypeError, match=r"`key` must be one random key.*rngs\.params"):
        sj.static_sparse(optax.sgd(0.1), 0.5, key=key)

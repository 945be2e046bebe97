"""What the loop reads from a state, wherever optax or Flax has put it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from flax import nnx

import sparsejax as sj
from tests.transforms import _oracles as oracle

KEY = jax.random.key(5)


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)},
        "b": {
            "bias": jnp.zeros(4),
            "kernel": jnp.asarray(rng.standard_normal((4, 4)), jnp.float32),
        },
    }


def at(*names):
    """A `where` that governs the kernels under these names."""
    return lambda path, leaf: leaf.ndim == 2 and path[0].key in names


def static(inner=None, sparsity=0.5, **kwargs):
    return sj.static_sparse(inner or optax.sgd(0.1), sparsity, key=KEY, **kwargs)


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(
        tx, {"a": True, "b": {"bias": False, "kernel": True}}
    ),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "theirs": optax.sgd(0.1)},
        {"a": "ours", "b": {"bias": "theirs", "kernel": "ours"}},
    ),
    "partition of a subtree": lambda tx: optax.partition(
        {"ours": tx, "theirs": static(sparsity=0.5)}, {"a": "theirs", "b": "ours"}
    ),
    "steps": lambda tx: optax.MultiSteps(tx, 2),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: static(optax.sgd(learning_rate))
    )(learning_rate=0.1),
    "inject inside": lambda tx: static(optax.inject_hyperparams(optax.sgd)(0.1)),
    "nested": lambda tx: optax.chain(
        optax.apply_if_finite(optax.masked(tx, lambda p: jax.tree.map(jnp.ndim, p)), 3)
    ),
}


class FindTest(parameterized.TestCase):
    @parameterized.product(wrapper=list(WRAPPERS))
    def test_reads_through_wrappers(self, wrapper):
        params = params_of()
        tx = WRAPPERS[wrapper](static())
        state = oracle.init(tx, params)
        want = oracle.first_masks(static(), params)  # masks hang on the path alone
        chex.assert_trees_all_equal(oracle.flat(sj.masks_of(state)), want)
        assert jax.tree.structure(sj.masks_of(state), is_leaf=lambda x: x is None) == (
            jax.tree.structure(params)
        )
        for read in (sj.forward_params, sj.sparse_params):
            got = read(state, params)
            assert jax.tree.structure(got) == jax.tree.structure(params)
            for name, leaf in oracle.flat(got).items():
                weight = oracle.flat(params)[name]
                mask = want.get(name, np.True_)
                np.testing.assert_array_equal(leaf, np.where(mask, weight, 0))
        assert not bool(sj.is_mask_update(state))

    def test_two_methods_are_merged(self):
        params = params_of()
        tx = optax.partition(
            {
                "rigl": sj.rigl(
                    optax.adam(0.1), 0.5, update_every=2, stop_step=9, key=KEY
                ),
                "ste": sj.mask_decay(optax.sgd(0.1), 0.5, pattern=sj.NM(2, 4)),
            },
            {"a": "rigl", "b": "ste"},
        )
        state = oracle.init(tx, params)
        masks = sj.masks_of(state)
        assert masks["b"]["bias"] is None and int(masks["a"]["kernel"].sum()) == 16
        forward = oracle.forward_of(state, params)
        ste = oracle.select(abs(params["b"]["kernel"]), oracle.Spec(sj.NM(2, 4)))
        np.testing.assert_array_equal(masks["b"]["kernel"], ste)
        np.testing.assert_allclose(
            forward["b/kernel"], params["b"]["kernel"] * (ste + ~ste * 0.5), rtol=1e-6
        )
        np.testing.assert_array_equal(forward["a/kernel"] != 0, masks["a"]["kernel"])
        final = oracle.final_of(state, params)
        np.testing.assert_array_equal(final["b/kernel"] != 0, ste)

    def test_two_methods_in_a_chain_on_different_leaves(self):
        params = params_of()
        tx = optax.chain(static(optax.identity(), where=at("a")), static(where=at("b")))
        state = oracle.init(tx, params)
        want = oracle.first_masks(static(), params)
        chex.assert_trees_all_equal(oracle.flat(sj.masks_of(state)), want)
        forward = oracle.forward_of(state, params)
        for name, mask in want.items():
            np.testing.assert_array_equal(forward[name] != 0, mask)

    def test_a_leaf_governed_twice_raises_naming_it(self):
        params = params_of()
        tx = optax.chain(static(optax.identity()), static(where=at("b")))
        state = oracle.init(tx, params)
        for read in (sj.forward_params, sj.sparse_params):
            with pytest.raises(ValueError, match=r"one method.*\['b'\]\['kernel'\]"):
                read(state, params)
        with pytest.raises(ValueError, match=r"one method.*\['b'\]\['kernel'\]"):
            sj.masks_of(state)

    def test_no_state_raises(self):
        params = params_of()
        state = optax.adam(0.1).init(params)
        for read in (
            sj.masks_of,
            sj.is_mask_update,
            lambda s: sj.forward_params(s, params),
            lambda s: sj.sparse_params(s, params),
        ):
            with pytest.raises(ValueError, match="found none in tuple"):
                read(state)

    def test_other_params_raise(self):
        state = oracle.init(static(), params_of())
        with pytest.raises(ValueError, match=r"cover \d leaves, the params have 1"):
            sj.forward_params(state, {"a": jnp.ones((8, 4))})

    def test_flax_optimizer(self):
        model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        want = np.random.default_rng(0).random((8, 4)) < 0.5
        masks = {"bias": None, "kernel": jnp.asarray(want)}
        tx = sj.static_sparse(optax.adam(0.1), masks=masks)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        weights = nnx.state(model, nnx.Param)
        # of the state, and of a dict that aligns with it by order
        plain = {"bias": model.bias[...], "kernel": model.kernel[...]}
        for params in (weights, plain):
            forward = sj.forward_params(optimizer.opt_state, params)
            assert jax.tree.structure(forward) == jax.tree.structure(params)
            np.testing.assert_array_equal(forward["kernel"][...] != 0, want)
        found = jax.tree.leaves(sj.masks_of(optimizer.opt_state))
        np.testing.assert_array_equal(found, [want])
        optimizer.update(model, jax.tree.map(jnp.ones_like, weights))
        np.testing.assert_array_equal(model.kernel[...] != 0, want)

    def test_params_that_are_none_pass_through(self):
        params = {"kernel": jnp.ones((4, 4)), "nothing": None}
        state = oracle.init(static(), params)
        forward = sj.forward_params(state, params)
        assert forward["nothing"] is None and int(forward["kernel"].sum()) == 8


class DueTest(parameterized.TestCase):
    def due(self, tx, steps):
        params = params_of()
        zeros = jax.tree.map(jnp.zeros_like, params)

        def body(state, _):
            due = sj.is_mask_update(state)
            return tx.update(zeros, state, params)[1], due

        run = oracle.jit(lambda p: jax.lax.scan(body, tx.init(p), length=steps)[1])
        got = run(params)
        assert got.dtype == jnp.bool_
        return [t for t, due in enumerate(got) if due]

    def test_says_when_the_topology_may_change(self):
        rigl = sj.rigl(optax.sgd(0.1), 0.5, update_every=3, stop_step=9, key=KEY)
        assert self.due(rigl, 16) == [0, 3, 6, 9]
        prune = sj.magnitude_prune(optax.sgd(0.1), 0.5, update_every=4)
        assert self.due(prune, 10) == [0, 4, 8]
        assert self.due(static(), 3) == []
        adams = sj.adams(0.1, 20, 0.1, pattern=sj.NM(2, 4), mask_period=5)
        assert self.due(adams, 11) == [0, 5, 10]
        ste = sj.sr_ste(optax.sgd(0.1), pattern=sj.NM(2, 4))
        assert self.due(ste, 3) == [0, 1, 2]

    def test_any_of_several_states(self):
        make = functools.partial(sj.rigl, optax.sgd(0.1), 0.5, stop_step=99, key=KEY)
        tx = optax.partition(
            {"x": make(update_every=2), "y": make(update_every=3)},
            {"a": "x", "b": "y"},
        )
        assert self.due(tx, 7) == [0, 2, 3, 4, 6]

    def test_all_micro_steps_of_a_mask_update(self):
        tx = sj.rigl(optax.sgd(0.1), 0.5, update_every=2, stop_step=99, key=KEY)
        tx = optax.MultiSteps(tx, 3)
        assert self.due(tx, 9) == [0, 1, 2, 6, 7, 8]

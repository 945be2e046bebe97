"""What holds for every method: counts under bad numbers, packing, one trace."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from tests.transforms import _oracles as oracle

KEY = jax.random.key(21)
STACKED = oracle.Problem.STACKED
NAMES = ("dense/kernel", "stack/kernel")


@dataclasses.dataclass(frozen=True)
class Method:
    """How to make one, around `inner` (which AdamS has not)."""

    make: Callable
    pattern: object = sj.Unstructured()
    sparsity: float | None = 0.5
    hard: bool = True


def adamw():
    return optax.adamw(0.05)


def dynamic(method, pattern=sj.Unstructured(), sparsity=0.5):  # noqa: B008
    def make(inner, **kwargs):
        return method(
            inner,
            sparsity,
            update_every=2,
            stop_step=12,
            drop_fraction=0.5,
            key=KEY,
            pattern=pattern,
            **kwargs,
        )

    return Method(make, pattern, sparsity)


METHODS = {
    "static": Method(
        lambda inner, **kwargs: sj.static_sparse(inner, 0.5, key=KEY, **kwargs)
    ),
    "magnitude": Method(
        lambda inner, **kwargs: sj.magnitude_prune(
            inner, pattern=sj.NM(2, 4), update_every=2, **kwargs
        ),
        sj.NM(2, 4),
        None,
    ),
    "magnitude block": Method(
        lambda inner, **kwargs: sj.magnitude_prune(
            inner, 0.5, pattern=sj.Block((4, 2)), update_every=1, **kwargs
        ),
        sj.Block((4, 2)),
    ),
    "set": dynamic(sj.sparse_evolution),
    "set nm": dynamic(sj.sparse_evolution, sj.NM(1, 4), None),
    "rigl": dynamic(sj.rigl),
    "rigl channel": dynamic(sj.rigl, sj.Channel(-1)),
    "sr_ste": Method(
        lambda inner, **kwargs: sj.sr_ste(
            inner, pattern=sj.NM(2, 4), decay=0.5, **kwargs
        ),
        sj.NM(2, 4),
        None,
        hard=False,
    ),
    "mask_decay": Method(
        lambda inner, **kwargs: sj.mask_decay(
            inner,
            sj.schedules.linear_decay(0.125),
            pattern=sj.Channel(-1),
            sparsity=0.5,
            **kwargs,
        ),
        sj.Channel(-1),
        hard=False,
    ),
    "structure_decay": Method(
        lambda inner, **kwargs: sj.structure_decay(
            inner, (sj.NM(2, 4), sj.NM(1, 4)), (0, 3), straight_through=True, **kwargs
        ),
        sj.NM(1, 4),
        None,
        hard=False,
    ),
    "adams": Method(
        lambda inner, **kwargs: sj.adams(
            0.05, 20, 0.3, pattern=sj.NM(2, 4), mask_period=3, **kwargs
        ),
        sj.NM(2, 4),
        None,
        hard=False,
    ),
}
ONE_EACH = [name for name in METHODS if " " not in name]


def updates_of(tx):
    """A function that feeds given gradients: each step's params and masks."""

    def body(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        forward = sj.forward_params(state, params)
        return (params, state), (params, forward, sj.masks_of(state))

    return lambda params, grads: jax.lax.scan(body, (params, tx.init(params)), grads)[1]


def update_all(tx, params, gradients):
    return oracle.jit(updates_of(tx))(params, gradients)


def exact(method, **kwargs):
    """A method in exact arithmetic: programs cannot differ by how XLA fuses them."""
    return METHODS[method].make(optax.sgd(0.25), stacked=STACKED, **kwargs)


def exact_problem():
    problem = oracle.Problem(steps=8, ties=True)
    return problem.params, problem.stream[1]


@functools.cache  # compiled once for all that other runs are compared with
def exact_run(method):
    return update_all(exact(method), *exact_problem())


class NonFiniteTest(parameterized.TestCase):
    @parameterized.product(method=list(METHODS))
    def test_bad_gradients_never_corrupt_masks(self, method):
        method, steps = METHODS[method], 14
        problem = oracle.Problem(steps=steps)
        rng = np.random.default_rng(0)
        gradients = problem.stream[1]
        for leaf in jax.tree.leaves(gradients):
            for step, value in ((4, np.nan), (5, np.inf), (7, -np.inf), (8, np.nan)):
                leaf[step][rng.random(leaf[step].shape) < 0.2] = value
            leaf[10] = np.nan  # all of them
        tx = method.make(adamw(), stacked=STACKED)
        params, forward, masks = update_all(tx, problem.params, gradients)
        forward, masks = oracle.flat(forward), oracle.flat(masks)
        assert any(np.isnan(p).any() for p in oracle.flat(params).values())
        for name, spec in problem.specs(method.pattern).items():
            for step in range(steps):
                mask = masks[name][step]
                if step >= 3:  # structure_decay begins with another pattern
                    oracle.assert_pattern(mask, spec, method.sparsity)
                if method.hard:
                    assert (forward[name][step][~mask] == 0).all()

    @parameterized.product(method=["static", "magnitude", "set", "rigl"])
    def test_bad_gradients_of_pruned_weights_reach_nothing(self, method):
        tx = METHODS[method].make(adamw())
        params = {
            "kernel": jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)))
        }
        params = jax.tree.map(jnp.float32, params)

        @oracle.jit
        def run(params):
            state = tx.init(params)
            for _ in range(2):  # a mask update, then a step without one
                mask = sj.masks_of(state)["kernel"]
                grads = {"kernel": jnp.where(mask, 0.1, jnp.nan)}
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
            return params, state

        params, state = run(params)
        assert np.isfinite(params["kernel"]).all()
        for leaf in jax.tree.leaves(state.inner_state):
            assert np.isfinite(leaf).all()

    @parameterized.product(method=ONE_EACH)
    def test_init_raises_on_nan_weights_eagerly_only(self, method):
        method = METHODS[method]
        tx = method.make(adamw())
        weights = np.ones((8, 4), np.float32)
        weights[2, 1] = np.nan
        params = {"a": {"kernel": np.ones((8, 4), "f")}, "b": {"kernel": weights}}
        with pytest.raises(ValueError, match=r"got 1 of 32 NaN at \['b'\]\['kernel'\]"):
            tx.init(params)
        masks = oracle.first_masks(tx, params)
        for mask in masks.values():
            if method.make is not METHODS["structure_decay"].make:  # begins with 2:4
                oracle.assert_pattern(
                    mask, oracle.Spec(method.pattern), method.sparsity
                )


class PackedTest(parameterized.TestCase):
    @parameterized.product(method=ONE_EACH)
    def test_packed_masks_give_the_same_run(self, method):
        # rows of 6 and of 4 weights do not fill a byte
        plain = exact_run(method)
        packed = update_all(exact(method, pack_masks=True), *exact_problem())
        chex.assert_trees_all_equal(plain[2], packed[2])  # masks
        if method == "adams":  # has its own, inexact arithmetic
            chex.assert_trees_all_close(plain, packed, rtol=1e-6)
        else:
            chex.assert_trees_all_equal(plain, packed)

    @parameterized.product(method=["static", "rigl", "sr_ste", "adams"])
    def test_packed_masks_take_one_bit_a_weight(self, method):
        params = {"kernel": jnp.ones((64, 40)), "bias": jnp.ones(40)}

        def num_bytes(pack):
            tx = METHODS[method].make(adamw(), pack_masks=pack)
            masks = optax.tree.get(jax.eval_shape(tx.init, params), "masks")
            return sum(m.size * m.dtype.itemsize for m in jax.tree.leaves(masks))

        assert num_bytes(True) == 64 * 40 // 8
        assert num_bytes(False) == 64 * 40


class ManualTest(parameterized.TestCase):
    """Inside `shard_map` an array is the part of one device."""

    @parameterized.product(method=list(METHODS), check_vma=[True, False])
    def test_shard_map_gives_the_same_run(self, method, check_vma):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(
            updates_of(exact(method, pack_masks=check_vma)),
            mesh=mesh,
            in_specs=P(),
            out_specs=P(),
            check_vma=check_vma,
        )
        plain, found = exact_run(method), oracle.jit(mapped)(*exact_problem())
        chex.assert_trees_all_equal(plain[2], found[2])  # masks
        chex.assert_trees_all_close(plain, found, rtol=1e-6)

    @parameterized.product(check_vma=[True, False])
    def test_prune_sees_the_part_of_a_device(self, check_vma):
        params = {"kernel": jax.random.normal(KEY, (16, 4))}
        mapped = jax.shard_map(
            lambda p: sj.prune(p, 0.5),
            mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=P("data"),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        halves = [sj.prune(half, 0.5)["kernel"] for half in _halves(params)]
        np.testing.assert_array_equal(mapped(params)["kernel"], np.concatenate(halves))

    def test_pmap(self):
        params = {"kernel": jax.random.normal(KEY, (16, 4))}
        both = {"kernel": params["kernel"].reshape(2, 8, 4)}
        found = jax.pmap(lambda p: sj.prune(p, 0.5), devices=jax.devices()[:2])(both)
        halves = [sj.prune(half, 0.5)["kernel"] for half in _halves(params)]
        np.testing.assert_array_equal(found["kernel"], np.stack(halves))


def _halves(params):
    return [{"kernel": half} for half in jnp.split(params["kernel"], 2)]


class StateTest(parameterized.TestCase):
    @parameterized.product(method=["static", "set", "rigl"])
    def test_only_governed_leaves_are_drawn(self, method):
        params = {"embedding": jnp.ones((16, 4)), "kernel": jnp.ones((8, 4))}
        init = METHODS[method].make(optax.sgd(0.5)).init
        assert str(jax.make_jaxpr(init)(params)).count("random_bits") == 1

    @parameterized.product(method=["static", "magnitude", "set", "rigl"])
    def test_a_scalar_may_be_governed(self, method):
        params = {"gain": jnp.array(2.0), "kernel": jnp.arange(1.0, 33).reshape(8, 4)}
        where = {"gain": True, "kernel": True}
        if method == "magnitude":
            tx = sj.magnitude_prune(optax.sgd(0.5), 0.5, update_every=1, where=where)
        else:
            tx = METHODS[method].make(optax.sgd(0.5), where=where)
        grads = jax.tree.map(jnp.ones_like, params)
        state = oracle.init(tx, params)
        for _ in range(2):  # the first is no step of RigL
            updates, state = oracle.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert float(params["gain"]) == 1.5  # at least one weight of each leaf stays
        assert int((params["kernel"] != 0).sum()) <= 16

    @parameterized.product(
        make=[
            lambda **kwargs: sj.sr_ste(optax.sgd(0.1), **kwargs),
            lambda **kwargs: sj.scale_by_adams(10, 0.1, **kwargs),
        ],
        jit=[False, True],
    )
    def test_an_allocation_may_compute_by_arrays(self, make, jit):
        params = {"a": jnp.arange(32.0).reshape(8, 4), "b": jnp.ones((4, 4))}

        def halves(params, sparsity, **kwargs):
            return {"a": jnp.float32(sparsity) / 2, "b": np.float32(sparsity)}

        def of_weights(params, sparsity, **kwargs):
            return jax.tree.map(lambda p: jnp.clip(p.mean(), 0, sparsity), params)

        kwargs = dict(pattern=sj.Unstructured(), sparsity=0.5)
        tx = make(allocation=halves, **kwargs)
        state = (oracle.jit(tx.init) if jit else tx.init)(params)
        assert state.settings.sparsities == (0.25, 0.5)
        assert hash(state.settings) == hash(tx.init(params).settings)
        _, state = oracle.jit(tx.update)(params, state, params)
        kept = {name: int(mask.sum()) for name, mask in sj.masks_of(state).items()}
        assert kept == {"a": 24, "b": 8}
        tx = make(allocation=of_weights, **kwargs)
        if jit:
            with pytest.raises(TypeError, match=r"`allocation` must.*\['a'\]"):
                jax.jit(tx.init)(params)
        else:
            assert tx.init(params).settings.sparsities == (0.5, 0.5)

    @parameterized.product(method=list(METHODS), pack=[False, True])
    def test_types_of_the_state_are_stable(self, method, pack):
        tx = METHODS[method].make(adamw(), stacked=STACKED, pack_masks=pack)
        params = jax.tree.map(jnp.asarray, oracle.Problem(steps=1).params)
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal(state, after)  # weak types too: one trace

    @parameterized.product(method=ONE_EACH)
    def test_update_takes_extra_arguments_and_needs_params(self, method):
        tx = METHODS[method].make(adamw())
        params = {"kernel": jnp.ones((8, 4))}
        state = oracle.init(tx, params)
        update = lambda g, s, p: tx.update(g, s, p, value=1.0, odd=None)  # noqa: E731
        jax.eval_shape(update, params, state, params)
        with pytest.raises(ValueError, match="needs `params`"):
            tx.update(params, state)


@pytest.mark.parametrize(
    "inner", [optax.lamb(0.1), optax.lars(0.1), optax.fromage(0.1)]
)
def test_the_first_step_sees_no_pruned_weight(inner):
    params = {"kernel": jax.random.normal(KEY, (16, 16))}
    mask = {"kernel": jnp.arange(256).reshape(16, 16) % 8 == 0}
    pruned = sj.apply_masks(params, mask)
    grads = {"kernel": jnp.ones((16, 16))}
    tx = sj.static_sparse(inner, masks=mask)
    got, want = (
        optax.apply_updates(p, tx.update(grads, tx.init(p), p)[0])
        for p in (params, pruned)
    )
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_soft_methods_take_8_bit_floats(dtype):
    params = {"kernel": jax.random.normal(KEY, (8, 8)).astype(dtype)}
    for tx in (
        sj.sr_ste(optax.sgd(0.1), pattern=sj.NM(2, 4)),
        sj.mask_decay(optax.sgd(0.1), lambda step: 0.0, pattern=sj.NM(2, 4)),
    ):
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        moved = optax.apply_updates(params, updates)
        assert moved["kernel"].dtype == dtype
        kept = np.asarray(sj.sparse_params(state, moved)["kernel"], np.float32) != 0
        assert kept.reshape(2, 4, 8).sum(axis=1).max() <= 2
    mixed = params | {"other": jnp.ones((8, 8))}
    found = sj.prune(mixed, 0.5, across_leaves=True)
    assert sum(int(jnp.sum(mask)) for mask in jax.tree.leaves(found)) == 64


def test_a_param_may_be_named_as_a_moment():
    params = {"kernel": jnp.ones((4, 4)), "mu": {"kernel": jnp.ones((4, 4))}}
    even = jnp.arange(16).reshape(4, 4) % 2 == 0
    masks = {"kernel": even, "mu": {"kernel": ~even}}
    renamed = {"kernel": params["kernel"], "head": params["mu"]}
    as_renamed = {"kernel": even, "head": masks["mu"]}

    def run(params, masks):
        tx = sj.static_sparse(optax.adam(0.1), masks=masks)
        state, grads = tx.init(params), jax.tree.map(jnp.ones_like, params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    got, want = run(params, masks), run(renamed, as_renamed)
    chex.assert_trees_all_equal(got, {"kernel": want["kernel"], "mu": want["head"]})

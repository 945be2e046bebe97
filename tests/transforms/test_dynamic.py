"""SET and RigL: drop the weakest, grow random ones or those of the largest gradient."""

import functools
import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import sparsejax as sj
from tests.transforms import _oracles as oracle

KEY = jax.random.key(11)
STACKED = oracle.Problem.STACKED
NAMES = ("dense/kernel", "stack/kernel")
METHODS = {"set": sj.sparse_evolution, "rigl": sj.rigl}


def random_scores(problem, key):
    return oracle.flat(sj.scores.random(problem.params, key=key))


def dynamic_oracle(
    method, problem, pattern, sparsities, inner, *, every, stop, fraction_at
):
    """The step of each method's paper; f(t) is the share replaced."""
    specs = problem.specs(pattern)
    params = oracle.wide(problem.params)
    inner.init(params)
    draws = random_scores(problem, KEY)
    masks = {
        name: oracle.select(draws[name], spec, sparsities[name])
        for name, spec in specs.items()
    }
    for step in range(problem.steps):
        due = step % every == 0 and step <= stop
        oracle.forget_pruned(inner, masks)
        grads = problem.grad(step, oracle.masked(params, masks))
        if not (due and method == "rigl"):  # RigL takes no step then
            updates = inner.update(oracle.masked(grads, masks), params)
            params = {name: p + updates[name] for name, p in params.items()}
        params = oracle.masked(params, masks)
        if due:
            if method == "rigl":
                grow = {name: abs(grads[name]) for name in specs}
            else:
                grow = random_scores(problem, jax.random.fold_in(KEY, step))
            new = {
                name: oracle.drop_and_grow(
                    masks[name],
                    spec,
                    abs(params[name]),
                    grow[name],
                    fraction_at(step),
                )
                for name, spec in specs.items()
            }
            regrown = {name: new[name] & ~masks[name] for name in new}
            masks = new
            params = oracle.masked(params, masks)
            for name, mask in regrown.items():
                params[name][mask] = 0.0
        yield params, masks, inner


def make(method, inner, sparsity, *, every=3, stop=15, **kwargs):
    return METHODS[method](
        inner, sparsity, update_every=every, stop_step=stop, key=KEY, **kwargs
    )


class DynamicTest(parameterized.TestCase):
    @parameterized.parameters(
        ("set", sj.Unstructured(), oracle.momentum),
        ("rigl", sj.Unstructured(), oracle.momentum),
        ("set", sj.Unstructured(), oracle.adamw),
        ("rigl", sj.Unstructured(), oracle.adamw),
        ("set", sj.NM(2, 4), oracle.adamw),
        ("rigl", sj.NM(2, 4), oracle.adamw),
        ("set", sj.Block((2, 2)), oracle.momentum),
        ("rigl", sj.Channel(-2), oracle.adamw),
    )
    def test_matches_oracle(self, method, pattern, inner):
        problem, inner = oracle.Problem(steps=26), inner()
        sparsity = None if isinstance(pattern, sj.NM) else 0.5
        tx = make(
            method,
            inner.optax,
            sparsity,
            drop_fraction=0.6,
            pattern=pattern,
            stacked=STACKED,
        )
        want = dynamic_oracle(
            method,
            problem,
            pattern,
            dict.fromkeys(NAMES, sparsity),
            inner,
            every=3,
            stop=15,
            fraction_at=lambda t: oracle.cosine_fraction(t, 0.6, 15),
        )
        got = oracle.train(tx, problem)
        oracle.assert_equal_run(got, want)
        for params, state in got:
            masks = oracle.flat(sj.masks_of(state))
            for name, spec in problem.specs(pattern).items():
                oracle.assert_pattern(masks[name], spec, sparsity)
                assert (oracle.flat(params)[name][~masks[name]] == 0).all()

    @parameterized.product(method=list(METHODS))
    def test_twenty_mask_updates_with_erdos_renyi_kernel(self, method):
        # not Adam: with fresh moments its first step has one size for all weights, and
        # the second update would rank rounding errors
        problem, inner = oracle.Problem(steps=42), oracle.momentum()
        sparsities = oracle.erk(
            {"dense/kernel": (8, 6), "stack/kernel": (8, 4)},
            0.7,
            {"dense/kernel": 48, "stack/kernel": 96},
        )
        fraction = lambda t: 0.5 * 0.9 ** (t // 2)  # noqa: E731  (1 - p)^k
        tx = make(
            method,
            inner.optax,
            0.7,
            every=2,
            stop=40,
            drop_fraction=fraction,
            stacked=STACKED,
            allocation=sj.erdos_renyi_kernel,
        )
        want = dynamic_oracle(
            method,
            problem,
            sj.Unstructured(),
            sparsities,
            inner,
            every=2,
            stop=40,
            fraction_at=fraction,
        )
        oracle.assert_equal_run(oracle.train(tx, problem), want)

    @parameterized.parameters(
        ("set", sj.Unstructured()),
        ("rigl", sj.Unstructured()),
        ("set", sj.NM(1, 4)),
        ("rigl", sj.Block((2, 2))),
    )
    def test_ties_go_to_the_lower_index(self, method, pattern):
        problem, inner = oracle.Problem(ties=True), oracle.plain()
        sparsity = None if isinstance(pattern, sj.NM) else 0.5
        constant = lambda t: 0.5  # noqa: E731
        tx = make(
            method,
            inner.optax,
            sparsity,
            every=2,
            stop=100,
            drop_fraction=constant,
            pattern=pattern,
            stacked=STACKED,
        )
        want = dynamic_oracle(
            method,
            problem,
            pattern,
            dict.fromkeys(NAMES, sparsity),
            inner,
            every=2,
            stop=100,
            fraction_at=constant,
        )
        oracle.assert_equal_run(oracle.train(tx, problem), want, rtol=0, atol=0)

    @parameterized.product(method=list(METHODS))
    def test_number_replaced_follows_the_cosine_and_stop_step_is_inclusive(
        self, method
    ):
        # of RigL what is dropped does not come back at once, since the gradient of all
        # others is larger; of SET some does, so that only an upper bound shows
        params = {"kernel": jnp.ones((100, 100))}
        tx = make(method, optax.sgd(0.0), 0.9, every=25, stop=100)

        def body(state, _):
            old = sj.masks_of(state)["kernel"]
            grads = {"kernel": jnp.where(old, 1.0, 2.0)}
            state = tx.update(grads, state, params)[1]
            new = sj.masks_of(state)["kernel"]
            return state, (jnp.sum(old & ~new), jnp.sum(new & ~old), jnp.sum(new))

        gone, grown, kept = oracle.jit(
            lambda p: jax.lax.scan(body, tx.init(p), length=130)[1]
        )(params)
        np.testing.assert_array_equal(kept, 1000)
        np.testing.assert_array_equal(gone, grown)
        want = np.zeros(130, int)
        want[:101:25] = [int(1000 * f) for f in (0.3, 0.256066, 0.15, 0.043934, 0.0)]
        if method == "rigl":
            np.testing.assert_array_equal(gone, want)
        else:
            assert (gone <= want).all() and (gone[:76:25] > 0.8 * want[:76:25]).all()

    @parameterized.product(method=list(METHODS))
    def test_the_last_update_is_at_stop_step(self, method):
        problem = oracle.Problem(steps=9)
        tx = make(
            method,
            optax.sgd(0.1),
            0.5,
            every=2,
            stop=4,
            drop_fraction=lambda t: 0.5,
            where=lambda path, leaf: leaf.shape == (8, 6),
        )
        masks = [oracle.first_masks(tx, problem.params)]
        masks += [oracle.flat(sj.masks_of(s)) for _, s in oracle.train(tx, problem)]
        changed = [
            any((a[name] != b[name]).any() for name in a)
            for a, b in itertools.pairwise(masks)
        ]
        assert [step for step, c in enumerate(changed) if c] == [0, 2, 4]

    @parameterized.product(method=list(METHODS))
    def test_drop_fraction_zero_is_the_identity(self, method):
        problem = oracle.Problem(steps=8)
        tx = make(
            method,
            optax.adam(0.1),
            0.5,
            drop_fraction=0.0,
            where=lambda path, leaf: leaf.shape == (8, 6),
        )
        first = oracle.first_masks(tx, problem.params)
        for _, state in oracle.train(tx, problem):
            chex.assert_trees_all_equal(oracle.flat(sj.masks_of(state)), first)

    def test_set_at_sparsity_zero_is_the_inner_optimizer(self):
        problem, inner = oracle.Problem(), optax.adamw(0.02)
        got = oracle.train(make("set", inner, 0.0, stacked=STACKED), problem)
        want = oracle.train_inner(inner, problem)
        for (params, _), expected in zip(got, want, strict=True):
            oracle.assert_close(
                oracle.wide(params), oracle.wide(expected), 1e-6, 1e-7, "params"
            )

    def test_rigl_at_sparsity_zero_is_the_inner_optimizer_but_for_skipped_steps(self):
        problem, inner = oracle.Problem(), optax.adamw(0.02)
        got = oracle.train(make("rigl", inner, 0.0, stacked=STACKED), problem)
        taken = [t for t in range(problem.steps) if t % 3 or t > 15]
        rest = oracle.Problem(steps=len(taken))
        rest.stream = jax.tree.map(lambda x: x[np.array(taken)], problem.stream)
        want = oracle.train_inner(inner, rest)
        for step, expected in zip(taken, want, strict=True):
            oracle.assert_close(
                oracle.wide(got[step][0]), oracle.wide(expected), 1e-6, 1e-7, "params"
            )

    def test_a_set_step_is_that_of_the_optimizer_without_pruned_weights(self):
        # an optimizer whose step of one weight depends on the moments of all
        class Normed(oracle.Sgd):
            def update(self, grads, params):
                trace = super().update(grads, params)
                norm = np.sqrt(sum((t**2).sum() for t in trace.values()))
                return {name: t / norm for name, t in trace.items()}

        def divide(updates, state, params=None):
            del params
            norm = optax.tree.norm(updates)
            return jax.tree.map(lambda u: -u / norm, updates), state

        problem, inner = oracle.Problem(), Normed(1.0, 0.9)
        by_norm = optax.GradientTransformation(lambda _: optax.EmptyState(), divide)
        tx = make(
            "set",
            optax.chain(optax.trace(0.9), by_norm),
            0.5,
            drop_fraction=0.6,
            stacked=STACKED,
        )
        want = dynamic_oracle(
            "set",
            problem,
            sj.Unstructured(),
            dict.fromkeys(NAMES, 0.5),
            inner,
            every=3,
            stop=15,
            fraction_at=lambda t: oracle.cosine_fraction(t, 0.6, 15),
        )
        oracle.assert_equal_run(oracle.train(tx, problem), want)

    @parameterized.product(method=list(METHODS))
    def test_counts_follow_a_sparsity_schedule(self, method):
        problem = oracle.Problem(steps=12)
        schedule = sj.schedules.stepwise([0.25, 0.75, 0.5], [4, 8])
        tx = make(method, optax.sgd(0.1), schedule, every=2, stacked=STACKED)
        for step, (params, state) in enumerate(oracle.train(tx, problem)):
            sparsity = 0.25 if step < 4 else 0.75 if step < 8 else 0.5
            masks = oracle.flat(sj.masks_of(state))
            for name, spec in problem.specs(sj.Unstructured()).items():
                oracle.assert_pattern(masks[name], spec, sparsity)
                assert (oracle.flat(params)[name][~masks[name]] == 0).all()


def one_update(method, inner, weights, mask, grads, drop_fraction, steps_before=()):
    """One mask update from given weights and mask, in a hand-made state."""
    params = {"kernel": jnp.asarray(weights)}
    tx = METHODS[method](
        inner,
        1 - np.mean(mask),
        update_every=100,
        stop_step=10**6,
        drop_fraction=drop_fraction,
        key=KEY,
    )
    state = oracle.init(tx, params)
    state = state._replace(masks={"kernel": jnp.asarray(mask)})
    for gradient in steps_before:
        masked = {"kernel": jnp.where(jnp.asarray(mask), gradient, 0)}
        _, inner_state = inner.update(masked, state.inner_state, params)
        state = state._replace(inner_state=inner_state)
    before = state.inner_state
    grads = {"kernel": jnp.asarray(grads)}
    updates, state = oracle.jit(tx.update)(grads, state, params)
    return optax.apply_updates(params, updates)["kernel"], before, state


class OneUpdateTest(parameterized.TestCase):
    WEIGHTS = np.array([[4.0, 1.0], [0.0, 3.0], [0.0, 0.0]], np.float32)
    MASK = WEIGHTS != 0

    def test_rigl_takes_no_step_and_leaves_the_inner_state(self):
        grads = np.array([[9.0, 1.0], [5.0, 1.0], [2.0, 2.0]], np.float32)
        left, before, state = one_update(
            "rigl", optax.adam(0.1), self.WEIGHTS, self.MASK, grads, 0.4, [self.WEIGHTS]
        )
        # one of three is dropped, the smallest; the largest gradient elsewhere grows
        want = np.array([[True, False], [True, True], [False, False]])
        np.testing.assert_array_equal(sj.masks_of(state)["kernel"], want)
        np.testing.assert_array_equal(left, [[4, 0], [0, 3], [0, 0]])
        # regrown moments are zero, all others (the dropped one's too) as they were
        zeroed = jax.tree.map(lambda x: x if x.ndim == 0 else x.at[1, 0].set(0), before)
        chex.assert_trees_all_equal(state.inner_state, zeroed)
        assert int(optax.tree.get(state.inner_state, "count")) == 1

    def test_set_steps_first(self):
        grads = np.array([[0.0, -30.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
        left, _, state = one_update(
            "set", optax.sgd(0.1), self.WEIGHTS, self.MASK, grads, 0.4
        )
        # 1 has become 4 before anything is dropped, so 3 is the smallest
        assert bool(sj.masks_of(state)["kernel"][0, 1]) and float(left[0, 1]) == 4.0
        mask = np.asarray(sj.masks_of(state)["kernel"])
        np.testing.assert_array_equal(left, np.where(mask, [[4, 4], [0, 3], [0, 0]], 0))

    def test_what_is_dropped_and_regrown_at_once_keeps_value_and_moments(self):
        grads = np.array([[0.0, 7.0], [0.5, 0.0], [0.5, 0.5]], np.float32)
        left, before, state = one_update(
            "rigl", optax.adam(0.1), self.WEIGHTS, self.MASK, grads, 0.4, [self.WEIGHTS]
        )
        np.testing.assert_array_equal(sj.masks_of(state)["kernel"], self.MASK)
        np.testing.assert_array_equal(left, self.WEIGHTS)
        chex.assert_trees_all_equal(state.inner_state, before)

    @parameterized.product(method=list(METHODS))
    def test_moments_of_pruned_weights_have_their_initial_value(self, method):
        class Odd(NamedTuple):
            total: jax.Array  # no parameter's
            grid: jax.Array  # of a parameter's shape, but not under its name
            ones: dict  # under its name; begins at 1

        def init(params):
            return Odd(
                jnp.zeros([]), jnp.zeros((3, 2)), jax.tree.map(jnp.ones_like, params)
            )

        def update(grads, state, params=None):
            del params
            more = Odd(
                state.total + 1,
                state.grid + 1,
                jax.tree.map(lambda x: x + 1, state.ones),
            )
            return jax.tree.map(lambda g: -0.1 * g, grads), more

        inner = optax.GradientTransformation(init, update)
        grads = np.full((3, 2), 0.5, np.float32)
        _, _, state = one_update(
            method, inner, self.WEIGHTS, self.MASK, grads, 1.0, [grads]
        )
        steps = 1 if method == "rigl" else 2
        assert float(state.inner_state.total) == steps
        np.testing.assert_array_equal(state.inner_state.grid, steps)
        # pruned ones began the last step, if one was taken, at 1; regrown ones now
        want = np.where(self.MASK, 1 + steps, 1 if method == "rigl" else 2)
        grown = np.asarray(sj.masks_of(state)["kernel"]) & ~self.MASK
        assert grown.any()
        np.testing.assert_array_equal(
            state.inner_state.ones["kernel"], np.where(grown, 1, want)
        )

    @parameterized.product(
        method=list(METHODS), inner=[optax.adagrad, optax.rmsprop, optax.yogi]
    )
    def test_what_is_regrown_has_had_no_step(self, method, inner):
        inner = inner(0.1, **({"initial_scale": 1.0} if inner == optax.rmsprop else {}))
        grads = np.array([[9.0, 1.0], [5.0, 1.0], [2.0, 2.0]], np.float32)
        _, _, state = one_update(
            method, inner, self.WEIGHTS, self.MASK, grads, 1.0, [grads]
        )
        grown = np.asarray(sj.masks_of(state)["kernel"]) & ~self.MASK
        assert grown.any()
        first = inner.init({"kernel": jnp.zeros((3, 2))})
        for got, want in zip(
            jax.tree.leaves(state.inner_state), jax.tree.leaves(first), strict=True
        ):
            if got.ndim == 2:
                np.testing.assert_array_equal(got[grown], want[grown])

    def test_adagrad_accumulators_restart_at_their_initial_value(self):
        grads = np.array([[9.0, 1.0], [5.0, 1.0], [2.0, 2.0]], np.float32)
        _, before, state = one_update(
            "rigl", optax.adagrad(0.1), self.WEIGHTS, self.MASK, grads, 0.4, [grads]
        )
        old = np.array(optax.tree.get(before, "sum_of_squares")["kernel"])
        new = np.array(optax.tree.get(state.inner_state, "sum_of_squares")["kernel"])
        assert new[1, 0] == np.float32(0.1)
        old[1, 0] = 0.1
        np.testing.assert_array_equal(new, old)

    def test_the_first_update_zeroes_unmasked_params_and_regrown_ones(self):
        params = {"kernel": jnp.arange(1.0, 65).reshape(8, 8)}
        for method in METHODS:
            tx = make(method, optax.adamw(0.1), 0.75)
            state = oracle.init(tx, params)
            old = np.asarray(sj.masks_of(state)["kernel"])
            updates, state = oracle.jit(tx.update)(params, state, params)
            left = np.asarray(optax.apply_updates(params, updates)["kernel"])
            new = np.asarray(sj.masks_of(state)["kernel"])
            assert (new & ~old).any()
            np.testing.assert_array_equal(left != 0, new & old)


BAD = {
    "period": (dict(update_every=0), "`update_every`.*got 0"),
    "stop": (dict(stop_step=0), "`stop_step`.*got 0"),
    "fraction": (dict(drop_fraction=1.5), r"`drop_fraction`.*\[0, 1\]; got 1.5"),
    "missing": (dict(sparsity=None), "`sparsity` must be given under Unstructured"),
    "sparsity": (dict(sparsity=-0.1), r"\[0, 1\); got -0.1"),
    "contradiction": (dict(pattern=sj.NM(1, 4)), "under NM.*0.75; got 0.5 at"),
    "no leaf": (dict(where=lambda path, leaf: False), "at least one leaf"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(method, case):
    kwargs, message = BAD[case]
    kwargs = dict(sparsity=0.5, update_every=1, stop_step=1, key=KEY) | kwargs
    with pytest.raises(ValueError, match=message):
        METHODS[method](optax.sgd(0.1), **kwargs).init({"kernel": jnp.ones((4, 2))})


@pytest.mark.parametrize("method", METHODS)
def test_n_m_needs_no_sparsity(method):
    tx = METHODS[method](
        optax.sgd(0.1), pattern=sj.NM(1, 4), update_every=1, stop_step=1, key=KEY
    )
    mask = sj.masks_of(tx.init({"kernel": jnp.ones((8, 2))}))["kernel"]
    np.testing.assert_array_equal(mask.reshape(2, 4, 2).sum(1), 1)


@pytest.mark.parametrize("method", [sj.rigl, sj.sparse_evolution])
def test_a_leaf_without_a_gradient_that_is_not_governed(method):
    weight = jnp.arange(16.0).reshape(4, 4)
    params = {"a": jnp.ones((2, 2)), "b": weight, "c": jnp.ones(3)}
    grads = {"a": None, "b": jnp.ones((4, 4)), "c": None}
    where = {"a": False, "b": True, "c": False}
    make = functools.partial(
        method, optax.sgd(0.1), 0.5, update_every=1, stop_step=3, key=KEY
    )
    tx, alone = make(where=where), make()
    got, _ = tx.update(grads, tx.init(params), params)
    only = {"b": params["b"]}
    want, _ = alone.update({"b": grads["b"]}, alone.init(only), only)
    np.testing.assert_array_equal(got["b"], want["b"])
    assert got["a"] is None and got["c"] is None

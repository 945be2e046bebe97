"""Gradual magnitude pruning: masks from the weights before the step, on a schedule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import sparsejax as sj
from tests.transforms import _oracles as oracle

STACKED = oracle.Problem.STACKED
NAMES = ("dense/kernel", "stack/kernel")
UNITS = {"dense/kernel": 48, "stack/kernel": 32}  # of one layer


def magnitude_oracle(problem, select, inner, update_every):
    """`select(weights, step)` gives masks; they govern the step they are made in."""
    params = oracle.wide(problem.params)
    inner.init(params)
    masks = select(params, 0)
    for step in range(problem.steps):
        oracle.forget_pruned(inner, masks)
        grads = problem.grad(step, oracle.masked(params, masks))
        updates = inner.update(oracle.masked(grads, masks), params)
        old = masks
        if step % update_every == 0:
            masks = select(params, step)
        both = {name: masks[name] & old[name] for name in masks}
        params = {name: p + updates[name] for name, p in params.items()}
        params = oracle.masked(params, both)  # what is kept again begins at 0
        yield params, masks, inner


def leafwise(problem, pattern, sparsity_at):
    specs = problem.specs(pattern)

    def select(params, step):
        sparsities = sparsity_at(step)
        for name, sparsity in (sparsities or {}).items():
            rest = sparsity * UNITS[name] % 1
            assert step == 0 or abs(rest - 0.5) > 1e-3  # float32 rounds the same way
        return {
            name: oracle.select(abs(params[name]), spec, (sparsities or {}).get(name))
            for name, spec in specs.items()
        }

    return select


class MagnitudePruneTest(parameterized.TestCase):
    @parameterized.parameters(
        (sj.Unstructured(), 0.6, oracle.momentum),
        (sj.NM(2, 4), None, oracle.adamw),
        (sj.NM(1, 2, axis=-1), None, oracle.momentum),
        (sj.Block((4, 2)), 0.5, oracle.adamw),
        (sj.Channel(-1), 0.5, oracle.momentum),
    )
    def test_matches_oracle(self, pattern, sparsity, inner):
        problem, inner = oracle.Problem(), inner()
        tx = sj.magnitude_prune(
            inner.optax, sparsity, update_every=3, pattern=pattern, stacked=STACKED
        )
        select = leafwise(problem, pattern, lambda t: dict.fromkeys(NAMES, sparsity))
        if sparsity is None:
            select = leafwise(problem, pattern, lambda t: None)
        oracle.assert_equal_run(
            oracle.train(tx, problem), magnitude_oracle(problem, select, inner, 3)
        )

    @parameterized.product(across_leaves=[False, True])
    def test_masks_nest_where_updates_are_scaled_on_their_way(self, across_leaves):
        rng = np.random.default_rng(0)
        params = {"kernel": jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)}
        schedule = sj.schedules.cubic(0.75, begin=0, end=12)
        method = sj.magnitude_prune(
            optax.scale_by_adam(),
            schedule,
            update_every=2,
            across_leaves=across_leaves,
        )
        tx = optax.chain(method, optax.scale_by_learning_rate(0.5))
        state, seen = oracle.init(tx, params), []
        update = oracle.jit(tx.update)
        for _ in range(16):  # a pruned weight grows by half in each
            grads = jax.tree.map(lambda p: p - 0.1, sj.forward_params(state, params))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            seen.append(np.asarray(sj.masks_of(state)["kernel"]))
        for before, after in itertools.pairwise(seen):
            assert not (after & ~before).any()
        assert seen[-1].sum() == 32

    @parameterized.parameters(
        (sj.Unstructured(), oracle.adamw),
        (sj.Block((2, 2)), oracle.momentum),
    )
    def test_cubic_schedule_matches_oracle(self, pattern, inner):
        problem, inner = oracle.Problem(steps=30), inner()
        tx = sj.magnitude_prune(
            inner.optax,
            sj.schedules.cubic(0.85, begin=4, end=21),
            update_every=4,
            pattern=pattern,
            stacked=STACKED,
        )
        select = leafwise(
            problem,
            pattern,
            lambda t: dict.fromkeys(NAMES, oracle.cubic(t, 0.85, 4, 21)),
        )
        got = oracle.train(tx, problem)
        oracle.assert_equal_run(got, magnitude_oracle(problem, select, inner, 4))
        counts = [
            sum(m.sum() for m in oracle.flat(sj.masks_of(s)).values()) for _, s in got
        ]
        assert counts[0] == 48 + 96 and counts == sorted(counts, reverse=True)
        if pattern == sj.Unstructured():
            final = [oracle.num_kept(0.85, UNITS[name]) for name in NAMES]
            assert counts[-1] == final[0] + 3 * final[1]
        self.assert_nested(got)

    def test_cubic_with_erdos_renyi_kernel_matches_oracle(self):
        problem, inner = oracle.Problem(), oracle.adamw()
        tx = sj.magnitude_prune(
            inner.optax,
            sj.schedules.cubic(0.8, begin=0, end=20),
            update_every=5,
            stacked=STACKED,
            allocation=sj.erdos_renyi_kernel,
        )
        shapes = {"dense/kernel": (8, 6), "stack/kernel": (8, 4)}
        sizes = {"dense/kernel": 48, "stack/kernel": 96}
        select = leafwise(
            problem,
            sj.Unstructured(),
            lambda t: oracle.erk(shapes, oracle.cubic(t, 0.8, 0, 20), sizes),
        )
        got = oracle.train(tx, problem)
        oracle.assert_equal_run(got, magnitude_oracle(problem, select, inner, 5))
        self.assert_nested(got)

    def test_across_leaves_matches_oracle(self):
        problem, inner = oracle.Problem(), oracle.momentum()
        tx = sj.magnitude_prune(
            inner.optax,
            sj.schedules.cubic(0.9, begin=0, end=12),
            update_every=2,
            stacked=STACKED,
            across_leaves=True,
        )

        def select(params, step):
            both = np.concatenate([abs(params[name]).ravel() for name in NAMES])
            count = oracle.num_kept(oracle.cubic(step, 0.9, 0, 12), both.size)
            mask = oracle.top(both, count)
            return {
                "dense/kernel": mask[:48].reshape(8, 6),
                "stack/kernel": mask[48:].reshape(3, 8, 4),
            }

        oracle.assert_equal_run(
            oracle.train(tx, problem), magnitude_oracle(problem, select, inner, 2)
        )

    def test_a_sparsity_for_each_leaf_matches_oracle(self):
        problem, inner = oracle.Problem(), oracle.momentum()
        tx = sj.magnitude_prune(
            inner.optax,
            {
                "dense": sj.schedules.cubic(0.7, begin=0, end=10),
                "embed": None,
                "stack": 0.25,
            },
            update_every=2,
            stacked=STACKED,
        )
        select = leafwise(
            problem,
            sj.Unstructured(),
            lambda t: {
                "dense/kernel": oracle.cubic(t, 0.7, 0, 10),
                "stack/kernel": 0.25,
            },
        )
        oracle.assert_equal_run(
            oracle.train(tx, problem), magnitude_oracle(problem, select, inner, 2)
        )

    @parameterized.product(
        pattern=[sj.Unstructured(), sj.NM(2, 4), sj.Block((2, 2)), sj.Channel(-2)]
    )
    def test_ties_go_to_the_lower_index(self, pattern):
        problem, inner = oracle.Problem(ties=True), oracle.plain()
        sparsity = None if isinstance(pattern, sj.NM) else 0.5
        tx = sj.magnitude_prune(
            inner.optax, sparsity, update_every=1, pattern=pattern, stacked=STACKED
        )
        select = leafwise(
            problem,
            pattern,
            lambda t: sparsity and dict.fromkeys(NAMES, sparsity),
        )
        oracle.assert_equal_run(
            oracle.train(tx, problem),
            magnitude_oracle(problem, select, inner, 1),
            rtol=0,
            atol=0,
        )

    def test_a_falling_sparsity_regrows_from_zero_with_fresh_moments(self):
        problem, inner = oracle.Problem(), oracle.adamw()
        tx = sj.magnitude_prune(
            inner.optax,
            sj.schedules.stepwise([0.75, 0.25, 0.5], [8, 16]),
            update_every=4,
            stacked=STACKED,
        )
        select = leafwise(
            problem,
            sj.Unstructured(),
            lambda t: dict.fromkeys(NAMES, 0.75 if t < 8 else 0.25 if t < 16 else 0.5),
        )
        oracle.assert_equal_run(
            oracle.train(tx, problem), magnitude_oracle(problem, select, inner, 4)
        )

    def test_sparsity_zero_is_the_inner_optimizer(self):
        problem, inner = oracle.Problem(), optax.adamw(0.02)
        got = oracle.train(sj.magnitude_prune(inner, 0.0, update_every=2), problem)
        want = oracle.train_inner(inner, problem)
        for step in (0, problem.steps - 1):
            oracle.assert_close(
                oracle.wide(got[step][0]), oracle.wide(want[step]), 1e-6, 1e-7, "params"
            )

    @parameterized.product(dtype=[jnp.float32, jnp.bfloat16])
    def test_exact_zeros_from_the_first_update_on(self, dtype):
        problem = oracle.Problem(steps=5)
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), problem.params)
        tx = sj.magnitude_prune(optax.adamw(0.1), 0.5, update_every=2, stacked=STACKED)
        for got, state in oracle.train(tx, problem, params):
            got, masks = oracle.flat(got), oracle.flat(sj.masks_of(state))
            for name, mask in masks.items():
                assert got[name].dtype == dtype
                np.testing.assert_array_equal(got[name] != 0, mask)

    def assert_nested(self, got):
        masks = [oracle.flat(sj.masks_of(state)) for _, state in got]
        for before, after in itertools.pairwise(masks):
            for name in before:
                assert not (after[name] & ~before[name]).any()


BAD = {
    "period": (dict(sparsity=0.5, update_every=0), "`update_every`.*got 0"),
    "percentage": (dict(sparsity=90), r"\[0, 1\); got 90"),
    "missing": (dict(), "`sparsity` must be given.*'kernel'"),
    "contradiction": (
        dict(sparsity=0.6, pattern=sj.NM(2, 4)),
        r"under NM\(.*\) the sparsity is 0.5; got 0.6 at.*'kernel'",
    ),
    "schedule": (dict(sparsity=lambda t: 0.5, pattern=sj.NM(2, 4)), "a schedule at"),
    "pattern": (dict(pattern=sj.NM(2, 3)), "m=3.*'kernel'"),
    "across": (
        dict(sparsity=0.5, pattern=sj.Block((2, 2)), across_leaves=True),
        r"Unstructured\(\).*'kernel'",
    ),
    "across of an allocation": (
        dict(sparsity=0.5, allocation=sj.erdos_renyi, across_leaves=True),
        "`allocation`.*`across_leaves`.*one of the two",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        tx = sj.magnitude_prune(optax.sgd(0.1), **kwargs)
        tx.init({"kernel": jnp.ones((4, 2))})

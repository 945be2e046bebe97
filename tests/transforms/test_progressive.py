"""Progressive gradient flow: a decaying factor (MdGf), tightening patterns (SdGf)."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import sparsejax as sj
from tests.transforms import _oracles as oracle

STACKED = oracle.Problem.STACKED


def progressive_oracle(problem, pattern_at, sparsity, inner, factor_at, ste):
    """Forward `w * d` with `d = e + (1 - e) * beta`; the gradient `g * d`, or `g`."""
    params = oracle.wide(problem.params)
    inner.init(params)
    for step in range(problem.steps):
        pattern = pattern_at(step)
        masks = {
            name: np.ones(params[name].shape, bool)
            if pattern is None
            else oracle.select(abs(params[name]), spec, sparsity)
            for name, spec in problem.specs(pattern).items()
        }
        decay = {name: m + (1.0 - m) * factor_at(step) for name, m in masks.items()}
        forward = {name: p * decay.get(name, 1.0) for name, p in params.items()}
        grads = problem.grad(step, forward)
        if not ste:
            grads = {name: g * decay.get(name, 1.0) for name, g in grads.items()}
        updates = inner.update(grads, params)
        params = {name: p + updates[name] for name, p in params.items()}
        yield params, masks, inner


def exponential(step):
    return 0.0 if step >= 18 else math.exp(-0.2 * max(step - 3, 0))


def linear(step):
    return max(0.0, 1 - 0.08 * max(step - 3, 0))


SCHEDULES = {
    "exponential": (
        sj.schedules.exponential_decay(0.2, begin=3, hard_after=18),
        exponential,
    ),
    "linear": (sj.schedules.linear_decay(0.08, begin=3), linear),
    "step": (0.0, lambda t: 0.0),
    "number": (0.5, lambda t: 0.5),
}


class MaskDecayTest(parameterized.TestCase):
    @parameterized.product(
        [
            dict(schedule="exponential", pattern=sj.NM(1, 8), inner=oracle.adamw),
            dict(schedule="linear", pattern=sj.NM(2, 4), inner=oracle.momentum),
            dict(schedule="number", pattern=sj.Unstructured(), inner=oracle.adamw),
            dict(schedule="linear", pattern=sj.Block((4, 2)), inner=oracle.adamw),
        ],
        straight_through=[False, True],
    )
    def test_matches_oracle(self, schedule, pattern, inner, straight_through):
        problem, inner = oracle.Problem(), inner()
        sparsity = None if isinstance(pattern, sj.NM) else 0.5
        decay, factor_at = SCHEDULES[schedule]
        tx = sj.mask_decay(
            inner.optax,
            decay,
            pattern=pattern,
            straight_through=straight_through,
            sparsity=sparsity,
            stacked=STACKED,
        )
        want = progressive_oracle(
            problem, lambda t: pattern, sparsity, inner, factor_at, straight_through
        )
        oracle.assert_equal_run(oracle.train(tx, problem), want)

    def test_ties_go_to_the_lower_index(self):
        problem, inner = oracle.Problem(ties=True), oracle.plain()
        tx = sj.mask_decay(inner.optax, 0.0, pattern=sj.NM(2, 4), stacked=STACKED)
        want = progressive_oracle(
            problem, lambda t: sj.NM(2, 4), None, inner, lambda t: 0.0, False
        )
        oracle.assert_equal_run(oracle.train(tx, problem), want, rtol=0, atol=0)

    @parameterized.product(factor=[1.0, 0.3, 0.0], straight_through=[False, True])
    def test_forward_and_gradient(self, factor, straight_through):
        rng = np.random.default_rng(0)
        weight, cotangent = rng.standard_normal((2, 8, 3)).astype(np.float32)
        params = {"kernel": jnp.asarray(weight)}
        tx = sj.mask_decay(
            optax.sgd(0.1),
            factor,
            pattern=sj.NM(1, 4),
            straight_through=straight_through,
        )

        @oracle.jit
        def run(params, cotangent):
            state = tx.init(params)
            forward, pull = jax.vjp(lambda p: sj.forward_params(state, p), params)
            return forward["kernel"], pull(cotangent)[0]["kernel"]

        forward, got = run(params, {"kernel": jnp.asarray(cotangent)})
        mask = oracle.select(abs(weight), oracle.Spec(sj.NM(1, 4)))
        d = mask + (1 - mask) * np.float32(factor)
        np.testing.assert_allclose(forward, weight * d, rtol=1e-6)
        # the mask and the factor are constants of the backward
        want = cotangent if straight_through else cotangent * d
        np.testing.assert_allclose(got, want, rtol=1e-6)

    @parameterized.product(straight_through=[False, True])
    def test_factor_one_is_the_inner_optimizer(self, straight_through):
        problem, inner = oracle.Problem(), optax.adamw(0.02)
        tx = sj.mask_decay(
            inner,
            lambda t: 1.0,
            pattern=sj.NM(1, 4),
            straight_through=straight_through,
            stacked=STACKED,
        )
        got, want = oracle.train(tx, problem), oracle.train_inner(inner, problem)
        oracle.assert_close(
            oracle.wide(got[-1][0]), oracle.wide(want[-1]), 1e-6, 1e-7, "params"
        )

    def test_at_factor_zero_pruned_weights_get_no_gradient(self):
        problem = oracle.Problem()
        tx = sj.mask_decay(optax.sgd(0.1), 0.0, pattern=sj.NM(1, 4), stacked=STACKED)
        got, before = oracle.train(tx, problem), oracle.flat(problem.params)
        for params, state in got:
            params = oracle.flat(params)
            for name, mask in oracle.flat(sj.masks_of(state)).items():
                np.testing.assert_array_equal(params[name][~mask], before[name][~mask])
                assert (params[name][mask] != before[name][mask]).all()
            before = params

    @parameterized.product(hard=[True, False])
    def test_pruning_at_the_end_changes_nothing_once_the_factor_is_zero(self, hard):
        problem = oracle.Problem(steps=20)
        decay = sj.schedules.exponential_decay(0.1, hard_after=15 if hard else None)
        tx = sj.mask_decay(
            optax.adam(0.02), decay, pattern=sj.NM(2, 8), stacked=STACKED
        )
        params, state = oracle.train(tx, problem)[-1]
        forward = oracle.forward_of(state, params)
        final = oracle.final_of(state, params)
        for name, spec in problem.specs(sj.NM(2, 8)).items():
            assert (forward[name] == final[name]).all() == hard
            oracle.assert_pattern(final[name] != 0, spec)
        warning = contextlib.nullcontext()
        if not hard:
            warning = pytest.warns(match="by 0.1.*, and differs .* `mask_decay` come")
        with warning:
            sj.sparse_params(state, params)


def test_the_number_of_the_user_outlives_a_donated_state():
    factor, params = jnp.float32(0.5), {"kernel": jnp.ones((4, 2))}
    tx = sj.mask_decay(optax.sgd(0.1), factor, pattern=sj.NM(1, 2))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, params):
        forward = sj.forward_params(state, params)
        return tx.update(forward, state, params)[1], forward

    for _ in range(2):
        step(tx.init(params), params)
        assert not factor.is_deleted()


class StructureDecayTest(parameterized.TestCase):
    STEPWISE = (sj.NM(7, 8), sj.NM(4, 8), sj.NM(2, 8), sj.NM(1, 8))
    GEOMETRIC = (sj.NM(4, 8), sj.NM(2, 4), sj.NM(1, 2))

    @parameterized.product(
        [
            dict(
                frames=STEPWISE,
                boundaries=(4, 8, 12, 16),
                sparsity=None,
                inner=oracle.adamw,
            ),
            dict(
                frames=GEOMETRIC,
                boundaries=(0, 7, 14),
                sparsity=None,
                inner=oracle.momentum,
            ),
            dict(
                frames=(sj.NM(2, 4), sj.Block((4, 2)), sj.Unstructured()),
                boundaries=(2, 2, 10),  # the first frame is never seen
                sparsity=0.5,
                inner=oracle.adamw,
            ),
        ],
        straight_through=[False, True],
    )
    def test_matches_oracle(
        self, frames, boundaries, sparsity, inner, straight_through
    ):
        problem, inner = oracle.Problem(), inner()
        tx = sj.structure_decay(
            inner.optax,
            frames,
            boundaries,
            straight_through=straight_through,
            sparsity=sparsity,
            stacked=STACKED,
        )

        def pattern_at(step):
            begun = [i for i, begin in enumerate(boundaries) if begin <= step]
            return frames[begun[-1]] if begun else None

        want = progressive_oracle(
            problem, pattern_at, sparsity, inner, lambda t: 0.0, straight_through
        )
        got = oracle.train(tx, problem)
        oracle.assert_equal_run(got, want)
        params, state = got[-1]
        final = oracle.final_of(state, params)
        for name, spec in problem.specs(frames[-1]).items():
            oracle.assert_pattern(final[name] != 0, spec, sparsity)

    def test_frames_of_the_room_of_patterns_give_the_published_sequences(self):
        params = {"kernel": np.random.default_rng(0).standard_normal((16, 2))}
        frames = sj.patterns.stepwise_frames(sj.NM(1, 16))
        boundaries = sj.schedules.frame_boundaries(len(frames), 12, dense_steps=2)
        tx = sj.structure_decay(optax.sgd(0.0), frames, boundaries)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)

        def body(state, _):
            kept = sj.forward_params(state, params)["kernel"] != 0
            zeros = jax.tree.map(jnp.zeros_like, params)
            return tx.update(zeros, state, params)[1], kept.sum(0)

        run = oracle.jit(lambda p: jax.lax.scan(body, tx.init(p), length=13)[1])
        want = [16, 16, 15, 15, 8, 8, 4, 4, 2, 2, 1, 1, 1]
        np.testing.assert_array_equal(run(params), np.stack([want, want], 1))

    def test_traced_boundaries(self):
        params = {"kernel": jnp.arange(1.0, 17).reshape(8, 2)}

        @jax.jit
        def kept_of_column(boundaries):
            tx = sj.structure_decay(optax.sgd(0.0), self.STEPWISE, boundaries)

            def body(state, _):
                kept = sj.forward_params(state, params)["kernel"] != 0
                return tx.update(params, state, params)[1], kept[:, 0].sum()

            return jax.lax.scan(body, tx.init(params), length=6)[1]

        for boundaries, want in (
            ((0, 1, 2, 3), [7, 4, 2, 1, 1, 1]),
            ((1, 3, 3, 5), [8, 7, 7, 2, 2, 1]),
        ):
            np.testing.assert_array_equal(kept_of_column(jnp.array(boundaries)), want)

    def test_a_python_loop_equals_scan(self):
        problem = oracle.Problem(steps=20)
        tx = sj.structure_decay(
            optax.adam(0.02), self.STEPWISE, (4, 8, 12, 16), stacked=STACKED
        )
        scanned = oracle.train(tx, problem)[-1]
        step = oracle.jit(lambda *args: oracle.train_step(tx, *args))
        carry = (problem.params, oracle.init(tx, problem.params))
        for i in range(problem.steps):
            carry = step(*carry, jax.tree.map(lambda x, i=i: x[i], problem.stream))
        for got, want in zip(
            jax.tree.leaves(carry), jax.tree.leaves(scanned), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)

    def test_sparsity_per_frame_pattern_of_a_tree(self):
        params = {"a": jnp.arange(1.0, 33).reshape(8, 4), "b": jnp.ones((8, 2))}
        frames = [{"a": sj.NM(4, 8), "b": sj.NM(2, 4)}, {"a": sj.NM(1, 8), "b": None}]
        with pytest.raises(TypeError, match=r"`pattern` must be.*got None at.*'b'"):
            sj.structure_decay(optax.sgd(0.1), frames, (0, 1)).init(params)
        frames[1]["b"] = sj.NM(1, 4)
        tx = sj.structure_decay(optax.sgd(0.0), frames, (0, 1))
        state = oracle.init(tx, params)
        for want in ({"a": 16, "b": 8}, {"a": 4, "b": 4}):
            forward = oracle.forward_of(state, params)
            assert {name: int((p != 0).sum()) for name, p in forward.items()} == want
            _, state = oracle.jit(tx.update)(params, state, params)
            masks = oracle.flat(sj.masks_of(state))
            assert {name: int(mask.sum()) for name, mask in masks.items()} == want

    @parameterized.parameters(sj.Unstructured(), sj.Block((2, 2)))
    def test_a_sparsity_serves_the_frames_before_a_pattern_of_its_own(self, first):
        params = {"kernel": jnp.arange(1.0, 33).reshape(8, 4)}
        frames = [first, sj.NM(1, 4)]
        boundaries = jnp.array([0, 1])
        tx = sj.structure_decay(optax.sgd(0.0), frames, boundaries, sparsity=0.75)
        state = oracle.init(tx, params)
        for pattern in frames:
            forward = oracle.forward_of(state, params)
            want = sj.prune(params, 0.75, pattern=pattern)
            np.testing.assert_array_equal(forward["kernel"] != 0, want["kernel"])
            _, state = oracle.jit(tx.update)(params, state, params)

    def test_a_frame_that_does_not_govern_a_leaf_leaves_it_dense(self):
        params = {name: jnp.arange(1.0, 33).reshape(8, 4) for name in "ab"}
        frames, sparsity = [sj.Unstructured(), sj.NM(2, 4)], {"a": 0.5, "b": None}
        tx = sj.structure_decay(optax.sgd(0.0), frames, (1, 2), sparsity=sparsity)
        state = oracle.init(tx, params)
        for want in ({"a": 32, "b": 32}, {"a": 16, "b": 32}, {"a": 16, "b": 16}):
            forward = oracle.forward_of(state, params)
            assert {name: int((p != 0).sum()) for name, p in forward.items()} == want
            _, state = oracle.jit(tx.update)(params, state, params)
            masks = oracle.flat(sj.masks_of(state))
            assert {name: int(mask.sum()) for name, mask in masks.items()} == want


BAD = {
    "factor": (lambda: sj.mask_decay(optax.sgd(1), 1.5, pattern=sj.NM(1, 2)), "1.5"),
    "sparsity": (
        lambda: sj.mask_decay(
            optax.sgd(1), 0.5, pattern=sj.Unstructured(), sparsity=lambda t: 0.5
        ),
        "constant `sparsity`",
    ),
    "missing": (
        lambda: sj.mask_decay(optax.sgd(1), 0.5, pattern=sj.Block((2, 2))),
        "`sparsity` must be given.*'kernel'",
    ),
    "lengths": (
        lambda: sj.structure_decay(optax.sgd(1), [sj.NM(1, 2)], [0, 5]),
        "1 patterns and 2 boundaries",
    ),
    "empty": (lambda: sj.structure_decay(optax.sgd(1), [], []), "0 patterns"),
    "order": (
        lambda: sj.structure_decay(optax.sgd(1), [sj.NM(1, 2)] * 2, [5, 0]),
        r"`boundaries` must not decrease; got \(5, 0\)",
    ),
    "divide": (
        lambda: sj.structure_decay(optax.sgd(1), [sj.NM(8, 16), sj.NM(1, 2)], [0, 5]),
        "m=16.*'kernel'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make().init({"kernel": jnp.ones((4, 2))})

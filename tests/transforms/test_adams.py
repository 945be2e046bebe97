"""AdamS: the equations of CAST (Huang et al., 2025), step sizes, a toy problem."""

import pathlib
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl.testing import parameterized

import sparsejax as sj
from tests.transforms import _oracles as oracle

STACKED = oracle.Problem.STACKED


class Moments:
    """What `assert_equal_run` compares."""

    def __init__(self, mu, nu, count):
        self.moments, self.count = {"mu": mu, "nu": nu}, count


def adams_oracle(
    problem,
    pattern,
    sparsity,
    lr_at,
    total_steps,
    l1_decay,
    *,
    period=10,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
):
    specs = problem.specs(pattern)
    params = oracle.wide(problem.params)
    mu = {name: np.zeros(p.shape) for name, p in params.items()}
    nu = {name: np.zeros(p.shape) for name, p in params.items()}
    for t in range(problem.steps):
        if t % period == 0:
            masks = {
                name: oracle.select(abs(params[name]), spec, sparsity)
                for name, spec in specs.items()
            }
        grads = problem.grad(t, params)  # dense: the mask never enters the forward
        alpha = t / total_steps
        for name, theta in params.items():
            g = grads[name]
            mu[name] = b1 * mu[name] + (1 - b1) * g
            if name in masks:
                losing = (1 - alpha) * mu[name] + alpha * l1_decay * np.sign(theta)
                tilde = np.where(masks[name], mu[name], losing)
                nu[name] = b2 * nu[name] + (1 - b2) * tilde**2
            else:
                tilde = mu[name]
                nu[name] = b2 * nu[name] + (1 - b2) * g**2
            step = tilde / (1 - b1 ** (t + 1))
            step = step / (np.sqrt(nu[name] / (1 - b2 ** (t + 1))) + eps)
            params[name] = theta - lr_at(t) * step
        yield dict(params), masks, Moments(dict(mu), dict(nu), t + 1)


def in_float64(problem):
    """The sign of a losing weight that crosses zero is a matter of rounding: float64.

    Returns the params; the problem's stream becomes float64 in place.
    """
    problem.stream = jax.tree.map(lambda p: p.astype(np.float64), problem.stream)
    return jax.tree.map(lambda p: p.astype(np.float64), problem.params)


class AdamsTest(parameterized.TestCase):
    @parameterized.parameters(
        (sj.NM(2, 4), None, 0.3, dict()),
        (sj.NM(1, 2, axis=-1), None, 1e-3, dict(mask_period=7, b1=0.8, b2=0.95)),
        (sj.Unstructured(), 0.6, 0.3, dict(eps=1e-3)),
        (sj.Block((4, 2)), 0.5, 0.3, dict(mask_period=1)),
    )
    def test_fifty_steps_match_oracle(self, pattern, sparsity, l1_decay, kwargs):
        problem, lr, total = oracle.Problem(steps=50), 0.02, 60
        tx = sj.adams(
            lr,
            total,
            l1_decay,
            pattern=pattern,
            sparsity=sparsity,
            stacked=STACKED,
            **kwargs,
        )
        kwargs = {"period" if k == "mask_period" else k: v for k, v in kwargs.items()}
        want = adams_oracle(
            problem, pattern, sparsity, lambda t: lr, total, l1_decay, **kwargs
        )
        want = list(want)
        with jax.enable_x64(True):
            got = oracle.train(tx, problem, in_float64(problem))
        oracle.assert_equal_run(got, want, rtol=1e-6, atol=1e-7)
        masks = [m["stack/kernel"] for _, m, _ in want]
        assert (masks[0] != masks[-1]).any()  # refreshes do change something
        if "period" not in kwargs:  # and between them the masks are out of date
            params = want[18][0]["stack/kernel"]
            spec = problem.specs(pattern)["stack/kernel"]
            assert (oracle.select(abs(params), spec, sparsity) != masks[18]).any()

    def test_fifty_steps_match_oracle_in_float32(self):
        problem = oracle.Problem(steps=50)
        problem.params = jax.tree.map(  # so far from 0 that no sign hangs on rounding
            lambda p: np.where(p < 0, p - 0.5, p + 0.5), problem.params
        )
        want = list(adams_oracle(problem, sj.NM(2, 4), None, lambda t: 0.004, 50, 0.3))
        for name in problem.specs(sj.NM(2, 4)):
            assert min(abs(params[name]).min() for params, _, _ in want) > 1e-3
        tx = sj.adams(0.004, 50, 0.3, pattern=sj.NM(2, 4), stacked=STACKED)
        oracle.assert_equal_run(oracle.train(tx, problem), want, rtol=2e-5, atol=5e-6)

    def test_a_learning_rate_schedule_and_chain_match_oracle(self):
        problem = oracle.Problem()
        schedule = optax.cosine_decay_schedule(0.05, 24, 0.1)
        lr_at = lambda t: 0.05 * (0.9 * (1 + np.cos(np.pi * t / 24)) / 2 + 0.1)  # noqa: E731
        kwargs = dict(pattern=sj.NM(2, 4), mask_period=5, stacked=STACKED)
        chained = optax.chain(
            sj.scale_by_adams(24, 0.2, **kwargs), optax.scale_by_learning_rate(schedule)
        )
        want = adams_oracle(problem, sj.NM(2, 4), None, lr_at, 24, 0.2, period=5)
        with jax.enable_x64(True):
            params = in_float64(problem)
            got = oracle.train(sj.adams(schedule, 24, 0.2, **kwargs), problem, params)
            same = oracle.train(chained, problem, params)
        oracle.assert_equal_run(got, want, rtol=1e-5, atol=1e-6, moments=False)
        chex.assert_trees_all_equal(got, same)

    def test_a_scheduled_l1_decay_and_alpha(self):
        problem = oracle.Problem()
        kwargs = dict(pattern=sj.NM(2, 4), stacked=STACKED)
        plain = sj.adams(0.02, 30, 0.2, **kwargs)
        spelt = sj.adams(
            0.02,
            30,
            lambda step: jnp.float32(0.2),
            alpha_schedule=lambda step: step / 30,
            **kwargs,
        )
        chex.assert_trees_all_close(
            [p for p, _ in oracle.train(plain, problem)],
            [p for p, _ in oracle.train(spelt, problem)],
            rtol=1e-6,
        )

    def test_ties_go_to_the_lower_index_and_sign_of_zero_is_zero(self):
        # all-equal groups, zero groups, and -0.0 beside 0.0: exactly n are kept
        weights = np.ones((8, 3), np.float32)
        weights[:, 1] = 0.0
        weights[::2, 2] = -0.0
        weights[1::2, 2] = 0.0
        tx = sj.scale_by_adams(
            4, 1.0, pattern=sj.NM(2, 4), eps=0.0, alpha_schedule=lambda t: 1.0
        )
        params = {"kernel": jnp.asarray(weights)}
        run = oracle.jit(
            lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
        )
        steps, state = run(params)
        want = np.tile([True, True, False, False], 2)[:, None].repeat(3, 1)
        np.testing.assert_array_equal(sj.masks_of(state)["kernel"], want)
        moved = np.where(want[:, 0], 0, np.sqrt((1 - 0.999) / 1e-3))[:, None]
        moved = 10 * moved * [1, 0, 0]  # 1 / (1 - b1) / sqrt((1 - b2) / (1 - b2))
        np.testing.assert_allclose(steps["kernel"], moved, rtol=1e-4)

    def test_without_pull_and_with_adams_second_moment_it_is_adam(self):
        problem = oracle.Problem()
        tx = sj.adams(
            0.02,
            24,
            0.5,
            pattern=sj.NM(2, 4),
            stacked=STACKED,
            alpha_schedule=lambda t: 0.0,
            second_moment_of_pull=False,
        )
        got, want = (
            oracle.train(tx, problem),
            oracle.train_inner(optax.adam(0.02), problem),
        )
        for (params, _), expected in zip(got, want, strict=True):
            oracle.assert_close(
                oracle.wide(params), oracle.wide(expected), 1e-6, 1e-7, "params"
            )

    @parameterized.product(dtype=[jnp.float32, jnp.bfloat16], eps=[1e-8, 0.0])
    def test_leaves_that_are_not_governed_get_plain_adam(self, dtype, eps):
        problem = oracle.Problem()
        params = jax.tree.map(jnp.asarray, problem.params)
        params["embed"]["embedding"] = params["embed"]["embedding"].astype(dtype)
        tx = sj.adams(0.02, 24, 0.5, pattern=sj.NM(2, 4), stacked=STACKED, eps=eps)
        got = oracle.train(tx, problem, params)
        want = oracle.train_inner(optax.adam(0.02, eps=eps), problem, params)
        for (found, _), expected in zip(got, want, strict=True):
            assert found["embed"]["embedding"].dtype == dtype
            for path in (("embed", "embedding"), ("dense", "bias")):
                np.testing.assert_allclose(
                    np.float32(found[path[0]][path[1]]),
                    np.float32(expected[path[0]][path[1]]),
                    rtol=1e-6,
                    atol=1e-7,
                )

    def test_n_of_n_takes_the_second_moment_of_mu(self):
        # Derived: with white noise the root mean square step is 1.01 lr where
        # Adam's is 0.233 lr
        def rms(tx):
            params = {"kernel": jnp.ones((32, 32))}

            def body(state, key):
                grads = {"kernel": jax.random.normal(key, (32, 32))}
                updates, state = tx.update(grads, state, params)
                return state, (updates["kernel"] ** 2).mean()

            keys = jax.random.split(jax.random.key(0), 3000)
            run = oracle.jit(lambda p: jax.lax.scan(body, tx.init(p), keys)[1])
            return float(jnp.sqrt(run(params)[1500:].mean()))

        ours = rms(sj.adams(1.0, 3000, 0.0, pattern=sj.NM(4, 4)))
        adam = rms(optax.adam(1.0))
        np.testing.assert_allclose(ours, 1.01, rtol=0.02)
        np.testing.assert_allclose(adam, 0.233, rtol=0.02)
        np.testing.assert_allclose(ours / adam, 4.36, rtol=0.03)


def step_sizes(total_steps, l1_decay, eps):
    """Steps of a kept and of a losing weight without gradient, lr 1."""
    tx = sj.scale_by_adams(total_steps, l1_decay, pattern=sj.NM(1, 2), eps=eps)
    params = {"kernel": jnp.array([[2.0], [1.0]])}
    zeros = {"kernel": jnp.zeros((2, 1))}

    def body(state, _):
        updates, state = tx.update(zeros, state, params)
        return state, updates["kernel"][:, 0]

    return jax.lax.scan(body, tx.init(params), length=total_steps)[1]


class GoldenTest(parameterized.TestCase):
    """Step sizes of a losing weight without gradient: algorithm 1 in NumPy."""

    @parameterized.parameters((200, 1.6878), (2000, 1.4139), (20000, 1.0511))
    def test_step_sizes_do_not_depend_on_the_decay(self, total_steps, last):
        decays = jnp.array([1e-2, 1.0, 4e-7, 1e-4])
        run = oracle.jit(jax.vmap(lambda decay: step_sizes(total_steps, decay, 0.0)))
        steps = np.asarray(run(decays))
        np.testing.assert_array_equal(steps[..., 0], 0)  # kept: no move at all
        want = [0, 7.4414, 5.7143, 4.6604, 3.9850]
        for losing in steps[..., 1]:
            np.testing.assert_allclose(losing[:5], want, rtol=2e-4)
            np.testing.assert_allclose(losing[-1], last, rtol=2e-4)

    def test_eps_stops_a_pull_that_is_too_small(self):
        decays = jnp.array([1e-2, 4e-7, 1e-8, 1e-9])
        run = oracle.jit(jax.vmap(lambda decay: step_sizes(2000, decay, 1e-8)))
        want = [1.4139, 1.3656, 0.5856, 0.0934]
        np.testing.assert_allclose(run(decays)[:, -1, 1], want, rtol=1e-3)


def test_the_ramp_runs_from_0_to_just_below_1_and_stays_below_1_after():
    # with b1 = b2 = 0 and eps so large that the step is the pull itself: alpha * decay
    tx = sj.scale_by_adams(
        20, 0.5, pattern=sj.NM(1, 2), b1=0.0, b2=0.0, eps=1e6, mask_period=3
    )
    params = {"kernel": jnp.array([[2.0], [-1.0]])}
    zeros = {"kernel": jnp.zeros((2, 1))}

    def body(state, _):
        updates, state = tx.update(zeros, state, params)
        return state, updates["kernel"][1, 0] * 1e6

    run = oracle.jit(lambda p: jax.lax.scan(body, tx.init(p), length=25)[1])
    want = -0.5 * np.minimum(np.arange(25) / 20, 1)
    np.testing.assert_allclose(run(params), want, rtol=1e-4)


@pytest.fixture(scope="module")
def toy():
    """Linear regression 32 -> 16, 600 steps, cosine lr; NumPy gives the numbers below.

    Returns for each decay: S = |w m|_1 / |w|_1 over the run; at its end the mean losing
    by the mean kept weight; the relative change of the output by the hard prune.
    """
    steps = 600
    decays = jnp.array([1e-1, 1e-2, 1e-3, 0.0])

    def run(decay):
        key = jax.random.key(0)
        truth = jax.random.normal(key, (32, 16)) / np.sqrt(32)
        params = {
            "kernel": truth + 0.01 * jax.random.normal(jax.random.key(1), (32, 16))
        }
        lr = optax.cosine_decay_schedule(4e-3, steps, 1e-2)
        tx = sj.adams(lr, steps, decay, pattern=sj.NM(2, 4))

        def body(carry, t):
            params, state = carry
            x = jax.random.normal(jax.random.fold_in(key, t + 1), (64, 32))

            def loss(p):
                w = sj.forward_params(state, p)["kernel"]
                return ((x @ w - x @ truth) ** 2).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            w = jnp.abs(params["kernel"])
            mask = sj.nm_mask(w, 2, 4, -2)
            return (params, state), (w * mask).sum() / w.sum()

        (params, state), share = jax.lax.scan(
            body, (params, tx.init(params)), jnp.arange(steps)
        )
        w, pruned = params["kernel"], sj.sparse_params(state, params)["kernel"]
        mask = pruned != 0
        ratio = jnp.abs(jnp.where(mask, 0, w)).sum() / jnp.abs(pruned).sum()
        x = jax.random.normal(jax.random.key(99), (512, 32))
        change = jnp.linalg.norm(x @ (w - pruned)) / jnp.linalg.norm(x @ w)
        return share, ratio, change

    share, ratio, change = jax.jit(jax.vmap(run))(decays)
    return np.asarray(share), np.asarray(ratio), np.asarray(change)


def test_toy_succeeds_with_a_pull_of_the_gradients_size(toy):
    share, ratio, change = toy
    assert ratio[0] < 1e-3 and change[0] < 2e-3  # NumPy: 2e-4 and 0.03 %
    assert 1 - share[0, -1] < 1e-3


def test_toy_fails_without_pull(toy):
    _, ratio, change = toy
    assert 0.29 < ratio[-1] < 0.38 and change[-1] > 0.3  # NumPy: 0.31-0.35, 45-55 %


def test_toy_is_ordered_and_the_share_of_kept_weight_grows(toy):
    share, ratio, change = toy
    assert (np.diff(ratio) > 0).all() and (np.diff(change[1:]) > 0).all()
    assert 0.08 < ratio[2] < 0.2 and 0.15 < change[2] < 0.4  # NumPy: 0.13, 33 %
    means = share[:2].reshape(2, 12, 50).mean(2)
    assert (np.diff(means) > -1e-4).all() and (means[:, -1] > means[:, 0] + 0.1).all()


class StateTest(parameterized.TestCase):
    PARAMS = {"kernel": np.arange(8.0, dtype=np.float32).reshape(4, 2)}  # noqa: RUF012

    def make(self, total_steps=20, **kwargs):
        return sj.adams(0.1, total_steps, 0.1, pattern=sj.NM(2, 4), **kwargs)

    def test_the_stored_mask_is_used_not_a_new_one(self):
        problem = oracle.Problem(steps=9)
        tx = self.make(stacked=STACKED)
        whole = oracle.train(tx, problem)[-1]
        step = oracle.jit(lambda *args: oracle.train_step(tx, *args))
        carry = (problem.params, oracle.init(tx, problem.params))
        for i in range(9):
            # to NumPy leaves and back, as a checkpoint does
            leaves, treedef = jax.tree.flatten(carry)
            carry = treedef.unflatten([np.asarray(leaf) for leaf in leaves])
            carry = step(*carry, jax.tree.map(lambda x, i=i: x[i], problem.stream))
        chex.assert_trees_all_equal(sj.masks_of(carry[1]), sj.masks_of(whole[1]))
        chex.assert_trees_all_close(carry[0], whole[0], rtol=1e-6)
        now = oracle.select(
            abs(whole[0]["stack"]["kernel"]), oracle.Spec(sj.NM(2, 4), 1)
        )
        assert (sj.masks_of(whole[1])["stack"]["kernel"] != now).any()

    @parameterized.parameters("l1_decay", "b1", "b2", "eps")
    def test_numbers_of_64_bits_widen_nothing(self, name):
        kwargs = dict(l1_decay=0.1, b1=0.9, b2=0.99, eps=1e-8)
        kwargs[name] = np.float64(kwargs[name])
        tx = sj.scale_by_adams(20, pattern=sj.NM(2, 4), **kwargs)
        with jax.enable_x64(True):
            state = oracle.init(tx, self.PARAMS)
            updates, after = oracle.jit(tx.update)(self.PARAMS, state, self.PARAMS)
        chex.assert_trees_all_equal_dtypes(updates, self.PARAMS)
        chex.assert_trees_all_equal_dtypes(after, state)

    def test_the_mask_enters_no_forward(self):
        state = oracle.init(self.make(), self.PARAMS)
        chex.assert_trees_all_equal(sj.forward_params(state, self.PARAMS), self.PARAMS)

    @parameterized.product(jit=[True, False])
    def test_another_total_steps_raises(self, jit):
        state = oracle.init(self.make(20), self.PARAMS)
        update = self.make(21).update
        update = oracle.jit(update) if jit else update
        with pytest.raises(ValueError, match="has 20, this optimizer 21"):
            update(self.PARAMS, state, self.PARAMS)

    def test_another_total_steps_restored_into_the_state_of_the_new_raises(self):
        # leaves alone, as from an archive of arrays: the integer tells
        old, new = (oracle.init(self.make(steps), self.PARAMS) for steps in (20, 21))
        state = jax.tree.unflatten(jax.tree.structure(new), jax.tree.leaves(old))
        with pytest.raises(ValueError, match="has 20, this optimizer 21"):
            self.make(21).update(self.PARAMS, state, self.PARAMS)

    def test_a_checkpoint_of_another_total_steps_does_not_restore(self):
        # a jitted update could not see the integer: the names of the leaves tell
        old, new = (oracle.init(self.make(steps), self.PARAMS) for steps in (20, 21))
        with (
            tempfile.TemporaryDirectory() as folder,
            ocp.StandardCheckpointer() as store,
        ):
            path = pathlib.Path(folder) / "state"
            store.save(path, old)
            store.wait_until_finished()
            chex.assert_trees_all_equal(store.restore(path, old), old)
            with pytest.raises(ValueError, match="total_steps=2"):
                store.restore(path, new)

    def test_narrow_governed_leaves_raise_others_do_not(self):
        for dtype in (jnp.bfloat16, jnp.float16):
            params = {"kernel": jnp.ones((4, 2), dtype), "bias": jnp.ones(2)}
            with pytest.raises(TypeError, match=f"float32.*{dtype.__name__}.*'kernel'"):
                self.make().init(params)
        params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2, jnp.bfloat16)}
        oracle.init(self.make(), params)

    def test_complex_leaves_get_plain_adam(self):
        params = {"kernel": jnp.ones((4, 2)), "phase": jnp.zeros(3, jnp.complex64)}
        grads = {"kernel": jnp.ones((4, 2)), "phase": jnp.array([1 + 2j, 1j, -1])}
        found = []
        for tx in (self.make(), optax.adam(0.1)):
            state = oracle.init(tx, params)
            for factor in (1, 2):
                scaled = jax.tree.map(lambda g, factor=factor: g * factor, grads)
                updates, state = oracle.jit(tx.update)(scaled, state, params)
            found.append(updates["phase"])
        np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-7)

    def test_update_needs_params(self):
        state = oracle.init(self.make(), self.PARAMS)
        with pytest.raises(ValueError, match="needs `params`"):
            self.make().update(self.PARAMS, state)


BAD = {
    "steps": (dict(total_steps=0), "`total_steps`.*got 0"),
    "period": (dict(mask_period=0), "`mask_period`.*got 0"),
    "decay": (dict(l1_decay=-1.0), "`l1_decay`.*got -1.0"),
    "sparsity": (dict(pattern=sj.Unstructured()), "`sparsity` must be given"),
    "pattern": (dict(pattern=sj.NM(2, 3)), "m=3.*'kernel'"),
    "b1": (dict(b1=1.0), r"`b1` must be in \[0, 1\); got 1.0"),
    "b2": (dict(b2=-0.1), r"`b2` must be in \[0, 1\); got -0.1"),
    "eps": (dict(eps=-1.0), "`eps` must be at least 0; got -1.0"),
    "rate": (dict(learning_rate=-1.0), "`learning_rate` must be at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    kwargs, message = BAD[case]
    given = dict(learning_rate=0.1, total_steps=5, l1_decay=0.1, pattern=sj.NM(2, 4))
    with pytest.raises(ValueError, match=message):
        sj.adams(**(given | kwargs)).init({"kernel": jnp.ones((4, 2))})


def test_it_wraps_no_optimizer():
    with pytest.raises(TypeError, match="`learning_rate` must be a number or a sched"):
        sj.adams(optax.adam(0.1), 5, 0.1, pattern=sj.NM(2, 4))  # pyright: ignore


def test_an_allocation():
    params = {"a": jnp.ones((8, 4)), "b": jnp.ones((2, 4))}
    how = dict(pattern=sj.Unstructured(), sparsity=0.5, allocation=sj.erdos_renyi)
    got = sj.masks_of(sj.adams(1e-3, 10, 1e-3, **how).init(params))
    wanted = sj.erdos_renyi(params, 0.5)
    for name, mask in got.items():
        kept = (1 - wanted[name]) * mask.size
        assert abs(int(mask.sum()) - kept) <= 1, name
    assert {name: int(mask.sum()) for name, mask in got.items()} != {"a": 16, "b": 4}

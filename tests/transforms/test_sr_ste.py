"""SR-STE: a projected forward, a straight-through gradient, a pull on the pruned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import sparsejax as sj
from tests.transforms import _oracles as oracle

STACKED = oracle.Problem.STACKED


def sr_ste_oracle(problem, pattern, sparsity, inner, decay_at):
    specs = problem.specs(pattern)
    params = oracle.wide(problem.params)
    inner.init(params)
    for step in range(problem.steps):
        masks = {
            name: oracle.select(abs(params[name]), spec, sparsity)
            for name, spec in specs.items()
        }
        grads = problem.grad(step, oracle.masked(params, masks))
        for name, mask in masks.items():
            grads[name] = grads[name] + decay_at(step) * (1 - mask) * params[name]
        updates = inner.update(grads, params)
        params = {name: p + updates[name] for name, p in params.items()}
        yield params, masks, inner


class SrSteTest(parameterized.TestCase):
    @parameterized.parameters(
        (sj.NM(2, 4), None, 0.05, oracle.momentum),
        (sj.NM(2, 4), None, 0.05, oracle.adamw),
        (sj.NM(1, 2, axis=-1), None, 2e-4, oracle.momentum),
        (sj.NM(1, 8), None, 0, oracle.adamw),  # plain STE
        (sj.Unstructured(), 0.6, 0.05, oracle.momentum),
        (sj.Block((4, 2)), 0.5, 0.05, oracle.adamw),
        (sj.Channel(-1), 0.5, 0.05, oracle.momentum),
    )
    def test_matches_oracle(self, pattern, sparsity, decay, inner):
        problem, inner = oracle.Problem(), inner()
        tx = sj.sr_ste(
            inner.optax,
            pattern=pattern,
            decay=decay,
            sparsity=sparsity,
            stacked=STACKED,
        )
        got = oracle.train(tx, problem)
        want = list(sr_ste_oracle(problem, pattern, sparsity, inner, lambda t: decay))
        oracle.assert_equal_run(got, want, moments=False)
        params, state = got[-1]
        final = oracle.final_of(state, params)
        for name, spec in problem.specs(pattern).items():
            mask = oracle.select(abs(oracle.flat(params)[name]), spec, sparsity)
            np.testing.assert_array_equal(
                final[name], np.where(mask, oracle.flat(params)[name], 0)
            )

    def test_a_scheduled_decay_matches_oracle(self):
        problem, inner = oracle.Problem(), oracle.momentum()
        tx = sj.sr_ste(
            inner.optax,
            pattern=sj.NM(2, 4),
            decay=lambda step: 0.01 * step,
            stacked=STACKED,
        )
        got = oracle.train(tx, problem)
        want = sr_ste_oracle(problem, sj.NM(2, 4), None, inner, lambda t: 0.01 * t)
        oracle.assert_equal_run(got, want)

    def test_erdos_renyi_kernel_matches_oracle(self):
        params = {"a": np.ones((12, 10)), "b": np.ones((10, 4)), "c": np.ones((4, 4))}
        rng = np.random.default_rng(1)
        params = jax.tree.map(
            lambda p: rng.standard_normal(p.shape).astype("f"), params
        )
        shapes = {name: p.shape for name, p in params.items()}
        tx = sj.sr_ste(
            optax.sgd(0.1),
            pattern=sj.Unstructured(),
            sparsity=0.4,
            allocation=sj.erdos_renyi_kernel,
        )
        sparsities = oracle.erk(shapes, 0.4)
        assert sparsities["c"] == 0 < sparsities["b"] < sparsities["a"]
        for name, mask in oracle.first_masks(tx, params).items():
            want = oracle.select(abs(params[name]), oracle.Spec(), sparsities[name])
            np.testing.assert_array_equal(mask, want)

    def test_ties_go_to_the_lower_index(self):
        for pattern, sparsity in ((sj.NM(2, 4), None), (sj.Unstructured(), 0.5)):
            problem, inner = oracle.Problem(ties=True), oracle.plain()
            tx = sj.sr_ste(
                inner.optax,
                pattern=pattern,
                decay=0,
                sparsity=sparsity,
                stacked=STACKED,
            )
            want = sr_ste_oracle(problem, pattern, sparsity, inner, lambda t: 0)
            oracle.assert_equal_run(oracle.train(tx, problem), want, rtol=0, atol=0)

    @parameterized.product(decay=[0, 2e-4, 0.3], pattern=[sj.NM(2, 4), sj.NM(4, 4)])
    def test_the_inner_gets_the_gradient_plus_the_pull(self, decay, pattern):
        rng = np.random.default_rng(2)
        weight = rng.standard_normal((8, 3)).astype(np.float32)
        target = rng.standard_normal((8, 3)).astype(np.float32)
        params = {"kernel": jnp.asarray(weight)}
        tx = sj.sr_ste(optax.identity(), pattern=pattern, decay=decay)

        @oracle.jit
        def run(params):
            state = tx.init(params)

            def loss(p):
                rest = sj.forward_params(state, p)["kernel"] - target
                return 0.5 * (rest**2).sum()

            return tx.update(jax.grad(loss)(params), state, params)[0]

        got = run(params)
        mask = oracle.select(abs(weight), oracle.Spec(pattern))
        want = (weight * mask - target) + decay * (1 - mask) * weight
        np.testing.assert_allclose(got["kernel"], want, rtol=1e-6, atol=1e-6)

    @parameterized.parameters(0.02, lambda step: 0.01 * (step + 1))
    def test_the_decoupled_pull_bypasses_the_inner_optimizer(self, decay):
        rng = np.random.default_rng(3)
        weight, grad = rng.standard_normal((2, 8, 3)).astype(np.float32)
        inner = optax.adam(0.1)
        tx = sj.sr_ste(inner, pattern=sj.NM(2, 4), decay=decay, decoupled=True)
        params = alone = {"kernel": jnp.asarray(weight)}
        state, inner_state = tx.init(params), inner.init(params)
        update = oracle.jit(tx.update)
        for step in range(2):
            grads = {"kernel": jnp.asarray(grad)}
            alone, inner_state = inner.update(grads, inner_state, alone)
            now = np.asarray(params["kernel"])
            pruned = ~oracle.select(abs(now), oracle.Spec(sj.NM(2, 4)))
            strength = decay(step) if callable(decay) else decay
            updates, state = update(grads, state, params)
            want = np.asarray(alone["kernel"]) - strength * pruned * now
            np.testing.assert_allclose(updates["kernel"], want, rtol=1e-5, atol=1e-7)
            params = optax.apply_updates(params, updates)
            alone = params

    @parameterized.product(decoupled=[False, True], jitted=[False, True])
    def test_narrow_gradients_do_not_round_the_pull_away(self, decoupled, jitted):
        weight = np.full((4, 2), 0.05, np.float32)
        params = {"kernel": jnp.asarray(weight)}
        grads = {"kernel": jnp.full((4, 2), 0.5, jnp.bfloat16)}
        tx = sj.sr_ste(optax.identity(), pattern=sj.NM(2, 4), decoupled=decoupled)
        update = oracle.jit(tx.update) if jitted else tx.update
        got = update(grads, tx.init(params), params)[0]["kernel"]
        pull = (-1 if decoupled else 1) * 2e-4 * weight[2:].astype(np.float64)
        np.testing.assert_array_equal(got[:2], 0.5)
        np.testing.assert_array_equal(got[2:], (0.5 + pull).astype(np.float32))

    def test_n_of_n_is_the_inner_optimizer(self):
        problem, inner = oracle.Problem(), optax.adamw(0.02)
        tx = sj.sr_ste(inner, pattern=sj.NM(4, 4), stacked=STACKED)
        got, want = oracle.train(tx, problem), oracle.train_inner(inner, problem)
        oracle.assert_close(
            oracle.wide(got[-1][0]), oracle.wide(want[-1]), 1e-6, 1e-7, "params"
        )

    def test_without_gradient_pruned_weights_shrink_geometrically(self):
        params = {"kernel": jnp.array([[4.0], [-3.0], [2.0], [-1.0]])}
        tx = sj.sr_ste(optax.sgd(0.1), pattern=sj.NM(2, 4), decay=0.5)

        def body(carry, _):
            params, state = carry
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, state = tx.update(zeros, state, params)
            return (optax.apply_updates(params, updates), state), None

        run = oracle.jit(
            lambda p: jax.lax.scan(body, (p, tx.init(p)), length=20)[0][0]["kernel"]
        )
        shrunk = (1 - 0.1 * 0.5) ** 20
        np.testing.assert_allclose(
            run(params)[:, 0], [4, -3, 2 * shrunk, -shrunk], rtol=1e-5
        )

    def test_leaves_that_are_not_governed_feel_no_pull(self):
        params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
        tx = sj.sr_ste(optax.identity(), pattern=sj.NM(2, 4), decay=0.5)
        zeros = jax.tree.map(jnp.zeros_like, params)
        run = oracle.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
        updates = run(zeros, params)
        np.testing.assert_array_equal(updates["bias"], 0)
        np.testing.assert_array_equal(
            updates["kernel"], [[0, 0], [0, 0], [0.5, 0.5], [0.5, 0.5]]
        )


@pytest.mark.once
def test_masks_flicker_less_the_stronger_the_pull():
    """Zhou et al., 2021, in small: normalised SAD a step falls with the decay.

    A teacher and a student of two hidden layers, 2:4 on both hidden matrices, SGD with
    momentum 0.9, cosine to 0; mean of four seeds over the second half of the run.
    """
    decays = np.array([0.0, 2e-3, 1e-2, 5e-2], np.float32)
    steps, sizes = 300, [(16, 32), (32, 32), (32, 4)]

    def forward(params, x):
        x = jax.nn.relu(x @ params["w0"])
        x = jax.nn.relu(x @ params["w1"])
        return x @ params["w2"]

    def draw(key):
        keys = jax.random.split(key, 3)
        return {
            f"w{i}": jax.random.normal(k, s) * np.sqrt(2 / s[0])
            for i, (k, s) in enumerate(zip(keys, sizes, strict=True))
        }

    def flicker(seed, decay):
        key = jax.random.key(seed)
        teacher, student = draw(jax.random.fold_in(key, 1)), draw(key)
        tx = sj.sr_ste(
            optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9),
            pattern=sj.NM(2, 4),
            decay=decay,
            where={"w0": True, "w1": True, "w2": False},
        )

        def body(carry, t):
            params, state = carry
            x = jax.random.normal(jax.random.fold_in(key, t + 2), (64, sizes[0][0]))
            labels = forward(teacher, x).argmax(-1)

            def loss(p):
                logits = forward(sj.forward_params(state, p), x)
                nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return nll.mean()

            old = sj.masks_of(state)
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            flips = sj.sad(old, sj.masks_of(state))
            return (optax.apply_updates(params, updates), state), flips

        flips = jax.lax.scan(body, (student, tx.init(student)), jnp.arange(steps))[1]
        return flips[steps // 2 :].mean() / (16 * 32 + 32 * 32)

    each = jax.vmap(jax.vmap(flicker, (0, None)), (None, 0))
    mean = np.asarray(jax.jit(each)(jnp.arange(4), jnp.asarray(decays))).mean(1)
    assert (np.diff(mean) < 0).all(), mean
    assert mean[-1] < mean[0] / 2, mean


BAD = {
    "decay": (dict(pattern=sj.NM(2, 4), decay=-1e-4), "`decay`.*got -0.0001"),
    "schedule": (
        dict(pattern=sj.Unstructured(), sparsity=lambda t: 0.5),
        "constant `sparsity`",
    ),
    "missing": (dict(pattern=sj.Unstructured()), "`sparsity` must be given.*'kernel'"),
    "pattern": (dict(pattern=sj.NM(2, 3)), "m=3.*'kernel'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        sj.sr_ste(optax.sgd(0.1), **kwargs).init({"kernel": jnp.ones((4, 2))})


def test_the_pull_of_narrow_weights_is_rounded_once():
    weights = {"kernel": jnp.linspace(0.1, 1, 64).reshape(32, 2).astype(jnp.bfloat16)}
    tx = sj.sr_ste(optax.identity(), pattern=sj.NM(1, 2), decay=2e-4)
    grads = jax.tree.map(jnp.zeros_like, weights)
    updates, state = tx.update(grads, tx.init(weights), weights)
    lost = ~sj.masks_of(state)["kernel"]
    pull = jnp.float32(2e-4) * weights["kernel"].astype(jnp.float32)
    want = pull.astype(jnp.bfloat16)[lost]
    np.testing.assert_array_equal(updates["kernel"][lost], want)

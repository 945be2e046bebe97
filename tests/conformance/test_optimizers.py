"""Methods around every optimizer that optax and optax.contrib export.

RigL edits the optimizer's state most, and skips its steps: it meets every optimizer.
The other methods take turns.
"""

import dataclasses
import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import sparsejax as sj
from tests.conformance import suite

STEPS = 4
LR = 1e-2


def exported():
    """Every optimizer alias, by name; found anew in each version of optax."""
    found = {}
    for module in (optax, contrib):
        for name in dir(module):
            thing = getattr(module, name)
            function = getattr(thing, "func", thing)  # nadam is a partial of adam
            if name.startswith(("_", "scale_by_")) or not inspect.isfunction(function):
                continue
            if module is contrib or function.__module__ == "optax._src.alias":
                found[name] = thing
    return found


EXPORTED = exported()
NOT_OPTIMIZERS = {
    "differentially_private_aggregate": "the aggregation inside dpsgd, covered there",
    "hutchinson_estimator_diag_hessian": "a Hessian estimate inside sophia",
    "normalize": "rescales gradients, covered inside sam",
    "reduce_on_plateau": "rescales updates; covered by test_wrappers",
    "schedule_free_eval_params": "a function of a state",
}


def value_extra(value, grads, value_fn):
    return {"value": value}


def linesearch_extra(value, grads, value_fn):
    return {"value": value, "grad": grads, "value_fn": value_fn}


def objective_extra(value, grads, value_fn):
    return {"obj_fn": value_fn}


@dataclasses.dataclass(frozen=True)
class Special:
    """What one optimizer needs beyond a learning rate.

    Attributes:
      make: from the alias to the optimizer.
      extra: what `update` is given beside the gradient.
      per_example: gradients have a leading axis of examples.
      without: methods that cannot serve it; the table says why.
      learns_of_pruned: its moments change where the gradient is 0.
    """

    make: Callable = lambda alias: alias(learning_rate=LR)
    extra: Callable = suite.no_extra
    per_example: bool = False
    without: tuple[str, ...] = ()
    learns_of_pruned: bool = False


def around_sgd(alias):
    return alias(optax.sgd(LR))


def private(alias):
    return alias(LR, l2_norm_clip=1.0, noise_multiplier=0.1, seed=0)


def sharpness_aware(alias):
    return alias(optax.sgd(LR), optax.chain(contrib.normalize(), optax.sgd(LR)))


SPECIAL = {
    # small leaves are factored too: their statistics have shapes of their own
    "adafactor": Special(lambda alias: alias(LR, min_dim_size_to_factor=4)),
    "cocob": Special(lambda alias: alias()),
    # RigL grows by raw gradients, which would leak past the privacy noise: it raises
    "dpsgd": Special(private, per_example=True, without=("rigl",)),
    "galore": Special(lambda alias: alias(LR, rank=2)),
    "lbfgs": Special(lambda alias: alias(), linesearch_extra),
    "mechanize": Special(around_sgd),
    "momo": Special(extra=value_extra),
    "momo_adam": Special(extra=value_extra),
    "noisy_sgd": Special(lambda alias: alias(LR, key=jax.random.key(3))),
    "polyak_sgd": Special(lambda alias: alias(), value_extra),
    "sam": Special(sharpness_aware),
    "schedule_free": Special(lambda alias: alias(optax.sgd(LR), LR)),
    "sgd": Special(lambda alias: alias(LR, momentum=0.9, nesterov=True)),
    # it estimates the curvature of all weights, by gradients of its own
    "sophia": Special(extra=objective_extra, learns_of_pruned=True),
    "split_real_and_imaginary": Special(lambda alias: alias(optax.adam(LR))),
}
OPTIMIZERS = sorted(set(EXPORTED) - set(NOT_OPTIMIZERS))


def test_the_tables_name_only_what_optax_exports():
    assert set(NOT_OPTIMIZERS) | set(SPECIAL) <= set(EXPORTED)
    known = {"adamw", "adafactor", "lbfgs", "lion", "muon", "nadam", "sm3", "sophia"}
    assert known <= set(OPTIMIZERS)


def per_example_step(tx, params, state):
    """As `suite.take_step`, with a gradient for each example."""

    def example_loss(params, x, y):
        out = suite.predict(sj.forward_params(state, params), x)
        return jnp.mean((out - y) ** 2)

    grads = jax.vmap(jax.grad(example_loss), (None, 0, 0))(params, *suite.batch())
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


OTHERS = [method for method in suite.WRAPPING if method != "rigl"]


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.filterwarnings('ignore:"seed" is deprecated')  # dpsgd has nothing else
@pytest.mark.once  # test_wrappers.py runs three of them on every jax
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_methods_around(name):
    """The methods in one program, so that it is compiled once."""
    special = SPECIAL.get(name, Special())
    inner = special.make(EXPORTED[name])
    turn = OTHERS[OPTIMIZERS.index(name) % len(OTHERS)]
    # top-k costs compile time: the others do without it here
    patterns = {
        method: suite.mixed if method in suite.DYNAMIC else suite.two_four
        for method in ("rigl", turn)
        if method not in special.without
    }
    txs = {m: suite.build(m, inner, pattern=p) for m, p in patterns.items()}

    def step_all(carry):
        new, seen = {}, {}
        for method, tx in txs.items():
            params, state = carry[method]
            if special.per_example:
                params, state = per_example_step(tx, params, state)
            else:
                params, state = suite.take_step(tx, params, state, special.extra)
            new[method] = params, state
            seen[method] = suite.record(params, state)
        return new, seen

    def init_all(params):
        return {method: (params, tx.init(params)) for method, tx in txs.items()}

    carry = suite.fast_jit(init_all)(suite.make_params())
    spec = suite.spec(carry)
    step_all = suite.fast_jit(chex.assert_max_traces(step_all, n=1))
    regrown = dict.fromkeys(txs, 0)
    for step in range(STEPS):
        old, (carry, seen) = carry, step_all(carry)
        assert suite.spec(carry) == spec
        for method, pattern in patterns.items():
            at = f"{name} step {step}"
            params, state = carry[method]
            before = old[method][0]
            suite.check_step(method, seen[method], before, pattern=pattern, at=at)
            if method in suite.HARD and not special.learns_of_pruned:
                regrown[method] += suite.check_regrown(
                    state.inner_state,
                    inner.init(params),
                    params,
                    sj.masks_of(old[method][1]),
                    seen[method]["masks"],
                    at=f"{at} {method}",
                )
    for method in set(suite.DYNAMIC) & set(txs):
        assert regrown[method] > 0 or special.learns_of_pruned

"""Every method inside every optax wrapper, pairwise with optimizers, dtypes and modes.

One case for each pair of a method and a wrapper; the optimizer, the dtype of the params
and the way the loop runs rotate so that each pair of any two factors is met.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import sparsejax as sj
from tests.conformance import suite

STEPS = 5
LR = 1e-2
FIRST, SECOND = suite.NAMES

OPTIMIZERS = {
    "adamw": optax.adamw,
    "sgd_momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adafactor": lambda learning_rate: optax.adafactor(
        learning_rate, min_dim_size_to_factor=8
    ),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


# ---------------------------------------------------------------- wrappers


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """One way to put a method into an optax optimizer.

    Attributes:
      wrap: (method, optimizer factory, build options) -> transformation.
      names: the leaves that the method governs in it.
      extra: what `update` is given beside the gradient.
      spoil: at which steps the loss is NaN.
    """

    wrap: Callable[..., optax.GradientTransformation]
    names: tuple[str, ...] = (FIRST, SECOND)
    extra: Callable = suite.no_extra
    spoil: tuple[int, ...] = ()


def plain(method, make, options):
    return suite.build(method, make(LR), **options)


def chain(method, make, options):
    # a transform of updates belongs inside: after the method it would undo exact zeros
    plateau = contrib.reduce_on_plateau(patience=1, accumulation_size=1)
    inner = optax.chain(make(LR), plateau)
    return optax.chain(
        optax.clip_by_global_norm(1.0), suite.build(method, inner, **options)
    )


def partition(method, make, options):
    """The labels are a prefix: the whole subtree `second` is hidden."""
    transforms = {
        "sparse": suite.build(method, make(LR), **options),
        "dense": optax.adam(LR),
    }
    return optax.partition(transforms, {"first": "sparse", "second": "dense"})


def masked(method, make, options):
    def second(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "second" in jax.tree_util.keystr(path), params
        )

    def others(params):
        return jax.tree.map(lambda chosen: not chosen, second(params))

    return optax.chain(
        optax.masked(suite.build(method, make(LR), **options), second),
        optax.masked(optax.adam(LR), others),
    )


def multi_steps(method, make, options):
    tx = optax.MultiSteps(suite.build(method, make(LR), **options), every_k_schedule=2)
    return tx.gradient_transformation()


def apply_if_finite(method, make, options):
    return optax.apply_if_finite(suite.build(method, make(LR), **options), 3)


def inject_inside(method, make, options):
    schedule = optax.linear_schedule(LR, LR / 10, STEPS)
    # of bfloat16 params it would make bfloat16 hyperparameters: adamw's b2 becomes 1
    inject = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
    inner = inject(learning_rate=schedule)
    return suite.build(method, inner, **options)


def inject_outside(method, make, options):
    def factory(learning_rate):
        return suite.build(method, make(learning_rate), **options)

    schedule = optax.linear_schedule(LR, LR / 10, STEPS)
    return optax.inject_hyperparams(factory)(learning_rate=schedule)


def value_extra(value, grads, value_fn):
    return {"value": value}


WRAPPERS = {
    "plain": Wrapper(plain),
    "chain": Wrapper(chain, extra=value_extra),
    "partition": Wrapper(partition, names=(FIRST,)),
    "masked": Wrapper(masked, names=(SECOND,)),
    "multi_steps": Wrapper(multi_steps),
    "apply_if_finite": Wrapper(apply_if_finite, spoil=(1, 2)),
    "inject_inside": Wrapper(inject_inside),
    "inject_outside": Wrapper(inject_outside),
}


# ---------------------------------------------------------------- ways to run a loop


def run_jit(init, step, starts):
    """Returns the carries before the first and after each step, and the records."""
    carry = suite.fast_jit(init)(*starts[0])
    step = suite.fast_jit(step)
    carries, seen = [carry], []
    for i in range(STEPS):
        carry, new = step(carry, i)
        carries.append(carry)
        seen.append(new)
    return [(carries, seen)]


def run_donated(init, step, starts):
    carry = suite.fast_jit(init)(*starts[0])
    step = suite.fast_jit(step, donate_argnums=0)
    carries, seen = [jax.tree.map(jnp.copy, carry)], []
    for i in range(STEPS):
        given = carry
        carry, new = step(given, i)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given[0]))
        carries.append(jax.tree.map(jnp.copy, carry))
        seen.append(new)
    return [(carries, seen)]


def run_scan(init, step, starts):
    def body(carry, i):
        carry, new = step(carry, i)
        return carry, (carry, new)

    def run(*start):
        carry = init(*start)
        return carry, jax.lax.scan(body, carry, jnp.arange(STEPS))[1]

    first, (carries, seen) = suite.fast_jit(run)(*starts[0])
    return [([first, *unstack(carries)], unstack(seen))]


def run_vmap(init, step, starts):
    """Two params, and seeds of their masks, side by side."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    carry = suite.fast_jit(jax.vmap(init))(*stacked)
    step = suite.fast_jit(jax.vmap(step, in_axes=(0, None)))
    carries, seen = [carry], []
    for i in range(STEPS):
        carry, new = step(carry, i)
        carries.append(carry)
        seen.append(new)
    pick = [lambda x, i=i: x[i] for i in range(len(starts))]
    return [(jax.tree.map(p, carries), jax.tree.map(p, seen)) for p in pick]


def unstack(tree):
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(STEPS)]


MODES = {"jit": run_jit, "donated": run_donated, "scan": run_scan, "vmap": run_vmap}


# ---------------------------------------------------------------- the cases


def cases():
    for (i, method), (j, wrapper) in itertools.product(
        enumerate(suite.METHODS), enumerate(WRAPPERS)
    ):
        optimizer = list(OPTIMIZERS)[(i + j) % len(OPTIMIZERS)]
        mode = list(MODES)[(i + j) % len(MODES)]
        dtype = list(DTYPES)[(i + (i + j) // 4) % 2]
        if method == "adams":  # an optimizer of its own, and float32 only
            optimizer, dtype = "adamw", "float32"
        yield method, wrapper, optimizer, mode, dtype


CASES = list(cases())


def test_every_pair_is_met():
    others = [case for case in CASES if case[0] != "adams"]
    factors = [suite.WRAPPING, WRAPPERS, OPTIMIZERS, MODES, DTYPES]
    for a, b in itertools.combinations(range(5), 2):
        met = {(case[a], case[b]) for case in others}
        assert met == set(itertools.product(factors[a], factors[b])), (a, b)


def on_one_jax(case):
    """What a wrapper does with a state depends on optax, which is the same for all."""
    marks = () if case[1] == "plain" else pytest.mark.once
    return pytest.param(case, marks=marks, id="-".join(case))


@pytest.mark.parametrize("case", [on_one_jax(case) for case in CASES])
def test_method_in_wrapper(case):
    method, wrapper, optimizer, mode, dtype = case
    wrapper = WRAPPERS[wrapper]
    traces = suite.Traces()

    def make_tx(seed):
        key = jax.random.fold_in(suite.KEY, seed)
        options = {"key": key, "pattern": suite.mixed}
        return wrapper.wrap(method, OPTIMIZERS[optimizer], options)

    def init(params, seed):
        return params, make_tx(seed).init(params), seed

    @traces
    def step(carry, i):
        params, state, seed = carry
        spoiled = jnp.any(i == jnp.asarray(wrapper.spoil)) if wrapper.spoil else False

        def loss(params):
            return suite.loss(params) * jnp.where(spoiled, jnp.nan, 1.0)

        tx = make_tx(seed)
        params, state = suite.take_step(tx, params, state, wrapper.extra, loss)
        return (params, state, seed), suite.record(params, state)

    starts = [(suite.make_params(seed, DTYPES[dtype]), seed) for seed in (0, 1)]
    for carries, seen in MODES[mode](init, step, starts):
        regrown = 0
        for i, new in enumerate(seen):
            (before, old_state, _), (params, state, _) = carries[i : i + 2]
            at = f"step {i}"
            assert suite.spec(state) == suite.spec(carries[0][1]), at
            old = suite.find_state(old_state)
            updated = int(suite.find_state(state).step) - int(old.step)
            suite.check_step(
                method,
                new,
                before if updated else None,
                names=wrapper.names,
                at=at,
            )
            if i in wrapper.spoil:
                assert not updated
                same = (
                    suite.numbers((before, old)),
                    suite.numbers((params, suite.find_state(state))),
                )
                jax.tree.map(np.testing.assert_array_equal, *same)
            if method in suite.HARD:
                masks = new["masks"], sj.masks_of(old_state)
                if not sj.is_mask_update(old_state):
                    jax.tree.map(np.testing.assert_array_equal, *masks)
                inner = suite.find_state(state).inner_state
                regrown += suite.check_regrown(inner, None, params, *masks[::-1], at)
        assert regrown > 0 or method not in suite.DYNAMIC
    assert traces.count == 1


# ---------------------------------------------------------------- several methods


PARTITIONS = {
    "subtrees": {"first": "a", "second": "b"},  # a prefix: whole subtrees hidden
    "leaves": {
        "first": {"bias": "dense", "kernel": "a"},
        "second": {"kernel": "b"},
    },
}


@pytest.mark.parametrize("labels", PARTITIONS)
@pytest.mark.parametrize(
    "methods", [("rigl", "sr_ste"), ("mask_decay", "magnitude_prune")], ids="-".join
)
def test_two_methods_in_two_partitions(methods, labels):
    """One forward, one mask tree, each leaf as its own method wants it."""
    transforms = {
        label: suite.build(method, make(LR))
        for label, method, make in zip("ab", methods, OPTIMIZERS.values(), strict=False)
    }
    tx = optax.partition(transforms | {"dense": optax.sgd(LR)}, PARTITIONS[labels])
    params = suite.make_params()

    @suite.fast_jit
    def step(params, state):
        params, state = suite.take_step(tx, params, state)
        return (
            params,
            state,
            {
                "params": params,
                "masks": sj.masks_of(state),
                "forward": sj.forward_params(state, params),
                "sparse": sj.sparse_params(state, params),
            },
        )

    state = suite.fast_jit(tx.init)(params)
    for num_updates in range(1, STEPS):
        before = params
        params, state, seen = step(params, state)
        assert jax.tree.structure(seen["forward"]) == jax.tree.structure(params)
        assert sorted(suite.flat(seen["masks"])) == [FIRST, SECOND]
        for method, name in zip(methods, (FIRST, SECOND), strict=True):
            own = {key: {"x": suite.flat(tree)[name]} for key, tree in seen.items()}
            own["num_updates"] = num_updates
            old = {"x": suite.flat(before)[name]}
            suite.check_step(method, own, old, names=["['x']"], at=name)


# ---------------------------------------------------------------- our own factories


FACTORIES = {
    "sr_ste": ({"inner": optax.sgd(LR)}, {"decay": optax.linear_schedule(0.0, 0.1, 4)}),
    "mask_decay": (
        {"inner": optax.adam(LR)},
        {"decay": optax.linear_schedule(1.0, 0.0, 4)},
    ),
    "adams": (
        {"total_steps": 10},
        {
            "learning_rate": optax.linear_schedule(0.1, 0.0, 4),
            "l1_decay": optax.constant_schedule(1e-2),
        },
    ),
}


@pytest.mark.parametrize("method", FACTORIES)
def test_inject_hyperparams_into_a_method(method):
    """Equal to the schedules given directly; `static_args` names all the others."""
    function = getattr(sj, method)
    fixed, schedules = FACTORIES[method]
    fixed = fixed | {"pattern": suite.two_four}
    static = set(inspect.signature(function).parameters) - set(schedules)
    inject = optax.inject_hyperparams(function, static_args=static)
    injected = inject(**fixed, **schedules)
    if method == "mask_decay":
        # the forward after an update uses the value that was injected into it
        schedules = {"decay": lambda step, s=schedules["decay"]: s(step - 1)}
    direct = function(**fixed, **schedules)
    traces = suite.Traces()

    @suite.fast_jit
    @traces
    def both(carries):
        return [
            suite.take_step(tx, params, state)
            for tx, (params, state) in zip((direct, injected), carries, strict=True)
        ]

    params = suite.make_params()
    carries = [(params, tx.init(params)) for tx in (direct, injected)]
    for _ in range(STEPS):
        carries = both(carries)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            *(params for params, _ in carries),
        )
    assert traces.count == 1
    assert set(carries[1][1].hyperparams) == set(schedules)


def test_a_number_injected_from_outside_takes_effect():
    def factory(learning_rate):
        return suite.build("rigl", optax.sgd(learning_rate))

    tx = optax.inject_hyperparams(factory)(learning_rate=0.1)
    params = suite.make_params()
    step = suite.fast_jit(lambda carry: suite.take_step(tx, *carry))
    params, state = step((params, tx.init(params)))  # RigL's first is a mask update
    state.hyperparams["learning_rate"] = jnp.float32(0)
    still, state = step((params, state))
    jax.tree.map(np.testing.assert_array_equal, still, params)


def test_more_micro_steps_than_updates():
    """`MultiSteps` as an object; before its first emitted update nothing changes."""
    tx = optax.MultiSteps(suite.build("rigl", optax.adam(LR)), every_k_schedule=3)
    params = suite.make_params()
    step = suite.fast_jit(lambda carry: suite.take_step(tx, *carry))
    first, state = step((params, tx.init(params)))
    jax.tree.map(np.testing.assert_array_equal, first, params)
    assert sj.is_mask_update(state)  # for all micro-steps of the update
    for _ in range(2):
        first, state = step((first, state))
    zeroed = sj.apply_masks(first, sj.masks_of(state))
    jax.tree.map(np.testing.assert_array_equal, first, zeroed)
    assert not sj.is_mask_update(state)

"""Bad input raises before anything is computed, and says where, what and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from tests.conformance import suite

pytestmark = pytest.mark.once  # test_contract.py has NaN on every jax

ADAM = optax.adam(1e-3)
KEY = jax.random.key(0)
PARAMS = {"bias": jnp.ones(4), "kernel": jnp.arange(1.0, 33.0).reshape(8, 4)}
NAN = {"bias": jnp.ones(4), "kernel": PARAMS["kernel"].at[1, 2].set(jnp.nan)}
NM = sj.NM(2, 4)
KERNEL = re.escape("['kernel']")


def build(method, *, pattern=NM, sparsity=None, inner=ADAM, **options):
    """A method with no options but those under test."""
    options["pattern"] = pattern
    every = {"update_every": 2, "stop_step": 9, "key": KEY}
    match method:
        case "static_sparse":
            return sj.static_sparse(inner, sparsity, **{"key": KEY} | options)
        case "magnitude_prune":
            return sj.magnitude_prune(inner, sparsity, **options)
        case "sparse_evolution":
            return sj.sparse_evolution(inner, sparsity, **every | options)
        case "rigl":
            return sj.rigl(inner, sparsity, **every | options)
        case "sr_ste":
            return sj.sr_ste(inner, sparsity=sparsity, **options)
        case "mask_decay":
            decay = options.pop("decay", suite.decay)
            return sj.mask_decay(inner, decay, sparsity=sparsity, **options)
        case "structure_decay":
            patterns = [options.pop("pattern")]
            return sj.structure_decay(
                inner, patterns, [0], sparsity=sparsity, **options
            )
        case "adams":
            l1_decay = options.pop("l1_decay", 1e-3)
            return sj.adams(1e-3, 10, l1_decay, sparsity=sparsity, **options)


each_method = pytest.mark.parametrize("method", suite.METHODS)
each_wrapping = pytest.mark.parametrize("method", suite.WRAPPING)


def raises(error, *words):
    """Each of the words must stand in the message, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(words))


# ------------------------------------------------------------ patterns and leaves


@each_method
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (sj.NM(2, 3), (r"`m` must divide", "m=3", r"\(8, 4\)", "Pad it", KERNEL)),
        (sj.Block((3, 4)), (r"\(3, 4\) must divide", r"\(8, 4\)", "Pad it", KERNEL)),
        (sj.Block((2, 2, 2)), ("need 3 axes", r"\(8, 4\)", "Exclude", KERNEL)),
        (sj.Channel(2), ("axis 2 must be one of the axes", "Pass a per-leaf", KERNEL)),
    ],
    ids=str,
)
def test_pattern_that_does_not_suit_a_leaf(method, pattern, words):
    sparsity = None if isinstance(pattern, sj.NM) else 0.5
    tx = build(method, pattern=pattern, sparsity=sparsity)
    with raises(ValueError, *words):
        tx.init(PARAMS)
    with raises(ValueError, *words):
        jax.eval_shape(tx.init, PARAMS)


@each_method
def test_default_nm_axis_of_a_dense_general(method):
    params = {"query": {"kernel": jnp.ones((8, 2, 4))}}
    words = "contraction axis", r"\(8, 2, 4\)", "query", "per-leaf `pattern`", "stacked"
    with raises(ValueError, *words):
        build(method).init(params)
    build(method, pattern=sj.NM(2, 4, axis=0)).init(params)


@each_method
def test_no_leaf_governed(method):
    nothing = {"bias": jnp.ones(4), "embedding": jnp.ones((4, 4))}
    words = "at least one leaf", "none of the 2", r"\['bias'\] float32 \(4,\)", "Pass a"
    with raises(ValueError, *words, "by default these are floating", "plain_path"):
        build(method).init(nothing)
    with raises(ValueError, "none of the 0 leaves", "empty"):
        build(method).init({})
    with raises(ValueError, "none of the 2 leaves"):
        build(method, where=lambda path, leaf: False).init(PARAMS)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: sj.NM(5, 4), ValueError, "0 < n <= m; got n=5, m=4"),
        (lambda: sj.NM(0, 4), ValueError, "got n=0, m=4"),
        (lambda: sj.NM(2.0, 4), TypeError, "`n` must be a Python int; got 2.0"),
        (lambda: sj.NM(2, "4"), TypeError, "`m` must be a Python int; got '4'"),
        (lambda: sj.NM(2, 4, None), TypeError, "`axis` must be .* got None"),
        (lambda: sj.Block(4), TypeError, r"`shape` must hold one size .* got 4"),
        (lambda: sj.Block((4, 4.0)), TypeError, "`shape` must be .* 4.0"),
        (lambda: sj.Block((4, True)), TypeError, "`shape` must be .* got True"),
        (lambda: sj.Channel(True), TypeError, "`axis` must be .* got True"),
        (lambda: sj.Block((0, 4)), ValueError, r"positive sizes; got \(0, 4\)"),
        (lambda: sj.Channel("out"), TypeError, "`axis` must be .* 'out'"),
    ],
)
def test_patterns(make, error, words):
    with raises(error, words):
        make()


@each_method
@pytest.mark.parametrize("pattern", ["2:4", sj.NM, None, 0.5, (2, 4)], ids=str)
def test_pattern_of_another_kind(method, pattern):
    with raises(TypeError, "`pattern` must be", r"got .* 2:4 .* `sj.NM\(2, 4\)`"):
        build(method, pattern=pattern, sparsity=0.5)


# ------------------------------------------------------------ sparsity

OUTSIDE = [1.0, 1, -0.1, float("nan"), 90, 90.0, np.float32(90), jnp.float32(90)]


@each_method
@pytest.mark.parametrize("value", OUTSIDE, ids=repr)
def test_sparsity_outside_its_range(method, value):
    words = [r"`sparsity` must be .* \[0, 1\); got " + re.escape(str(value))]
    if value > 1:
        words.append("Percentages: divide by 100")
    with raises(ValueError, *words):
        build(method, pattern=sj.Unstructured(), sparsity=value)
    with raises(ValueError, words[0] + f".*{KERNEL}", *words[1:]):
        tree = {"bias": None, "kernel": value}
        build(method, pattern=sj.Unstructured(), sparsity=tree)


@pytest.mark.parametrize("value", OUTSIDE, ids=repr)
def test_sparsity_outside_its_range_in_functions(value):
    for function in (sj.prune, sj.uniform, sj.erdos_renyi, sj.erdos_renyi_kernel):
        with raises(ValueError, r"`sparsity` must be .* got " + re.escape(str(value))):
            function(PARAMS, value)


@pytest.mark.parametrize("method", ["magnitude_prune", "sparse_evolution", "rigl"])
def test_schedule_outside_its_range(method):
    schedules = {
        "90.0 at step 0": lambda step: 90.0,
        "nan at step 0": lambda step: jnp.nan,
        "-0.5 at step 2": lambda step: -step / 4,
        f"1.0 at {KERNEL} at step 2": {"bias": None, "kernel": lambda step: step / 2},
    }
    if method == "magnitude_prune":  # the others stop at step 9
        schedules["75.0 at step [0-9]+"] = optax.linear_schedule(0, 75, 1000)
    for got, schedule in schedules.items():
        tx = build(method, pattern=sj.Unstructured(), sparsity=schedule, update_every=2)
        for init in (tx.init, jax.jit(tx.init)):
            with raises(ValueError, r"`sparsity` must be .* got " + got):
                init(PARAMS)


SETTINGS = [
    ("rigl", "drop_fraction", lambda step: step * 30.0, "60.0 at step 2"),
    ("mask_decay", "decay", lambda step: 3.0 + step, "3.0 at step 0"),
    ("mask_decay", "decay", optax.linear_schedule(1, -1, 100), "-1.0 at step"),
    ("sr_ste", "decay", lambda step: -5.0, "-5.0 at step 0"),
    ("adams", "l1_decay", lambda step: -1.0 * step, "-9.0 at step 9"),
]


@pytest.mark.parametrize(("method", "name", "schedule", "got"), SETTINGS)
def test_other_schedules_outside_their_range(method, name, schedule, got):
    tx = build(method, **{name: schedule})
    for init in (tx.init, jax.jit(tx.init)):
        with raises(ValueError, f"`{name}` must be .* got {got}"):
            init(PARAMS)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("magnitude_prune", "sparsity"),
        ("rigl", "sparsity"),
        ("mask_decay", "decay"),
        ("sr_ste", "decay"),
        ("adams", "l1_decay"),
    ],
)
def test_schedules_are_checked_in_each_eager_update(method, name):
    more = {} if method == "adams" else {"inner": optax.sgd(0.0)}
    if name == "sparsity":
        more |= {"pattern": sj.Unstructured(), "update_every": 1}
    # ends nowhere, so that only a step of the run can tell
    line = {name: lambda step: jnp.where(step == 2, -75.0, step / 2**25)}
    tx = build(method, **({"pattern": NM} | more), **line)
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(PARAMS, state, PARAMS)
    with raises(ValueError, f"`{name}` must be .* got -75.0 at step 2"):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    "decay",
    [
        lambda step: 1 - step / 100,  # out of range far beyond the run alone
        lambda step: jnp.float32(1) + jnp.float32(1.2e-7),  # by a rounding
    ],
)
def test_schedules_in_their_range_are_taken(decay):
    build("mask_decay", decay=decay).init(PARAMS)


@pytest.mark.parametrize(("decay", "factor"), [(-1.0, 0.0), (3.0, 1.0)])
def test_traced_schedules_are_clipped(decay, factor):
    @jax.jit
    def forward(decay):
        tx = build("mask_decay", decay=lambda step: decay)
        return sj.forward_params(tx.init(PARAMS), PARAMS)["kernel"][0]

    np.testing.assert_array_equal(forward(decay), factor * PARAMS["kernel"][0])


@each_method
def test_sparsity_of_another_kind(method):
    for value in ("0.5", 0.5j, jnp.ones(2)):
        with raises(TypeError, "`sparsity` must be a number", "tree prefix", "got"):
            build(method, pattern=sj.Unstructured(), sparsity=value)


@each_method
def test_sparsity_is_missing(method):
    tx = build(method, pattern=sj.Unstructured())
    with raises(ValueError, "`sparsity` must be given under Unstructured", KERNEL):
        tx.init(PARAMS)
    with raises(ValueError, "`sparsity` must be given under Unstructured", KERNEL):
        sj.prune(PARAMS)


@each_method
def test_sparsity_contradicts_the_pattern(method):
    words = r"under NM\(.*\) the sparsity is 0.5; got 0.9", KERNEL, "Omit `sparsity`"
    for sparsity in (0.9, {"bias": None, "kernel": 0.9}):
        with raises(ValueError, *words):
            build(method, sparsity=sparsity).init(PARAMS)
    build(method, sparsity=0.5).init(PARAMS)


@pytest.mark.parametrize("method", ["magnitude_prune", "sparse_evolution", "rigl"])
def test_schedule_contradicts_the_pattern(method):
    with raises(ValueError, "under NM.* got a schedule", KERNEL):
        build(method, sparsity=lambda step: 0.5).init(PARAMS)


@pytest.mark.parametrize("method", [m for m in suite.METHODS if m not in suite.HARD])
def test_soft_methods_take_no_schedule(method):
    with raises(ValueError, "constant `sparsity`; got a schedule"):
        build(method, pattern=sj.Unstructured(), sparsity=lambda step: 0.5)


@pytest.mark.parametrize("number", [np.float32, np.array, jnp.float32])
def test_a_number_in_an_array_is_one(number):
    with raises(ValueError, r"under NM\(.*\) .* is 0.5; got 0\.(9|8999)", KERNEL):
        build("sr_ste", pattern=sj.NM(2, 4), sparsity=number(0.9)).init(PARAMS)
    tx = build(
        "sr_ste",
        pattern=sj.Unstructured(),
        sparsity=number(0.5),
        allocation=sj.erdos_renyi_kernel,
    )
    state = jax.jit(tx.init)(PARAMS)  # numbers are static there, and in no trace
    forward = sj.forward_params(state, PARAMS)
    assert int((forward["kernel"] != 0).sum()) == PARAMS["kernel"].size // 2


@each_method
def test_sparsity_tree_of_another_structure(method):
    free = sj.Unstructured()
    with raises(ValueError, "`sparsity` must be .* tree prefix", r"\['bias'\]"):
        build(method, pattern=free, sparsity={"kernel": 0.5}).init(PARAMS)
    extra = {"kernel": 0.5, "bias": None, "other": 0.5}
    with raises(ValueError, "entry at other is above no leaf"):
        build(method, pattern=free, sparsity=extra).init(PARAMS)
    with raises(ValueError, "at least one leaf", "None at every"):
        nothing = {"kernel": None, "bias": None}
        build(method, pattern=free, sparsity=nothing).init(PARAMS)


# ------------------------------------------------------------ update and reading


@each_method
def test_update_without_params(method):
    tx = build(method)
    with raises(ValueError, f"`{method}` needs `params` in `update`", "Call `tx.upd"):
        tx.update(PARAMS, tx.init(PARAMS))


OTHER_PARAMS = [
    ({"kernel": PARAMS["kernel"]}, ("2 leaves; got 1 leaves", "Make a new state")),
    (PARAMS | {"more": jnp.ones(2)}, ("2 leaves; got 3 leaves", "Make a new state")),
    (
        {"bias": jnp.ones(4), "kernel": jnp.ones((4, 8))},
        (r"shape \(8, 4\) at", KERNEL, r"\(4, 8\)", "Make a new state"),
    ),
    (
        {"bias": jnp.ones(4), "kernel": None},
        (r"shape \(8, 4\) at", KERNEL, "None", "Make a new state"),
    ),
]


@each_method
@pytest.mark.parametrize(
    ("params", "words"), OTHER_PARAMS, ids=["fewer", "more", "shape", "none"]
)
def test_other_params_than_at_init(method, params, words):
    tx = build(method)
    state = tx.init(PARAMS)
    for update in (tx.update, jax.jit(tx.update)):
        with raises(ValueError, f"`{method}` was initialised", *words):
            update(params, state, params)
    for read in (sj.forward_params, sj.sparse_params):
        with raises(ValueError, f"`{method}` was initialised with"):
            read(state, params)


@each_method
def test_other_gradients_than_params(method):
    tx = build(method)
    state = tx.init(PARAMS)
    with raises(ValueError, "gradients must mirror", "2 leaves; got 1"):
        tx.update({"kernel": PARAMS["kernel"]}, state, PARAMS)
    grads = {"bias": jnp.ones(4), "kernel": jnp.ones((4, 8))}
    with raises(ValueError, r"\(8, 4\) at", KERNEL, r"gradient of shape \(4, 8\)"):
        tx.update(grads, state, PARAMS)


def test_rigl_needs_one_gradient_a_weight():
    tx = build("rigl")
    grads = jax.tree.map(lambda p: jnp.ones((16, *p.shape)), PARAMS)
    words = r"got a gradient of shape \(16, ", r"at \['", "sparse_evolution"
    with raises(ValueError, "RigL grows by the gradient", *words):
        tx.update(grads, tx.init(PARAMS), PARAMS)


@each_method
def test_a_foreign_state(method):
    tx = build(method)
    if method == "adams":  # without the chain around it
        tx = sj.scale_by_adams(10, 1e-3, pattern=NM)
    for state in (ADAM.init(PARAMS), PARAMS, None):
        with raises(TypeError, f"`{method}` needs the state that its `init` returned"):
            tx.update(PARAMS, state, PARAMS)
    other = "sr_ste" if method == "rigl" else "rigl"
    state = suite.find_state(build(other).init(PARAMS))
    if method != other:
        with raises(ValueError, f"`{method}` needs", f"that of `{other}`"):
            tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    "read",
    [
        lambda state: sj.forward_params(state, PARAMS),
        lambda state: sj.sparse_params(state, PARAMS),
        sj.masks_of,
        sj.is_mask_update,
    ],
)
def test_no_state_found(read):
    for state in (ADAM.init(PARAMS), (), {}, PARAMS, None):
        words = "must hold the state of a sparsejax method", "found none", "Wrap the"
        with raises(
            ValueError, *words, "before the params. A checkpoint", "eval_shape"
        ):
            read(state)


def test_a_leaf_governed_twice():
    rigl, ste = build("rigl"), build("sr_ste")
    states = [
        optax.chain(rigl, ste).init(PARAMS),
        build("rigl", inner=ste).init(PARAMS),
        optax.partition(
            {"a": optax.chain(rigl, ste), "b": ADAM},
            {"bias": "b", "kernel": "a"},
        ).init(PARAMS),
    ]
    for state in states:
        words = "governed by one method", KERNEL, "Restrict one by `where`"
        for read in (sj.forward_params, sj.sparse_params):
            with raises(ValueError, *words):
                read(state, PARAMS)
        with raises(ValueError, *words):
            sj.masks_of(state)


# ------------------------------------------------------------ NaN


@each_method
def test_nan_weights_at_init(method):
    words = "`params` must not be NaN; got 1 of 32 NaN at", KERNEL, "Find where"
    with raises(ValueError, *words):
        build(method).init(NAN)
    state = jax.jit(build(method).init)(NAN)  # cannot be seen there: ranks lowest
    assert sj.masks_of(state)["kernel"].sum() == 16


def test_nan_scores():
    scores = NAN["kernel"]
    calls = [
        lambda: sj.nm_mask(scores, 2, 4, 0),
        lambda: sj.topk_mask(scores, 3),
        lambda: sj.block_mask(scores, (2, 2), 3),
        lambda: sj.global_topk(scores, 3),
    ]
    for call in calls:
        with raises(ValueError, "`scores` must not be NaN; got 1 of 32", "Find where"):
            call()
    with raises(ValueError, "got 1 of 32 NaN at", KERNEL):
        sj.global_topk(NAN, 3)
    with raises(ValueError, "`params` must not be NaN", KERNEL):
        sj.prune(NAN, 0.5)


@each_method
def test_non_finite_gradients_do_not_corrupt_masks(method):
    tx = suite.build(method, ADAM)

    @suite.fast_jit
    def step(params, state, value, is_bad):
        grads = jax.tree.map(lambda p: jnp.sin(9 * p), params)
        kernel = grads["first"]["kernel"]
        bad = kernel.at[2].set(value).at[:, 1].set(value)
        grads["first"]["kernel"] = jnp.where(is_bad, bad, kernel)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, sj.masks_of(state), sj.sparse_params(state, params)

    first = suite.fast_jit(tx.init)(suite.make_params())
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        params, state = suite.make_params(), first
        for i in range(4):
            params, state, masks, sparse = step(params, state, value, i < 2)
            for name, mask in suite.flat(masks).items():
                if method != "structure_decay" or i > 0:  # begins dense
                    of_leaf = suite.mixed(None, mask)
                    frame = sj.NM(4, 8) if of_leaf == NM else of_leaf
                    early = method == "structure_decay" and i < 3
                    of_leaf = frame if early else of_leaf
                    suite.check_pattern(mask, mask.shape, of_leaf, name)
                kept = suite.flat(sparse)[name] != 0
                assert kept.sum() <= mask.size // 2


# ------------------------------------------------------------ arguments


@each_wrapping
def test_inner_of_another_kind(method):
    for inner in (None, 1e-3, optax.adam, PARAMS, (ADAM.init, ADAM.update)):
        with raises(TypeError, "`inner` must be an optax optimizer", "got"):
            build(method, inner=inner)


@each_method
def test_where_of_another_kind(method):
    trees = "kernel", {"bias": False, "kernel": "yes"}, 1
    for where in (*trees, lambda path, leaf: None):
        with raises(TypeError, "`where` must be a predicate", "tree prefix of bools"):
            build(method, where=where).init(PARAMS)
    with raises(ValueError, "`where` must be .* tree prefix", r"\['bias'\]"):
        build(method, where={"kernel": True}).init(PARAMS)
    with raises(TypeError, r"must be floating; got int32 at \['kernel'\]"):
        integers = {"kernel": jnp.ones((8, 4), jnp.int32)}
        build(method, where=lambda path, leaf: True).init(integers)
    with raises(TypeError, r"type str at \['kernel'\]. Filter first, .*eqx.filter"):
        build(method).init({"bias": jnp.ones(4), "kernel": "float32"})


@each_method
def test_stacked_of_another_kind(method):
    for stacked in ("1", True):
        with raises(TypeError, "`stacked` must be a Python int", repr(stacked)):
            build(method, stacked=stacked).init(PARAMS)
    for stacked in (-1, 3):
        with raises(ValueError, f"`stacked` must count .* got {stacked}", KERNEL):
            where = {"bias": False, "kernel": True}
            build(method, stacked=stacked, where=where).init(PARAMS)


@each_method
def test_allocation_of_another_kind(method):
    with raises(TypeError, "`allocation` must be a function", "'erk'"):
        build(method, allocation="erk")
    with raises(ValueError, "`allocation` spreads one sparsity", "tree"):
        build(
            method,
            pattern=sj.Unstructured(),
            sparsity={"bias": None, "kernel": 0.5},
            allocation=sj.erdos_renyi,
        )


@pytest.mark.parametrize("method", ["static_sparse", "sparse_evolution", "rigl"])
def test_key_of_another_kind(method):
    keys = [0, np.arange(2), jax.random.split(KEY), "key"]
    for key in keys if method == "static_sparse" else [*keys, None]:
        with raises(TypeError, "`key` must be one random key", "jax.random.key"):
            build(method, key=key)
    build(method, key=jax.random.PRNGKey(0)).init(PARAMS)  # raw keys still work


def sgd(method, **options):
    return lambda: build(method, **options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (sgd("rigl", update_every=0), ValueError, "`update_every` .* least 1; got 0"),
        (
            sgd("rigl", update_every=2.5),
            TypeError,
            "`update_every` .* Python int; got 2.5",
        ),
        (sgd("rigl", stop_step=0), ValueError, "`stop_step` .* at least 1; got 0"),
        (sgd("rigl", stop_step="9"), TypeError, "`stop_step` .* Python int; got '9'"),
        (sgd("rigl", drop_fraction=1.5), ValueError, r"in \[0, 1\]; got 1.5"),
        (sgd("sparse_evolution", update_every=-1), ValueError, "at least 1; got -1"),
        (sgd("magnitude_prune", update_every=0), ValueError, "at least 1; got 0"),
        (sgd("magnitude_prune", update_every=True), TypeError, "int; got True"),
        (sgd("sr_ste", decay=-1), ValueError, "`decay` must be at least 0; got -1"),
        (sgd("mask_decay", decay=1.5), ValueError, r"factor in \[0, 1\]; got 1.5"),
        (sgd("adams", mask_period=0), ValueError, "`mask_period` .* least 1; got 0"),
        (
            lambda: sj.adams(1e-3, 0, 1e-3, pattern=NM),
            ValueError,
            "`total_steps` must be at least 1; got 0",
        ),
        (
            lambda: sj.adams(1e-3, 1e3, 1e-3, pattern=NM),
            TypeError,
            "`total_steps` must be a Python int; got 1000.0",
        ),
        (
            lambda: sj.adams(1e-3, 10, -1e-3, pattern=NM),
            ValueError,
            "`l1_decay` must be at least 0; got -0.001",
        ),
        (
            lambda: sj.structure_decay(ADAM, [NM], [1, 2]),
            ValueError,
            "1 patterns and 2 boundaries",
        ),
        (
            lambda: sj.structure_decay(ADAM, [sj.NM(3, 4), NM], [2, 1]),
            ValueError,
            r"`boundaries` must not decrease; got \(2, 1\)",
        ),
        (
            lambda: sj.structure_decay(ADAM, [], []),
            ValueError,
            "0 patterns and 0 boundaries",
        ),
    ],
)
def test_numbers(make, error, words):
    with raises(error, words):
        make()


def test_traced_counts_name_static_args():
    static = "inner", "sparsity", "pattern", "stacked", "allocation", "pack_masks"
    inject = optax.inject_hyperparams(sj.magnitude_prune, static_args=static)
    tx = inject(ADAM, 0.5, update_every=10)
    with raises(TypeError, "`update_every` must be a Python int", "static_args"):
        tx.init(PARAMS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_adams_needs_float32(dtype):
    params = {"bias": jnp.ones(4, dtype), "kernel": jnp.ones((8, 4), dtype)}
    words = f"got {jnp.dtype(dtype).name} at", KERNEL, "Keep float32 master weights"
    with raises(TypeError, "AdamS needs float32", *words):
        build("adams").init(params)
    params["kernel"] = jnp.ones((8, 4))  # a narrow leaf that is not governed is fine
    build("adams").init(params)


def brought(masks):
    return sj.static_sparse(ADAM, masks=masks).init(PARAMS)


def test_masks_that_do_not_fit():
    bias = {"bias": None}
    with raises(ValueError, "must be bool", r"got float32 \(8, 4\) at", KERNEL):
        brought({"kernel": jnp.ones((8, 4))} | bias)
    with raises(ValueError, r"leaf's shape \(8, 4\); got bool \(4, 8\) at", KERNEL):
        brought({"kernel": jnp.ones((4, 8), bool)} | bias)
    with raises(ValueError, "`masks` must be .* tree prefix", r"\['bias'\]"):
        brought({"kernel": jnp.ones((8, 4), bool)})
    with raises(ValueError, "at least one leaf must be governed"):
        brought({"kernel": None} | bias)
    for arguments in ({}, {"sparsity": 0.5}, {"masks": bias, "key": KEY}):
        with raises(ValueError, "exactly one of `masks` and `sparsity` with `key`"):
            sj.static_sparse(ADAM, **arguments)


def test_nothing_is_computed_before_an_error():
    """A leaf too large for any machine: only its shape may be looked at."""
    huge = {"kernel": jax.ShapeDtypeStruct((2**20, 2**30 + 1), jnp.float32)}
    with raises(ValueError, "`m` must divide"):
        build("sr_ste", pattern=sj.NM(2, 4, axis=-1)).init(huge)

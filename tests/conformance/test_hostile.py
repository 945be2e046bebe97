"""Hostile and odd input: exact counts, or a documented error and no other.

A small, fixed budget here; `--hypothesis-profile=explore` draws new cases and more of
them, `benchmarks/fuzz.py` many thousands. What was found is a test at the end.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import sparsejax as sj
from tests.conformance import hostile, suite

_EXPLORES = settings().max_examples > settings.get_profile("sparsejax").max_examples
# a few programs in CI: each shape and dtype is a compilation
_FEW = {"shapes": hostile.VALUE_SHAPES[:4], "dtypes": ["float32"]}


def budget(max_examples):
    """Examples of a test in CI, ten times as many where new ones are looked for."""
    return settings(max_examples=max_examples * (10 if _EXPLORES else 1))


@pytest.fixture(autouse=True)
def _whole_tracebacks():
    """Without jax's frames it could not be seen whose error it was."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


@budget(100)
@given(hostile.init_cases())
def test_init(case):
    hostile.check_init(case)


@budget(12)
@given(hostile.init_cases())
def test_init_and_update(case):
    hostile.check_init(case, update=True)


@budget(100)
@given(hostile.later_cases)
def test_other_trees_than_at_init(case):
    hostile.check_later(case)


@budget(200)
@given(hostile.argument_cases())
def test_any_object_as_an_argument(case):
    hostile.check_argument(case)


@budget(60)
@given(hostile.value_cases() if _EXPLORES else hostile.value_cases(**_FEW))
def test_any_bits_as_scores(case):
    hostile.check_values(case)


# ---------------------------------------------------------------- found by these

PARAMS = {"kernel": jnp.ones((8, 4))}
SGD = optax.sgd(0.1)
EVERY = {"update_every": 2, "stop_step": 9, "key": suite.KEY}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sj.prune(PARAMS, 0.5, stacked=None), r"`stacked` .* got None at \['k"),
        (lambda: sj.prune(PARAMS, 0.5, where=object), "`where` must be .* 'object'"),
        (lambda: sj.prune(PARAMS, object), "`sparsity` must be .* 'object'"),
        (
            lambda: sj.prune(PARAMS, 0.5, allocation=object),
            "`allocation` must be .* 'object'",
        ),
        (
            lambda: sj.sr_ste(SGD, pattern=sj.NM(2, 4), decay=None),
            "`decay` must be a number .* None",
        ),
        (
            lambda: sj.mask_decay(SGD, "0.5", pattern=sj.NM(2, 4)),
            "`decay` must be a number .* '0.5'",
        ),
        (
            lambda: sj.adams(0.1, 9, [0.1], pattern=sj.NM(2, 4)),
            r"`l1_decay` must be a number .* \[0.1\]",
        ),
        (
            lambda: sj.rigl(SGD, 0.5, drop_fraction="0.3", **EVERY),
            "`drop_fraction` must be a number .* '0.3'",
        ),
        (
            lambda: sj.structure_decay(SGD, sj.NM(2, 4), [1]),
            "`patterns` must hold one entry a frame; got NM",
        ),
        (
            lambda: sj.structure_decay(SGD, [sj.NM(2, 4)], ["1"]),
            "`boundaries` must be a Python int; got '1'",
        ),
    ],
)
def test_arguments_of_another_kind(make, words):
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_numbers_that_are_none(value):
    with pytest.raises(ValueError, match="`decay` must be at least 0; got"):
        sj.sr_ste(SGD, pattern=sj.NM(2, 4), decay=value)


@pytest.mark.parametrize("method", ["rigl", "sr_ste", "adams"])
def test_a_scalar_cannot_be_packed(method):
    tx = hostile.Case(method, {}, sj.Unstructured(), 0.5, 0, True, True).make()
    with pytest.raises(ValueError, match=r"`pack_masks` .* got shape \(\) at the root"):
        tx.init(jnp.ones(()))


@pytest.mark.parametrize("method", suite.METHODS)
def test_shapes_without_values(method):
    """optax makes zeros of a `ShapeDtypeStruct`; masks need the weights."""
    tx = suite.build(method, SGD, pattern=suite.two_four)
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    words = r"`params` must be arrays; got Shape.* at \['kernel'\].*jax.eval_shape"
    with pytest.raises(TypeError, match=words):
        tx.init(shapes)
    state = suite.find_state(jax.eval_shape(tx.init, shapes))
    assert state.masks["kernel"].shape == (8, 4)


def test_a_bare_array_has_a_name():
    with pytest.raises(ValueError, match=r"`m` must divide .* leaf the root"):
        sj.prune(jnp.ones((8, 6)), pattern=sj.NM(2, 4, axis=-1))


@pytest.mark.parametrize("method", suite.METHODS)
def test_a_governed_leaf_without_a_gradient(method):
    tx = suite.build(method, SGD, pattern=suite.two_four)
    words = r"`\w+` needs a gradient .* got None at \['kernel'\]"
    with pytest.raises(ValueError, match=words):
        state = jax.eval_shape(tx.init, PARAMS)
        jax.eval_shape(tx.update, {"kernel": None}, state, PARAMS)


@pytest.mark.parametrize("method", suite.METHODS)
def test_a_leaf_of_whole_numbers(method):
    """Adam's moments of it would be floats from the first update on: a retrace."""
    params = PARAMS | {"table": jnp.arange(3)}
    tx = suite.build(method, optax.adam(0.1), pattern=suite.two_four)
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert suite.spec(after) == suite.spec(state)

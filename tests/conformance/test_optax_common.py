"""The common tests that optax ships for its own optimizers, run over our methods.

The bodies of the tests are optax's, from the installed wheel; the cases are ours. Their
params are scalars' worth of weights, so every leaf is governed. Where optax waits for
convergence to a dense optimum nothing is pruned: a method must then reach it as its
inner optimizer does.
"""

import functools
import inspect
import os
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import sparsejax as sj
from tests.conformance import suite

common = pytest.importorskip(
    "optax.contrib._common_test", reason="this optax ships no tests"
)
float64 = pytest.importorskip("optax._src.float64_test")


def _import_sharding():
    """On import the module sets XLA_FLAGS and makes an optimizer that warns."""
    flags = os.environ.get("XLA_FLAGS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("optax._src.sharding_test")
    if flags is None:
        os.environ.pop("XLA_FLAGS", None)
    else:
        os.environ["XLA_FLAGS"] = flags
    return module


sharding = _import_sharding()


def body(case, name):
    """A test of optax's, bound, without the cases that optax runs it on."""
    for attribute in dir(case):
        found = inspect.unwrap(getattr(type(case), attribute, None))
        if getattr(found, "__name__", None) == name and attribute != name:
            return functools.partial(found, case)
    raise LookupError(f"optax has no test {name} any more")


def factory(method, sparsity=0.5):
    """The method around Adam, as a function of the learning rate."""

    def make(learning_rate):
        pattern = lambda path, leaf: sj.Unstructured()  # noqa: E731
        everywhere = lambda path, leaf: True  # noqa: E731
        inner = optax.adam(learning_rate)
        options = {"pattern": pattern, "where": everywhere}
        if method == "adams":
            options |= {"sparsity": sparsity, "mask_period": 2}
            return sj.adams(learning_rate, 20, 1e-2, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(suite, "SPARSITY", sparsity)
            return suite.build(method, inner, **options)

    return make


def in_turn(*methods):
    """A test meets some of the methods, and each method several tests."""
    return pytest.mark.parametrize("method", methods)


EVEN, ODD = list(suite.METHODS)[::2], list(suite.METHODS)[1::2]


@pytest.fixture
def contrib(monkeypatch):
    """Runs a common test on one of our methods."""

    def run(name, make, learning_rate=1e-2, **options):
        monkeypatch.setattr(common, "_get_opt_factory", lambda _: make)
        case = common.ContribTest()
        kwargs = {"learning_rate": learning_rate}
        wrapper = {"wrapper_name": None, "wrapper_kwargs": None}
        body(case, name)("ours", kwargs, **wrapper, **options)

    return run


@in_turn(*EVEN)
def test_extra_args_and_one_compilation(contrib, method):
    contrib("test_optimizers_accept_extra_args", factory(method), wrap=False)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("static_sparse", "matrix_parabola"),
        ("magnitude_prune", "parabola"),
        ("sparse_evolution", "mixed_tensor_target"),
        ("sr_ste", "rosenbrock"),
        ("mask_decay", "parabola"),
        ("adams", "matrix_parabola"),
    ],
)
def test_converges(contrib, monkeypatch, method, target):
    # optax first maps over a state without params: see the next test
    monkeypatch.setattr(optax.tree, "map_params", lambda tx, fn, state: state)
    target = getattr(common, f"_setup_{target}")
    make = factory(method, sparsity=0.0)
    contrib("test_optimizers", make, 1e-1, target=target, dtype="float32")


@in_turn(*suite.METHODS)
def test_map_params_says_what_to_do_instead(method):
    """`optax.tree.map_params` calls `init` with a placeholder; map by paths instead."""
    tx = optax.chain(optax.clip(1.0), factory(method)(1e-2))
    state = tx.init({"kernel": jnp.ones((4, 2))})
    with pytest.raises(TypeError, match=f"`{method}`.* `jax.tree_util.tree_map_with_"):
        optax.tree.map_params(tx, lambda leaf: leaf, state)


@in_turn("rigl", "adams")
def test_inside_inject_hyperparams(contrib, method):
    contrib("test_optimizers_can_be_wrapped_in_inject_hyperparams", factory(method))


@in_turn(*EVEN)
def test_preserves_dtype(contrib, method):
    contrib("test_preserve_dtype", factory(method), dtype="bfloat16")


@in_turn(*ODD)
def test_gradient_accumulation(contrib, method):
    contrib("test_gradient_accumulation", factory(method), dtype="float32")


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("magnitude_prune", jnp.float16),
        ("rigl", jnp.bfloat16),
        ("structure_decay", jnp.float64),
        ("adams", jnp.float32),
    ],
)
def test_types_of_the_state_are_stable(contrib, method, dtype):
    contrib("test_state_shape_dtype_shard_stability", factory(method), dtype=dtype)


@in_turn("sparse_evolution", "sr_ste", "adams")
def test_mixed_dtypes(method):
    try:
        case = float64.Float64Test()
        kwargs = {"learning_rate": 1e-2}
        body(case, "test_mixed_dtype_input_outputs")(factory(method), kwargs)
    finally:  # optax's test leaves it on if it fails
        jax.config.update("jax_enable_x64", False)


@pytest.fixture
def run_sharding(monkeypatch):
    """Runs a sharding test; its params are float16, which AdamS refuses."""

    def run(name, method):
        # optax compares versions as strings, and would skip 0.10 as older than 0.7
        monkeypatch.setattr(jax, "__version__", "1.0.0")
        body(sharding.ShardingTest(), name)(factory(method)(1e-2))

    return run


@in_turn(*(name for name in ODD if name != "adams"))
def test_types_on_an_explicit_mesh(run_sharding, method):
    run_sharding("test_state_sharding_type_preserved_with_jit", method)


@in_turn(*(name for name in EVEN if name != "adams"))
def test_update_keeps_types_on_an_explicit_mesh(run_sharding, method):
    run_sharding("test_state_sharding_type_init_match_update", method)

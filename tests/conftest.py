"""What every test shares."""

import collections
import gc
import importlib.metadata
import inspect
import itertools
import os
import threading
import zlib

import chex
import flax
import hypothesis
import jax
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir

# No deadline: a first example compiles. Derandomized: a run repeats exactly; look for
# new examples by `pytest --hypothesis-profile=explore`.
_COMMON = dict(
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("sparsejax", derandomize=True, **_COMMON)
hypothesis.settings.register_profile("explore", max_examples=500, **_COMMON)
hypothesis.settings.load_profile("sparsejax")

_DEVICE_MARKS = ("gpu", "tpu")

# On the CPU the tests are mostly compilation: LLVM does not optimize and does not split
# programs over threads. XLA's own passes all run. Flags of the caller's XLA_FLAGS win.
_COMPILE_FAST = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_parallel_codegen_split_count": "1",
}
# jaxlib 0.10 compiles twice as fast by its older emitter; newer ones do not know the
# flag, and have the newer emitter tested.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _COMPILE_FAST["xla_cpu_use_fusion_emitters"] = "false"


def lower_in_one_context():
    """Lowers ten programs in a row in one MLIR context, as jax does from 0.12 on.

    jax 0.10 makes a context for each: of a small program that is most of lowering. What
    is lowered while another program is gets one of its own.
    """
    if hasattr(mlir, "_thread_local_context"):
        return
    new_context, here = mlir.make_ir_context, threading.local()

    def contexts():
        while True:
            yield from itertools.repeat(new_context(), 10)

    def make_ir_context():
        if ir.Context.current is not None:
            return new_context()
        if not hasattr(here, "contexts"):
            here.contexts = contexts()
        return next(here.contexts)

    mlir.make_ir_context = make_ir_context


def pytest_addoption(parser):
    """For a second run, on another jax, of what a first did in full."""
    parser.addoption(
        "--one-in",
        type=int,
        default=1,
        metavar="N",
        help="of the cases of each test do one in N, at least one, always the same",
    )


def pytest_configure(config):
    """Runs on the CPU also where there is an accelerator, unless asked by `-m`."""
    # Eight virtual CPU devices, so that meshes and shardings are tested everywhere.
    flags = {"xla_force_host_platform_device_count": "8"}
    if (
        config.option.markexpr not in _DEVICE_MARKS
        and "JAX_PLATFORMS" not in os.environ
    ):
        jax.config.update("jax_platforms", "cpu")
        flags |= _COMPILE_FAST
        lower_in_one_context()
        # where in the sources an operation comes from: no test reads it
        jax.config.update("jax_traceback_in_locations_limit", 0)
    given = os.environ.get("XLA_FLAGS", "")
    added = [f"--{name}={flags[name]}" for name in flags if name not in given]
    # read when the first device is asked for; processes that tests start inherit it
    os.environ["XLA_FLAGS"] = " ".join([*added, given]).strip()


@pytest.hookimpl(trylast=True)  # of what `-m` and `-k` left
def pytest_collection_modifyitems(config, items):
    """Leaves out cases as `--one-in` says, and begins with the slow tests.

    Cases are drawn by name: every second of a product would be of the same values. What
    some other jax skips is done in full. A slow test that began last would leave the
    other workers idle.
    """
    if config.option.one_in < 1:
        raise pytest.UsageError(f"--one-in must be at least 1: {config.option.one_in}")
    cases = collections.defaultdict(list)
    for item in items:  # absl wraps one function for each case
        cases[item.parent.nodeid, inspect.unwrap(item.function)].append(item)
    done = set()
    for of_test in cases.values():
        of_test.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        done.update(of_test[: -(-len(of_test) // config.option.one_in)])
        done.update(item for item in of_test if item.get_closest_marker("skipif"))
    config.hook.pytest_deselected(items=[item for item in items if item not in done])
    items[:] = [item for item in items if item in done]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish(session):
    """Modules stay: the garbage collector need not visit them again and again.

    Nor what jax keeps of each program: it looks for garbage less often.
    """
    del session
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def pytest_report_header(config):
    """Names the versions under test."""
    return f"jax {jax.__version__}, flax {flax.__version__}"


def pytest_runtest_setup(item):
    """Skips a test whose device is not there."""
    for mark in _DEVICE_MARKS:
        if item.get_closest_marker(mark) and jax.default_backend() != mark:
            pytest.skip(f"needs a {mark}; the backend is {jax.default_backend()}")


@pytest.fixture(autouse=True)
def _clear_trace_counter():
    """Without it, `chex.assert_max_traces` counts on from one case to the next."""
    chex.clear_trace_counter()


@pytest.fixture
def compile_fast():
    """Leaves out XLA's own passes too: nearly all of a tiny test is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

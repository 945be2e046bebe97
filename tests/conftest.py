"""What every test shares. The environment is set before jax is first imported."""

import importlib.metadata
import os

# Eight virtual CPU devices, so that meshes and shardings are tested everywhere.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# The tests are mostly compilation. jaxlib 0.10 compiles twice as fast by its older
# emitter; newer ones do not know the flag, and have the newer emitter tested.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import chex
import flax
import hypothesis
import jax
import pytest

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


def pytest_configure(config):
    """Runs on the CPU also where there is an accelerator, unless asked by `-m`."""
    asked = config.option.markexpr in _DEVICE_MARKS or "JAX_PLATFORMS" in os.environ
    if not asked:
        jax.config.update("jax_platforms", "cpu")


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

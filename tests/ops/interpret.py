"""How the tests run kernels for TPU and for Hopper on a CPU."""

import contextlib
import io

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from sparsejax import _compat

needs_gpu_interpreter = pytest.mark.skipif(
    not _compat.can_interpret_mosaic_gpu(plgpu),
    reason="this jax cannot run Mosaic GPU kernels on a CPU",
)


def gpu_interpreted():
    """Runs the kernels for Hopper on a CPU; a race is an error."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    return plgpu.force_gpu_interpret_mode(params)


@contextlib.contextmanager
def interpreted():
    """Runs the kernels on a CPU; a race, which is printed only, is an error."""
    params = pltpu.InterpretParams(detect_races=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        with pltpu.force_tpu_interpret_mode(params):
            yield
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()

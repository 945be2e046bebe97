"""How the tests run kernels for TPU on a CPU."""

import contextlib
import io

from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def interpreted():
    """Runs the kernels on a CPU; a race, which is printed only, is an error."""
    params = pltpu.InterpretParams(detect_races=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        with pltpu.force_tpu_interpret_mode(params):
            yield
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()

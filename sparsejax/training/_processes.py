"""Several processes: the first writes what all share, and all decide alike.

With one process, which is how most runs are, none of these talks to anyone.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process writes the files of which there is one for all."""
    return jax.process_index() == 0


def wait_for_all(place: str) -> None:
    """Goes on when every process is at this place of the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def all_say(yes: bool) -> bool:
    """Whether `yes` is true in every process."""
    if jax.process_count() == 1:
        return yes
    return bool(np.all(multihost_utils.process_allgather(np.bool_(yes))))


def as_first_says(value: int) -> int:
    """The first process's `value`, which fits in int32."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def asked_to_stop(step: int) -> bool:
    """Whether one of several processes got SIGTERM; all hear of it at the same step.

    Asked at every step. It costs no communication until a signal comes: JAX listens
    for it in the background.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
        step
    )

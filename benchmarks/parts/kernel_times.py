"""Where the time of a program goes on a GPU, by JAX's profiler."""

import collections
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax


def kernel_ms(fn: Callable[[], Any], *, calls: int = 3) -> dict[str, float]:
    """Runs a function that has run before, and gives the time of each kernel it starts.

    Args:
      fn: without arguments.
      calls: to take the mean of.

    Returns:
      Milliseconds of one call by the kernel's name, the longest first; without a GPU
      nothing.
    """
    times, _ = _kernels(fn, calls)
    return dict(times.most_common())


def longest(fn: Callable[[], Any], *, units: int = 1, most: int = 8) -> str:
    """Which kernels take a function's time, in words; without a GPU nothing.

    Args:
      fn: as in `kernel_ms`.
      units: of work in one call, as tokens; what is told is of one.
      most: kernels that are told apart, by name.
    """
    times, numbers = _kernels(fn, calls=3)
    told = [
        f"{name} {1e3 * ms / units:.1f} us in {numbers[name] / units:g}"
        for name, ms in times.most_common(most)
    ]
    if not told:
        return ""
    total = f"{times.total() / units:.3f} ms in {numbers.total() / units:g} kernels"
    return f"{total}: {', '.join(told)}"


def _kernels(fn, calls: int) -> tuple[collections.Counter, collections.Counter]:
    """Milliseconds, and how often it ran, of each kernel in one call."""
    times: collections.Counter = collections.Counter()
    numbers: collections.Counter = collections.Counter()
    if jax.default_backend() != "gpu":
        return times, numbers
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = fn()
            jax.block_until_ready(out)
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    for plane in profile.planes:
        for line in plane.lines if "/device:GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                times[event.name] += event.duration_ns / 1e6 / calls
                numbers[event.name] += 1 / calls
    return times, numbers


def grouped(times: dict[str, float], groups: dict[str, tuple[str, ...]]) -> dict:
    """Adds up the kernels of each group, and of none as "others".

    Args:
      times: from `kernel_ms`.
      groups: words of a kernel's name, by group; the first group that has one counts.

    Returns:
      Milliseconds by group.
    """
    found = dict.fromkeys((*groups, "others"), 0.0)
    for name, ms in times.items():
        of_kernel = (g for g, words in groups.items() if any(w in name for w in words))
        found[next(of_kernel, "others")] += ms
    return found

"""How long functions take: side by side, in a loop, many calls in a row."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parts import common


def time_ms(
    fn: Callable[..., Any], *args: Any, repeats: int, sample_ms: float = 2.0
) -> tuple[float, float]:
    """Times one call of `fn(*args)`, results awaited.

    Two calls warm up (compilation, caches). A sample is as many calls in a row as take
    about `sample_ms`, awaited together, so that the launch of a short kernel does not
    count as its work. `fn` must not donate `args`.

    Returns:
      The median and the interquartile range over `repeats` samples, ms per call.
    """
    call = functools.partial(fn, *args)
    _sample_ms(call, 1)
    calls = _calls(_sample_ms(call, 1)[0], sample_ms)
    low, median, high = np.percentile(
        [_sample_ms(call, calls)[0] for _ in range(repeats)], [25, 50, 75]
    )
    return float(median), float(high - low)


@dataclasses.dataclass(frozen=True)
class Time:
    """Of one unit of work, ms: median, interquartile range, least.

    `cpu_ms` and `min_cpu_ms` are the time of all threads of the process, median and
    least.
    """

    ms: float
    iqr_ms: float
    min_ms: float
    cpu_ms: float
    min_cpu_ms: float


def time_in_turn(
    fns: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    units: int = 1,
    sample_ms: float = 20.0,
) -> dict[str, Time]:
    """Times functions side by side, so that a busy or a warm machine slows all alike.

    Two calls of each warm up, and progress is printed. Then come `repeats` rounds; in
    each, every function gives one sample: as many calls in a row as take about
    `sample_ms`, results awaited together.

    Args:
      fns: by name; without arguments.
      repeats: rounds.
      units: of work in one call, as layers or tokens; times are of one.
      sample_ms: least length of a sample.

    Returns:
      The times, by name.
    """
    calls = {}
    for name, fn in fns.items():
        first, again = _sample_ms(fn, 1)[0], _sample_ms(fn, 1)[0]
        print(f"  {name}: {first:.0f} ms, then {again:.4g} ms", flush=True)
        calls[name] = _calls(again, sample_ms)
    samples = {name: [] for name in fns}
    for _ in range(repeats):
        for name, fn in fns.items():
            samples[name].append(_sample_ms(fn, calls[name]) / units)
    times = {}
    for name, found in samples.items():
        wall, cpu = np.array(found).T
        low, median, high = np.percentile(wall, [25, 50, 75])
        values = (median, high - low, wall.min(), np.median(cpu), cpu.min())
        times[name] = Time(*map(float, values))
    return times


def _sample_ms(fn: Callable[[], Any], calls: int) -> np.ndarray:
    """Wall time and the time of all threads of one of `calls` calls in a row, ms."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        out = fn()
    jax.block_until_ready(out)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return np.array([wall, cpu]) * 1e3 / calls


def _calls(call_ms: float, sample_ms: float) -> int:
    """How many calls of that time make a sample."""
    return min(1000, math.ceil(sample_ms / max(call_ms, 1e-3)))


def side_by_side(
    fn: Callable[[Any], Any], cases: Iterable[Any], *, threads: int | None = None
) -> list[Any]:
    """`fn(case)` for each, in threads: what compiles leaves Python to others.

    Args:
      fn: takes a case.
      cases: any number of them.
      threads: None for as many as `concurrent.futures` takes.
    """
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(fn, cases))


_TUNING = threading.Lock()


def compile_alone(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles, on a GPU one program at a time, whatever other threads lower meanwhile.

    XLA chooses there among the kernels of a product by timing them. Threads that do so
    at once hold each other up until timers run out, which may last and spoils the
    choice (https://github.com/openxla/xla/pull/42415).
    """
    on_gpu = jax.default_backend() == "gpu"
    with _TUNING if on_gpu else contextlib.nullcontext():
        return lowered.compile()


def warm_up(fns: Iterable[Callable[[], Any]]) -> None:
    """Runs each function once, so that they are compiled side by side."""
    side_by_side(lambda fn: jax.block_until_ready(fn()), fns)


def compile_side_by_side(
    fns: Mapping[str, Callable[..., Any]],
    *args: Any,
    refused: tuple[type[Exception], ...] = (),
) -> dict[str, Callable[..., Any]]:
    """Compiles jitted functions in threads, for arguments of the same shapes.

    Args:
      fns: by name.
      *args: of each.
      refused: errors that mean that a function cannot be had; it is left out, and the
        error's first line is printed.

    Returns:
      The compiled functions, by name.
    """

    def build(fn):
        try:
            return compile_alone(fn.lower(*args))
        except refused as error:
            return str(error).splitlines()[0][:100]

    found = dict(zip(fns, side_by_side(build, fns.values()), strict=True))
    for name, problem in found.items():
        if isinstance(problem, str):
            print(f"  {name}: left out: {problem}", flush=True)
    return {name: call for name, call in found.items() if not isinstance(call, str)}


def time_variants(
    fns: Mapping[str, Callable[..., Any]],
    arguments: Mapping[Any, tuple[Any, ...]],
    *,
    repeats: int,
    tolerance: float,
) -> dict[Any, dict[str, Time]]:
    """Times several ways to compute the same, each on several arguments.

    Args:
      fns: jitted, by name. One that cannot be had, as its tiles do not fit into shared
        memory, is left out.
      arguments: by label, all of the same shapes.
      repeats: as in `time_in_turn`.
      tolerance: how much the first result of each may differ from that of the first
        function, as `relative_error`.

    Returns:
      The times, by label, then by name.
    """
    refused = (ValueError, jax.errors.JaxRuntimeError)
    compiled = compile_side_by_side(
        fns, *next(iter(arguments.values())), refused=refused
    )
    times = {}
    for label, args in arguments.items():
        want, calls = None, {}
        for name, fn in compiled.items():
            got = jax.tree.leaves(fn(*args))[0]
            want = got if want is None else want
            error = common.relative_error(got, want)
            assert error < tolerance, (label, name, error)
            calls[name] = functools.partial(fn, *args)
        times[label] = time_in_turn(calls, repeats=repeats)
    return times


def for_each(fn: Callable[..., Any]) -> Callable[..., list[Any]]:
    """One program that applies `fn` to each of a list, with what they share.

    So what Python takes for a call counts once for all of them.

    Args:
      fn: takes one element, a tuple of arguments or an array, then the others.

    Returns:
      A jitted function of the list and the others.
    """

    def together(elements, *others):
        return [
            fn(*(element if isinstance(element, tuple) else (element,)), *others)
            for element in elements
        ]

    return jax.jit(together)


def in_a_loop(
    layer: Callable[..., Any], *, tokens: int
) -> Callable[[Any, Sequence[tuple[Any, ...]]], Any]:
    """One program that takes some tokens through layers, as a loop of decoding does.

    Its buffers stay where they are: where those of a kernel move, as a program's own
    results do, XLA on a GPU records the kernel's call anew.

    Args:
      layer: takes what the layer before gave, and what it has itself.
      tokens: how many.

    Returns:
      A jitted function of the first input and of what each layer has, a tuple each.
    """

    def run(x, layers):
        def token(_, x):
            return functools.reduce(lambda x, has: layer(x, *has), layers, x)

        return jax.lax.fori_loop(0, tokens, token, x)

    return jax.jit(run)


def built_in_a_loop(build: Callable[..., Any], *, times: int) -> Callable[..., Any]:
    """One program that builds a mask some times, as a program that uses it does.

    Args:
      build: takes a bool that is False, which the compiler cannot know, and what it
        builds from; must use both. Gives a mask or its lists, first how long they are.
      times: how often.

    Returns:
      A jitted function of what it builds from.
    """

    def run(*args):
        def again(_, built):
            lengths = jax.tree.leaves(built)[0]
            return build(lengths.reshape(-1)[0] < 0, *args)

        return jax.lax.fori_loop(0, times, again, build(jnp.bool_(False), *args))

    return jax.jit(run)

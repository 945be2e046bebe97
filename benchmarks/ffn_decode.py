"""How fast is a decode step of an FFN that reads only the rows of active neurons?

First the up and the down projection alone, with the active neurons given: the dense
products, a gather of the rows, the loop of `ops.active_ffn` and its kernel, and
`found`, the kernel of `ops.gated_ffn`, which finds them itself by the gate; over the
share of active neurons and the batch. Then a whole Spark FFN, which finds its neurons
by a predictor and a statistical threshold, against a dense gated FFN of as many
parameters, in the fastest of its forms. Times are of one layer; several layers with
weights of their own come one after the other, on a GPU in a loop, as decoding takes
them, so that no cache holds them. The forms take turns, so that a busy machine slows
all alike. On a CPU, `cpu_ms` is the time of all threads, those included that spin a
while after a dense product.
"""

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parts import common, ffn_layers, kernel_times, timing
from benchmarks.parts.ffn_layers import Case, Size
from sparsejax import ops

BATCHES = (1, 2, 4, 8)
DENSITIES = (0.02, 0.05, 0.08, 0.16, 0.33, 0.5)
CASES = [Case(*c) for c in itertools.product(BATCHES, DENSITIES)]
QUICK = [Case(*c) for c in itertools.product((1, 2), (0.08, 0.5))]


def size_here(quick: bool) -> Size:
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    if quick:
        return Size(512, 2048, 2, dtype)
    return Size(4096, 32768, 8 if dtype == "bfloat16" else 2, dtype)


@functools.cache  # a form that takes no list of neurons compiles once for a batch
def chain(layer_form):
    """All layers in turn, each added to the residual stream; on a GPU some tokens."""

    def layer(h, has):
        return ((h + layer_form(has, h)) * 0.5**0.5).astype(h.dtype)

    return timing.in_a_loop(layer, tokens=num_tokens())


one_layer = functools.cache(jax.jit)


def num_tokens() -> int:
    """What a program starts with and ends with counts on a GPU."""
    return 4 if jax.default_backend() == "gpu" else 1


def check(name, got, want, dtype) -> None:
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    error = np.abs(got - want).max() / np.abs(want).max()
    limit = 1e-5 if dtype == "float32" else 3e-2
    assert error < limit, f"{name} is off by {error:.1e} of the largest value"


def measure(groups, layers, h, dtype, repeats):
    """Checks that the forms of a group agree in the first layer, then times all.

    Args:
      groups: each of forms `(layer, h)` by name.
      layers: what the forms take.
      h: the residual stream.
      dtype: of the weights.
      repeats: as in `timing.time_in_turn`.

    Returns:
      The times of a layer, and what was timed, both by name.
    """
    calls = {}
    for forms in groups:
        found = {name: one_layer(form)(layers[0], h) for name, form in forms.items()}
        want = next(iter(found.values()))
        for name, got in found.items():
            check(name, got, want, dtype)
            has = [(layer,) for layer in layers]
            calls[name] = functools.partial(chain(forms[name]), h, has)
    timing.warm_up(calls.values())
    units = len(layers) * num_tokens()
    return timing.time_in_turn(calls, repeats=repeats, units=units), calls


def best_of(times, names):
    return min(names, key=lambda name: times[name].ms)


def columns_of(times) -> dict:
    fields = [field.name for field in dataclasses.fields(timing.Time)]
    return {
        f"{name}_{field}": getattr(of_form, field)
        for name, of_form in times.items()
        for field in fields
    }


def run_given(forms, layers, size: Size, case: Case, repeats: int) -> dict:
    """One row; `forms` as from `given_forms`."""
    layers = ffn_layers.with_active(layers, size, case)
    h = jax.random.normal(jax.random.key(1), (case.batch, size.d_model), size.dtype)
    dense, ours = forms
    times, _ = measure([dense | ours], layers, h, size.dtype, repeats)
    dense_name = best_of(times, dense)
    ours_name = best_of(times, ours)
    num_bytes = 2 * size.d_model * size.d_ff * jnp.dtype(size.dtype).itemsize
    active_bytes = num_bytes * int(layers[0]["num_active"]) / size.d_ff
    return (
        {"part": "given neurons", **dataclasses.asdict(case)}
        | columns_of(times)
        | {
            "dense_ms": times[dense_name].ms,
            "dense_gb_per_s": num_bytes / times[dense_name].ms / 1e6,
            "best": ours_name,
            "best_gb_per_s": active_bytes / times[ours_name].ms / 1e6,
            "speedup": times[dense_name].ms / times[ours_name].ms,
            "speedup_of_minima": min(times[name].min_ms for name in dense)
            / times[ours_name].min_ms,
            "ideal": 1 / case.density,
        }
    )


def run_spark(layers, size: Size, batch: int, repeats: int) -> dict:
    h = jax.random.normal(jax.random.key(1), (batch, size.d_model), size.dtype)
    union = 1 - (1 - ffn_layers.SPARK_DENSITY) ** batch
    capacity = min(size.d_ff, math.ceil(ffn_layers.SPARE * union * size.d_ff))
    first = jax.jit(ffn_layers.spark_gate)(layers[0], h)
    active = jnp.any(first > 0, axis=0)
    ours = {
        name: functools.partial(
            ffn_layers.spark_form,
            implementation=by,
            capacity=size.d_ff if ffn_layers.room_of(by) == "all" else capacity,
        )
        for name, by in ffn_layers.implementations().items()
    }
    gated = {
        f"gated_{by}": functools.partial(ffn_layers.gated_form, by=by)
        for by in ffn_layers.BY
    }
    if batch == 1:
        gated |= {
            f"gated_twice_{by}": functools.partial(ffn_layers.gated_twice_form, by=by)
            for by in ffn_layers.BY
        }
    groups = [{"spark_dense": ffn_layers.spark_dense_form} | ours, gated]
    times, calls = measure(groups, layers, h, size.dtype, repeats)
    fastest = best_of(times, ours)
    units = size.num_layers * num_tokens()
    if told := kernel_times.longest(calls[fastest], units=units):
        print(f"  {fastest}, a layer: {told}")
    listing = jax.jit(functools.partial(ops.active_indices, capacity=capacity))
    listing_time = timing.time_in_turn(
        {"indices": lambda: listing(active)}, repeats=repeats
    )["indices"]
    gated_name, ours_name = best_of(times, gated), best_of(times, ours)
    density = float(jnp.mean(active))
    # in numbers of weights of a d_model x d_ff matrix
    ideal = 2 / (0.5 + 1.5 * density)
    return (
        {"part": "Spark FFN", "batch": batch, "density": density}
        | columns_of(times)
        | {
            "gated_ms": times[gated_name].ms,
            "best": ours_name,
            "speedup": times[gated_name].ms / times[ours_name].ms,
            "speedup_of_minima": min(times[name].min_ms for name in gated)
            / times[ours_name].min_ms,
            "ideal": ideal,
            "indices_ms": listing_time.ms,
            "indices_min_ms": listing_time.min_ms,
        }
    )


def crossover_notes(rows) -> list[str]:
    """Up to which density the fastest form wins, for each batch."""
    notes = []
    for batch in sorted({row["batch"] for row in rows}):
        of_batch = [row for row in rows if row["batch"] == batch]
        wins = [row["density"] for row in of_batch if row["speedup"] > 1]
        upto = f"up to {max(wins):.0%} of the neurons" if wins else "nowhere"
        notes.append(f"batch {batch}: faster than dense {upto} of those measured")
    return notes


def show(rows, notes=()) -> None:
    """Prints the medians; minima, spreads and threads' times are for the JSON."""
    hidden = ("_min_ms", "_min_cpu_ms", "_down_ms", "_down_t_ms")
    on_cpu = jax.default_backend() == "cpu"

    def shown(key):
        if key.endswith("_iqr_ms") and not key.startswith(("loop", "kernel")):
            return False
        if key.endswith("_cpu_ms") and not on_cpu:
            return False
        return key != "part" and not key.endswith(hidden)

    print()
    common.print_table(
        [{k: v for k, v in row.items() if shown(k)} for row in rows], notes
    )


class Rows:
    """What was measured, written as it comes; of a stopped run what it had.

    Args:
      path: of the file, or None.
      env: as `common.write_json` takes it.
      known: rows of a run that was cut off.
    """

    def __init__(self, path, env: dict, known: list[dict]):
        self._path, self._env, self._known = path, env, known
        self._rows, self.notes = [], []

    def of(self, part: str, case: Case, measure: Callable[[], dict]) -> dict:
        """The row of a case, measured if it is not there."""
        wanted = {"part": part, **dataclasses.asdict(case)}
        if part == "Spark FFN":
            del wanted["density"]  # what is realised
        known = (r for r in self._known if wanted.items() <= r.items())
        row = next(known, None) or measure()
        self._rows.append(row)
        self.write()
        return row

    def write(self) -> None:
        common.write_json(self._path, self._env, self._rows, self.notes)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that --json has"
    )
    args = common.parse_args(__doc__, argv=argv, parser=parser)
    size = size_here(args.quick)
    print(f"{size}; times are of one layer")
    cases = QUICK if args.quick else CASES

    env = common.environment(repeats=args.repeats, **dataclasses.asdict(size))
    known = common.read_back(parser, args.json, env) if args.resume else []
    rows, repeats = Rows(args.json, env, known), args.repeats

    weights = ffn_layers.spark_weights(size)
    firsts = {case.batch: case for case in reversed(cases)}
    spark = [
        rows.of(
            "Spark FFN",
            case,
            functools.partial(run_spark, weights, size, case.batch, repeats),
        )
        for case in sorted(firsts.values(), key=lambda case: case.batch)
    ]
    show(spark)
    del weights  # before the others are made

    weights = ffn_layers.given_weights(size)
    forms = ffn_layers.given_forms()
    given = [
        rows.of(
            "given neurons",
            case,
            functools.partial(run_given, forms, weights, size, case, repeats),
        )
        for case in cases
    ]
    rows.notes += crossover_notes(given)
    rows.write()
    show(given, rows.notes)


if __name__ == "__main__":
    main()

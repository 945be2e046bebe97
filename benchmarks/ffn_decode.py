"""How fast is a decode step of an FFN that reads only the rows of active neurons?

First the up and the down projection alone, with the active neurons given: the dense
products, a gather of the rows, the loop of `ops.active_ffn` and its kernel, and
`found`, the kernel of `ops.gated_ffn`, which finds them itself by the gate; over the
share of active neurons and the batch. Then a whole Spark FFN, which finds its neurons
by a predictor and a statistical threshold, against a dense gated FFN of as many
parameters, in the fastest of its forms. Times are of one layer; several layers with
weights of their own come one after the other, on a GPU in a loop, as decoding takes
them, so that no cache holds them. The forms take turns, so that a busy machine slows
all alike. On a CPU, `cpu_ms` is the time of all
threads, those included that spin a while after a dense product.
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

import sparsejax as sj
from benchmarks.parts import common, kernel_times
from sparsejax import ops

FOUND = "found"  # by `gated_ffn`, which needs no list
SPARE = 1.25  # capacity of the list, in numbers of expected neurons


@dataclasses.dataclass(frozen=True)
class Size:
    """One FFN."""

    d_model: int
    d_ff: int
    num_layers: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Case:
    """How much of it a step uses."""

    batch: int
    density: float  # share of the neurons that are active for some row of the batch


BATCHES = (1, 2, 4, 8)
DENSITIES = (0.02, 0.05, 0.08, 0.16, 0.33, 0.5)
SPARK_DENSITY = 0.08  # of a single row of the batch
CASES = [Case(*c) for c in itertools.product(BATCHES, DENSITIES)]
QUICK = [Case(*c) for c in itertools.product((1, 2), (0.08, 0.5))]


def size_here(quick: bool) -> Size:
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    if quick:
        return Size(512, 2048, 2, dtype)
    return Size(4096, 32768, 8 if dtype == "bfloat16" else 2, dtype)


def has_kernel() -> bool:
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return jax.default_backend() == "gpu" and str(capability) == "9.0"


def implementations() -> dict[str, str]:
    """Column name -> what `active_ffn` is told, or `FOUND`."""
    found = {"gather": "reference"}
    if jax.default_backend() == "cpu":
        found["loop"] = "xla"
    if has_kernel():
        found |= {"kernel": "mosaic_gpu", FOUND: FOUND}
    return found


@functools.cache  # a form that takes no list of neurons compiles once for a batch
def chain(layer_form):
    """All layers in turn, each added to the residual stream; on a GPU some tokens."""

    def layer(h, has):
        return ((h + layer_form(has, h)) * 0.5**0.5).astype(h.dtype)

    return common.in_a_loop(layer, tokens=num_tokens())


one_layer = functools.cache(jax.jit)


def num_tokens() -> int:
    """What a program starts with and ends with counts on a GPU."""
    return 4 if jax.default_backend() == "gpu" else 1


def product(matrix, x):
    """`x @ matrix.T`, read row by row: the fast way on a CPU, where the other is not.

    A batch of 1 is a vector there.
    """
    if len(x) == 1:
        return jnp.dot(matrix, x[0], preferred_element_type=jnp.float32)[None]
    out = jnp.dot(matrix, x.T, preferred_element_type=jnp.float32)
    if jax.default_backend() == "cpu":
        # XLA would swap the operands to save the transpose, and be three times slower
        out = jax.lax.optimization_barrier(out)
    return out.T


def product_t(x, matrix):
    """`x @ matrix`."""
    if len(x) == 1:
        return jnp.dot(x[0], matrix, preferred_element_type=jnp.float32)[None]
    return jnp.dot(x, matrix, preferred_element_type=jnp.float32)


def down_product(layer, hidden, by):
    """The down projection, from whichever of the two layouts in memory."""
    if by == "down":
        return product_t(hidden, layer["down"])
    return product(layer["down_t"], hidden)


def dense_form(layer, h, by):
    hidden = product(layer["up"], h) * layer["dense_gate"].astype(jnp.float32)
    return down_product(layer, hidden.astype(h.dtype), by).astype(h.dtype)


def room_of(implementation: str) -> str:
    """The time of the kernel follows the count, so that it takes a list of any length.

    The decoding loop gives it room for all neurons, so that none overflows.
    """
    return "all" if implementation == "mosaic_gpu" else "tight"


def active_form(layer, h, implementation):
    if implementation == FOUND:
        gate = layer["dense_gate"]
        return found_form(h, gate, layer["up"], layer["down"])
    gate, indices = layer[room_of(implementation)]
    operands = h, gate, indices, layer["num_active"], layer["up"], layer["down"]
    return ops.active_ffn(*operands, implementation=implementation)


def found_form(h, gate, up, down, **of_scores):
    operands = h, gate.astype(h.dtype), up, down
    return ops.gated_ffn(*operands, implementation="mosaic_gpu", **of_scores)


def random_matrix(key, rows, columns, dtype, fan_in):
    return (jax.random.normal(key, (rows, columns)) / fan_in**0.5).astype(dtype)


def given_weights(size: Size):
    layers = []
    for i in range(size.num_layers):
        keys = jax.random.split(jax.random.key(i), 2)
        shape = (size.d_ff, size.d_model, size.dtype)
        up = random_matrix(keys[0], *shape, fan_in=size.d_model)
        down = random_matrix(keys[1], *shape, fan_in=size.d_ff)
        down_t = jax.jit(lambda a: a.T)(down)
        layers.append({"up": up, "down": down, "down_t": down_t})
    return layers


def with_active(layers, size: Size, case: Case):
    """The layers with random active neurons, each used by half of the batch or more."""
    num_active = round(case.density * size.d_ff)
    capacity = min(size.d_ff, math.ceil(SPARE * num_active))
    found = []
    for i, layer in enumerate(layers):
        rng = np.random.default_rng([i, case.batch, num_active])
        active = np.zeros(size.d_ff, bool)
        active[rng.choice(size.d_ff, num_active, replace=False)] = True
        gate = rng.normal(size=(case.batch, size.d_ff)) * active
        if case.batch > 1:
            gate *= rng.random(gate.shape) < 0.5
        lists, neurons = {}, np.flatnonzero(active).astype(np.int32)
        for room, length in (("tight", capacity), ("all", size.d_ff)):
            indices = np.pad(neurons, (0, length - num_active), mode="edge")
            lists[room] = (
                jnp.asarray(gate[:, indices], size.dtype),
                jnp.asarray(indices),
            )
        found.append(
            layer
            | lists
            | {
                "dense_gate": jnp.asarray(gate, size.dtype),
                "num_active": jnp.int32(num_active),
            }
        )
    return found


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
      repeats: as in `common.time_in_turn`.

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
    # compiles them all side by side
    common.side_by_side(lambda call: jax.block_until_ready(call()), calls.values())
    units = len(layers) * num_tokens()
    return common.time_in_turn(calls, repeats=repeats, units=units), calls


def best_of(times, names):
    return min(names, key=lambda name: times[name].ms)


def columns_of(times) -> dict:
    fields = [field.name for field in dataclasses.fields(common.Time)]
    return {
        f"{name}_{field}": getattr(of_form, field)
        for name, of_form in times.items()
        for field in fields
    }


def given_forms() -> tuple[dict[str, Callable], dict[str, Callable]]:
    """The dense ones, and ours."""
    dense = {f"dense_{by}": functools.partial(dense_form, by=by) for by in BY}
    ours = {
        name: functools.partial(active_form, implementation=implementation)
        for name, implementation in implementations().items()
    }
    return dense, ours


def run_given(forms, layers, size: Size, case: Case, repeats: int) -> dict:
    """One row; `forms` as from `given_forms`."""
    layers = with_active(layers, size, case)
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


BY = ("down", "down_t")


def spark_weights(size: Size):
    layers, half = [], size.d_model // 2
    for i in range(size.num_layers):
        keys = jax.random.split(jax.random.key(i), 6)
        gated_ff = gated_width(size)
        shape = (gated_ff, size.d_model, size.dtype)
        gated = {
            "gate": random_matrix(keys[0], *shape, fan_in=size.d_model),
            "up": random_matrix(keys[1], *shape, fan_in=size.d_model),
            "down": random_matrix(keys[2], *shape, fan_in=gated_ff),
        }
        gated["down_t"] = jax.jit(lambda a: a.T)(gated["down"])
        shape = (size.d_ff, half, size.dtype)
        spark = {
            "predictor": random_matrix(keys[3], *shape, fan_in=half),
            "up": random_matrix(keys[4], *shape, fan_in=half),
            "down": random_matrix(
                keys[5], size.d_ff, size.d_model, size.dtype, fan_in=size.d_ff
            ),
        }
        layers.append({"gated": gated, "spark": spark})
    return layers


def gated_width(size: Size) -> int:
    """Neurons of a gated FFN of as many parameters, to the next multiple of 128."""
    return math.ceil(size.d_ff * 2 / 3 / 128) * 128


def gated_form(layer, h, by):
    weights = layer["gated"]
    gate = jax.nn.gelu(product(weights["gate"], h), approximate=True)
    hidden = (gate * product(weights["up"], h)).astype(h.dtype)
    return down_product(weights, hidden, by).astype(h.dtype)


def gated_twice_form(layer, h, by):
    """With the row twice: on a GPU XLA's product of a vector is slower than of two."""
    two = jax.lax.optimization_barrier(jnp.concatenate([h, h]))
    return gated_form(layer, two, by)[:1]


def spark_scores(layer, h):
    """As `sj.nn.SparkFFN` has them, and the number that should exceed the threshold."""
    predictor = layer["spark"]["predictor"]
    scores = product(predictor, h[:, : h.shape[1] // 2]).astype(h.dtype)
    return scores, SPARK_DENSITY * len(predictor)


def spark_gate(layer, h):
    """As `sj.nn.SparkFFN` has it."""
    return jax.nn.gelu(sj.statistical_topk(*spark_scores(layer, h)), approximate=True)


def spark_form(layer, h, implementation, capacity):
    weights = layer["spark"]
    rest = jax.lax.optimization_barrier(h[:, h.shape[1] // 2 :])
    if implementation == FOUND:
        scores, k = spark_scores(layer, h)
        return found_form(
            *(rest, scores, weights["up"], weights["down"]),
            threshold=sj.statistical_threshold(scores, k),
            activation=jax.nn.gelu,
        )
    gate = spark_gate(layer, h)
    indices, count, _ = ops.active_indices(jnp.any(gate > 0, axis=0), capacity)
    return ops.active_ffn(
        *(rest, gate[:, indices], indices, count),
        *(weights["up"], weights["down"]),
        implementation=implementation,
    )


def spark_dense_form(layer, h):
    """The same FFN with its zeros multiplied: what it costs in training."""
    half, weights = h.shape[1] // 2, layer["spark"]
    hidden = (spark_gate(layer, h) * product(weights["up"], h[:, half:])).astype(
        h.dtype
    )
    return product_t(hidden, weights["down"]).astype(h.dtype)


def run_spark(layers, size: Size, batch: int, repeats: int) -> dict:
    h = jax.random.normal(jax.random.key(1), (batch, size.d_model), size.dtype)
    union = 1 - (1 - SPARK_DENSITY) ** batch
    capacity = min(size.d_ff, math.ceil(SPARE * union * size.d_ff))
    first = jax.jit(spark_gate)(layers[0], h)
    active = jnp.any(first > 0, axis=0)
    ours = {
        name: functools.partial(
            spark_form,
            implementation=implementation,
            capacity=size.d_ff if room_of(implementation) == "all" else capacity,
        )
        for name, implementation in implementations().items()
    }
    gated = {f"gated_{by}": functools.partial(gated_form, by=by) for by in BY}
    if batch == 1:
        gated |= {
            f"gated_twice_{by}": functools.partial(gated_twice_form, by=by) for by in BY
        }
    groups = [{"spark_dense": spark_dense_form} | ours, gated]
    times, calls = measure(groups, layers, h, size.dtype, repeats)
    fastest = best_of(times, ours)
    units = size.num_layers * num_tokens()
    if told := kernel_times.longest(calls[fastest], units=units):
        print(f"  {fastest}, a layer: {told}")
    listing = jax.jit(functools.partial(ops.active_indices, capacity=capacity))
    listing_time = common.time_in_turn(
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

    weights = spark_weights(size)
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

    weights = given_weights(size)
    forms = given_forms()
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

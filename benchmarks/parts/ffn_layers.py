"""One FFN of a decode step in every form that `ffn_decode` times, and its weights.

Forms take a layer's weights and the residual stream `[batch, d_model]` and give what is
added to it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from sparsejax import ops

FOUND = "found"  # by `gated_ffn`, which needs no list
SPARE = 1.25  # capacity of the list, in numbers of expected neurons
SPARK_DENSITY = 0.08  # of a single row of the batch
BY = ("down", "down_t")  # layouts of the down projection in memory


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


def given_forms() -> tuple[dict[str, Callable], dict[str, Callable]]:
    """The dense ones, and ours."""
    dense = {f"dense_{by}": functools.partial(dense_form, by=by) for by in BY}
    ours = {
        name: functools.partial(active_form, implementation=implementation)
        for name, implementation in implementations().items()
    }
    return dense, ours


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

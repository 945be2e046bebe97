"""The small tasks, the loop and the statistics that studies of methods share."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsejax as sj
from benchmarks.parts import common, timing

Batch = tuple[jax.Array, jax.Array]  # inputs [n, d_in], labels int32[n]
Sample = Callable[[jax.Array], Any]  # key -> a batch
Metrics = dict[str, jax.Array]  # name -> scalar


class Task(NamedTuple):
    """What one seed trains and is judged on."""

    sample: Sample
    validation: Batch
    test: Batch


def teacher_task(
    key: jax.Array,
    *,
    num_inputs: int,
    num_hidden: int,
    num_classes: int,
    num_relevant: int | None = None,
    batch_size: int = 128,
    test_size: int = 8192,
) -> Task:
    """Normal inputs, labelled by the argmax of a random ReLU network; always fresh.

    The network reads only the first `num_relevant` inputs (None: all of them).
    """
    num_relevant = num_relevant or num_inputs
    keys = jax.random.split(key, 3)
    hidden = jax.random.normal(keys[0], (num_relevant, num_hidden))
    out = jax.random.normal(keys[1], (num_hidden, num_classes))

    def sample(key: jax.Array, size: int = batch_size) -> Batch:
        x = jax.random.normal(key, (size, num_inputs))
        return x, (jax.nn.relu(x[:, :num_relevant] @ hidden) @ out).argmax(-1)

    x, labels = sample(keys[2], 2 * test_size)
    validation = (x[:test_size], labels[:test_size])
    return Task(sample, validation, (x[test_size:], labels[test_size:]))


def init_mlp(key: jax.Array, widths: Sequence[int]) -> dict[str, Any]:
    """He-normal kernels and zero biases: `{"layer0": {"bias", "kernel"}, ...}`."""
    he_normal = jax.nn.initializers.he_normal()
    return {
        f"layer{i}": {
            "bias": jnp.zeros(widths[i + 1]),
            "kernel": he_normal(layer_key, (widths[i], widths[i + 1])),
        }
        for i, layer_key in enumerate(jax.random.split(key, len(widths) - 1))
    }


def apply_mlp(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """ReLU between the layers; returns logits `[n, classes]`."""
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def cross_entropy(params: dict[str, Any], batch: Batch) -> jax.Array:
    logits = apply_mlp(params, batch[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return losses.mean()


def accuracy_percent(params: dict[str, Any], batch: Batch) -> jax.Array:
    return 100 * jnp.mean(apply_mlp(params, batch[0]).argmax(-1) == batch[1])


def cosine_adam(
    learning_rate: jax.Array, num_steps: int
) -> optax.GradientTransformation:
    """Adam whose learning rate, which may be traced, falls to 0 by a cosine."""
    decay = optax.cosine_decay_schedule(1.0, num_steps)
    return optax.adam(lambda step: learning_rate * decay(step))


def train(
    tx: optax.GradientTransformation,
    params: Any,
    sample: Sample,
    *,
    num_steps: int,
    key: jax.Array,
    loss_fn: Callable[[Any, Any], jax.Array] = cross_entropy,
    sparse: bool = True,
    finish: bool = True,
) -> tuple[Any, optax.OptState, jax.Array]:
    """Trains under one scan; `vmap` it over seeds and learning rates.

    Args:
      tx: a sparsejax method, or with `sparse=False` any optax optimizer.
      params: where training begins.
      sample: draws a batch from a key.
      num_steps: steps, of one batch each.
      key: of the batches.
      loss_fn: of the params that the forward uses, and a batch.
      sparse: whether `tx` is a sparsejax method.
      finish: return the exactly sparse params instead of those that were trained.

    Returns:
      The final params, the state, and the loss of every step before its update.
    """

    def step(carry, step_key):
        params, opt_state = carry
        batch = sample(step_key)

        def loss(params):
            used = sj.forward_params(opt_state, params) if sparse else params
            return loss_fn(used, batch)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    keys = jax.random.split(key, num_steps)
    (params, opt_state), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
    if sparse and finish:
        params = sj.sparse_params(opt_state, params)
    return params, opt_state, losses


def judge(params: Any, task: Task, losses: jax.Array) -> Metrics:
    """What the studies report; the train loss is the mean of the last tenth."""
    return {
        "test_acc_percent": accuracy_percent(params, task.test),
        "test_loss": cross_entropy(params, task.test),
        "train_loss": losses[-max(1, len(losses) // 10) :].mean(),
        "val_loss": cross_entropy(params, task.validation),
    }


class Outcome(NamedTuple):
    """A method at its best learning rate."""

    row: dict[str, Any]  # means and standard errors over seeds
    seeds: dict[str, np.ndarray]  # metric -> one value a seed


def tune(
    run: Callable[[jax.Array, jax.Array], Metrics],
    learning_rates: Sequence[float],
    num_seeds: int,
    **case: Any,
) -> Outcome:
    """Runs all seeds at all learning rates at once; picks the best by validation.

    Args:
      run: (key of the seed, learning rate) -> metrics, `val_loss` among them.
      learning_rates: the grid; the best has the lowest mean `val_loss` over seeds.
      num_seeds: the same seeds for every method, so that methods compare in pairs.
      **case: the first columns of the row.
    """
    keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
    every = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))
    metrics = jax.device_get(every(keys, jnp.asarray(learning_rates, jnp.float32)))
    grid = metrics["val_loss"].mean(1)
    best = int(np.argmin(np.where(np.isfinite(grid), grid, np.inf)))
    row = case | {"lr": learning_rates[best]}
    for name, values in metrics.items():
        if name != "val_loss":
            row[name], row[f"{name}_se"] = common.mean_and_error(values[best])
    for rate, value in zip(learning_rates, grid, strict=True):
        row[f"val_loss_lr_{rate:g}"] = float(value)
    return Outcome(row, {name: values[best] for name, values in metrics.items()})


def in_parallel(fn: Callable[[Any], Any], cases: Iterable[Any]) -> list[Any]:
    """Maps `fn` in threads: compiling is most of the time of a small case."""
    threads = max(1, min(8, (os.cpu_count() or 1) // 2))
    return timing.side_by_side(fn, cases, threads=threads)


def compare(
    claim: str, better: Outcome, worse: Outcome, metric: str, *, lower: bool = False
) -> str:
    """Says whether `better` is better than `worse`: differences paired by seed."""
    sign = -1 if lower else 1
    gains = sign * (better.seeds[metric] - worse.seeds[metric])
    gain, error = common.mean_and_error(gains)
    verdict = "holds" if gain > 0 else "DOES NOT HOLD"
    if not abs(gain) > 2 * error:
        verdict += ", but within two standard errors"
    error_text = "?" if math.isnan(error) else f"{error:.3g}"
    return f"{claim}: {metric} better by {gain:.3g} +- {error_text}: {verdict}" + (
        rates_note(better.row["lr"], worse.row["lr"])
    )


def rates_note(better: float, worse: float) -> str:
    """A train loss says little between runs at different learning rates."""
    return "" if better == worse else f" (learning rates {better:g}, {worse:g})"

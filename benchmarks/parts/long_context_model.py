"""A small decoder that learns the long-context tasks, and its gates where it attends.

The model is trained with dense attention on lengths that double up to the last one. It
spends half of the steps on the shortest, where half of each batch is `tasks.recall`:
from the tasks alone, which tell few tokens, it takes far longer to look up names. Then
it is frozen, and SeerAttention's gates are distilled, for blocks of queries and for
single ones. Each length is a stage that starts Adam anew, so that a run that was cut
off goes on from the last whole stage as if nothing had been.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.parts import long_context_tasks as tasks
from sparsejax import attention, formats, models, nn, training

SHARES = {"single": 1, "multi": 3, "hops": 3, "words": 2}  # of a batch
WINDOW = 4  # of the local layer
WARM = 10  # steps, of each stage


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the model is made."""

    length: int
    steps: int
    gate_steps: int
    block: int = 16  # tokens
    tokens: int = (
        2048  # of a batch, and of what is computed at once; a sequence or more
    )
    d_model: int = 96
    num_layers: int = 1  # that select keys, behind one that sees the last tokens alone
    learning_rate: float = 1.2e-3
    gate_learning_rate: float = 1e-2

    def lengths(self) -> list[int]:
        """Doubling up to the last one, from one that holds a block."""
        lengths = [self.length]
        while lengths[0] >= 2 * max(tasks.MIN_LENGTH, self.block):
            lengths.insert(0, lengths[0] // 2)
        return lengths


class Stage(NamedTuple):
    """Steps on batches of one length; only those of the shortest have practice."""

    length: int
    first: int
    steps: int
    of_gates: bool = False


class Local(nn.Attention):
    """Attention to the last `window` tokens, which computes no other scores."""

    def mix(self, x, positions):
        query, key, value = self.project(x, positions)
        batch, length, _, dim = query.shape
        window = self.window or length
        query = query.reshape(batch, length, self.num_kv_heads, -1, dim)

        def last(a):  # [batch, seq, window, kv_heads, dim]
            a = jnp.pad(a, ((0, 0), (window - 1, 0), (0, 0), (0, 0)))
            return jnp.stack([a[:, i : i + length] for i in range(window)], axis=2)

        scores = jnp.einsum(
            "bshgd,bswhd->bhgsw", query, last(key), preferred_element_type=jnp.float32
        )
        there = jnp.arange(length)[:, None] + jnp.arange(window) >= window - 1
        scores = jnp.where(there, scores * dim**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        y = jnp.einsum("bhgsw,bswhd->bshgd", weights, last(value))
        return y.reshape(batch, length, -1, dim), jnp.ones((batch, length))


class Gated(nn.SeerAttention):
    """With a gate for decoding too; `distill` leaves the sum of both losses."""

    def __init__(self, *args: Any, rngs: nnx.Rngs, **options: Any):
        super().__init__(*args, rngs=rngs, **options)
        gate = attention.init_seer_decode_gate(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            d_gate=self.head_dim,
            key=rngs.params(),
        )
        self.decode_gate = nn.GateParam(gate)

    def mix(self, x, positions):
        found = super().mix(x, positions)
        if self.distill:
            query, key, _ = self.unrotated(x)
            scores = attention.seer_decode_scores(
                self.decode_gate.get_value(),
                query,
                key,
                block=self.block,
                rotate=self.rotate,
            )
            query, key, _ = self.project(x, positions)
            target = attention.seer_decode_target(query, key, block=self.block)
            loss = attention.seer_loss(scores, target, skip=0.5)
            self.gate_loss = nn.GateLoss(self.gate_loss[...] + loss)
        return found


def make_model(recipe: Recipe) -> models.Decoder:
    """A decoder with idle gates.

    Its first layer is local: there a value learns which name it follows. The base is so
    large that the others hardly see positions over any length.
    """
    on_gpu = jax.default_backend() == "gpu"  # whose kernels want wider, shorter numbers
    selecting = functools.partial(
        Gated, block=recipe.block, select=every_block if on_gpu else None
    )
    config = models.DecoderConfig(
        vocab_size=tasks.VOCAB_SIZE,
        d_model=recipe.d_model,
        num_layers=1 + recipe.num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64 if on_gpu else 32,
        d_ff=2 * recipe.d_model,
        rope_base=1e10,
        attention=(
            functools.partial(Local, window=WINDOW),
            *[selecting] * recipe.num_layers,
        ),
        dtype=jnp.bfloat16 if on_gpu else jnp.float32,
    )
    return models.Decoder(config, rngs=nnx.Rngs(0))


def every_block(scores: jax.Array, *, block: int) -> formats.BlockMask:
    """Dense attention by the kernel for blocks, which never holds all scores."""
    return formats.BlockMask.from_blocks(scores > -jnp.inf, (block, block))


def batch(
    length: int, step: int, tokens: int, *, practice: bool
) -> tuple[np.ndarray, np.ndarray]:
    """About `tokens` of them and how much each counts, `[num, length]`.

    More where the shares of the tasks are too long for that; beyond eight times as many
    a task has one sequence. Their answers count 1 in total, and so does the practice.
    """
    shares = SHARES
    if length * sum(shares.values()) > 8 * tokens:
        shares = dict.fromkeys(SHARES, 1)
    kinds = sum(shares.values())
    unit = max(1, tokens // (length * kinds * (2 if practice else 1)))
    drawn, counted = [], []
    for name, share in shares.items():
        drawn.append(tasks.draw(name, length, unit * share, (0, length, step)))
        judged = tasks.TASKS[name].judged > 0
        judged = np.pad(judged, (length - tasks.ANSWER, 0))
        counted.append(np.tile(judged, (unit * share, 1)))
    weights = np.concatenate(counted)
    weights = weights / weights.sum()
    if practice:
        rng = np.random.default_rng((0, length, step, len(SHARES)))
        stream, again = tasks.recall(rng, length, unit * kinds)
        drawn.append(stream)
        weights = np.concatenate([weights, again / again.sum()])
    return np.concatenate(drawn), weights.astype(np.float32)


def stages(recipe: Recipe) -> list[Stage]:
    """The plan: half of the steps on the shortest length, the gates at the end."""
    lengths = recipe.lengths()
    later = recipe.steps // (2 * len(lengths))  # of each length but the first
    first = recipe.steps - later * (len(lengths) - 1)
    plan = [Stage(lengths[0], 0, first)]
    plan += [
        Stage(length, first + i * later, later) for i, length in enumerate(lengths[1:])
    ]
    return [*plan, Stage(recipe.length, 0, recipe.gate_steps, of_gates=True)]


def train(
    recipe: Recipe, model: models.Decoder, path: pathlib.Path | None = None
) -> None:
    """Trains the model in place, then its gates with the model frozen.

    Args:
      recipe: how.
      model: of `make_model`.
      path: a safetensors file that has the weights after each stage; if it is there,
        training goes on after its last one.

    Raises:
      ValueError: if the file is of another recipe.
    """
    graph, gates, weights = nnx.split(model, nn.GateParam, nnx.Param)
    plan, parts, done = stages(recipe), (weights, gates), 0
    made_by = json.dumps(dataclasses.asdict(recipe))
    if path is not None and path.exists():
        parts, saved = training.load_weights(path, parts)
        if saved["recipe"] != made_by:
            raise ValueError(
                f"{path} must be of the recipe {made_by}; got {saved['recipe']}. Name "
                "another file."
            )
        done = int(saved["stages"])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        steps = [
            pool.submit(_compiled, graph, parts, recipe, stage) for stage in plan[done:]
        ]
        for stage, step_fn in zip(plan[done:], steps, strict=True):
            parts = _descend(step_fn.result(), parts, recipe, stage)
            done += 1
            if path is not None:
                saved = {"recipe": made_by, "stages": str(done)}
                training.save_weights(path, parts, saved)
    weights, gates = parts
    nnx.update(model, gates, weights)


def _compiled(graph, parts, recipe: Recipe, stage: Stage) -> Callable[..., Any]:
    """A step of the stage, compiled for its batches."""
    step_fn = jax.jit(functools.partial(_step, graph, recipe, stage))
    trained = parts[stage.of_gates]
    opt_state = _optimizer(recipe, stage).init(trained)
    return step_fn.lower(parts, opt_state, *_batch(recipe, stage, 0)).compile()


def _descend(step_fn, parts, recipe: Recipe, stage: Stage):
    opt_state = _optimizer(recipe, stage).init(parts[stage.of_gates])
    for step in range(stage.steps):
        parts, opt_state, loss = step_fn(
            parts, opt_state, *_batch(recipe, stage, stage.first + step)
        )
        if (step + 1) % max(1, stage.steps // 5) == 0:
            what = "gates" if stage.of_gates else f"length {stage.length}"
            done = stage.first + step + 1
            print(f"  step {done}, {what}: loss {loss:.4f}", flush=True)
    return parts


def _batch(recipe: Recipe, stage: Stage, step: int):
    easy = stage.length == recipe.lengths()[0] and not stage.of_gates
    return batch(stage.length, step, recipe.tokens, practice=easy)


def _optimizer(recipe: Recipe, stage: Stage) -> optax.GradientTransformation:
    """Adam, with a decay over the last quarter of the steps of the model, or gates."""
    total = recipe.gate_steps if stage.of_gates else recipe.steps
    highest = recipe.gate_learning_rate if stage.of_gates else recipe.learning_rate
    cool = 1 + total // 4
    decay = optax.linear_schedule(highest, 0.05 * highest, cool, total - cool)

    def rate(count):
        return decay(stage.first + count) * jnp.minimum(1, (count + 1) / WARM)

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95))


def _step(graph, recipe: Recipe, stage: Stage, parts, opt_state, tokens, counted):
    """The next weights and gates of which one part is trained, and the loss."""
    trained, frozen = parts[stage.of_gates], parts[not stage.of_gates]

    @jax.checkpoint
    def of_chunk(trained, few):
        tokens, counted = few
        model = nnx.merge(graph, trained, frozen)
        if stage.of_gates:
            model.set_attributes(distill=True)
            model(tokens)
            return nn.pop_gate_losses(model).sum() * len(tokens)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            model(tokens)[:, :-1], tokens[:, 1:]
        )
        return jnp.sum(losses * counted[:, 1:])

    def total(trained):
        few = (chunks(tokens, recipe.tokens), chunks(counted, recipe.tokens))
        return jnp.sum(jax.lax.map(functools.partial(of_chunk, trained), few))

    loss, grads = jax.value_and_grad(total)(trained)
    updates, opt_state = _optimizer(recipe, stage).update(grads, opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    parts = (frozen, trained) if stage.of_gates else (trained, frozen)
    return parts, opt_state, loss


def chunks(rows: jax.Array, tokens: int) -> jax.Array:
    """`[chunks, few, ..]`: as many rows at once as have that many tokens."""
    size = max(1, tokens // rows.shape[1])
    while len(rows) % size:
        size -= 1
    return rows.reshape(-1, size, *rows.shape[1:])

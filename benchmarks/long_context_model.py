"""A small decoder that learns the long-context tasks, and its gates where it attends.

The model is trained with dense attention on lengths that double up to the last one. It
spends half of the steps on the shortest, where half of each batch is `tasks.recall`:
from the tasks alone, which tell few tokens, it takes far longer to look up names. Then
it is frozen, and SeerAttention's gates are distilled.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import long_context_tasks as tasks
from sparsejax import formats, models, nn

SHARES = {"single": 1, "multi": 3, "hops": 3, "words": 2}  # of a batch
WINDOW = 4  # of the local layer
TOKENS = 2048  # of a batch, and of what is computed at once


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the model is made."""

    length: int
    steps: int
    gate_steps: int
    d_model: int = 96
    num_layers: int = 1  # that select keys, behind one that sees the last tokens alone
    learning_rate: float = 1.2e-3
    gate_learning_rate: float = 1e-2

    @property
    def block(self) -> int:
        """Tokens of a block; the kernels of a GPU need 64 or more."""
        return 16 if self.length <= 2048 else 64 if self.length <= 8192 else 128

    def lengths(self) -> list[int]:
        """Doubling up to the last one."""
        lengths = [self.length]
        while lengths[0] >= 2 * tasks.MIN_LENGTH:
            lengths.insert(0, lengths[0] // 2)
        return lengths


def make_model(recipe: Recipe) -> models.Decoder:
    """A decoder with idle gates.

    Its first layer is local: there a value learns which name it follows. The base is so
    large that the others hardly see positions over any length.
    """
    on_gpu = jax.default_backend() == "gpu"  # whose kernels want wider, shorter numbers
    local = functools.partial(nn.Attention, window=WINDOW)
    selecting = functools.partial(
        nn.SeerAttention, block=recipe.block, select=every_block if on_gpu else None
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
        attention=(local, *[selecting] * recipe.num_layers),
        dtype=jnp.bfloat16 if on_gpu else jnp.float32,
    )
    return models.Decoder(config, rngs=nnx.Rngs(0))


def every_block(scores: jax.Array, *, block: int) -> formats.BlockMask:
    """Dense attention by the kernel for blocks, which never holds all scores."""
    return formats.BlockMask.from_blocks(scores > -jnp.inf, (block, block))


def batch(length: int, step: int, *, practice: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and how much each counts, `[num, length]`.

    The answers of the tasks count 1 in total, and so does what is practised.
    """
    kinds = sum(SHARES.values())
    unit = max(1, TOKENS // (length * kinds * (2 if practice else 1)))
    tokens, counted = [], []
    for name, share in SHARES.items():
        tokens.append(tasks.draw(name, length, unit * share, (0, length, step)))
        judged = tasks.TASKS[name].judged > 0
        judged = np.pad(judged, (length - tasks.ANSWER, 0))
        counted.append(np.tile(judged, (unit * share, 1)))
    weights = np.concatenate(counted)
    weights = weights / weights.sum()
    if practice:
        rng = np.random.default_rng((0, length, step, len(SHARES)))
        stream, again = tasks.recall(rng, length, unit * kinds)
        tokens.append(stream)
        weights = np.concatenate([weights, again / again.sum()])
    return np.concatenate(tokens), weights.astype(np.float32)


def train(recipe: Recipe, model: models.Decoder) -> None:
    """Trains the model in place, then its gates with the model frozen."""
    graph, gates, weights = nnx.split(model, nn.GateParam, nnx.Param)

    def answer_loss(weights, tokens, counted):
        logits = nnx.merge(graph, gates, weights)(tokens[:, :-1])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        )
        return jnp.sum(losses * counted[:, 1:])

    def gate_loss(gates, tokens, counted):
        model = nnx.merge(graph, gates, weights)
        model.set_attributes(distill=True)
        model(tokens)
        return nn.pop_gate_losses(model).sum() * len(tokens)

    lengths = recipe.lengths()
    later = recipe.steps // (2 * len(lengths))  # of each length but the first
    first = recipe.steps - later * (len(lengths) - 1)
    plan = [
        length for i, length in enumerate(lengths) for _ in range(later if i else first)
    ]
    easy = lengths[0]
    weights = _descend(answer_loss, weights, plan, recipe.learning_rate, easy)
    plan = [recipe.length] * recipe.gate_steps
    gates = _descend(gate_loss, gates, plan, recipe.gate_learning_rate)
    nnx.update(model, gates, weights)


def _descend(loss_fn, params, plan: Sequence[int], learning_rate: float, easy: int = 0):
    """Adam with a warm-up and a decay; a step on a batch of each length in `plan`.

    Batches of the length `easy` have practice in them.
    """
    warm, cool = min(30, 1 + len(plan) // 4), 1 + len(plan) // 4
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warm),
            optax.linear_schedule(learning_rate, 0.05 * learning_rate, cool),
        ],
        [len(plan) - cool],
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95))

    @jax.jit
    def step_fn(params, opt_state, tokens, counted):
        def total(params):
            of_chunk = jax.checkpoint(lambda chunk: loss_fn(params, *chunk))
            few = chunks(tokens), chunks(counted)
            return jnp.sum(jax.lax.map(of_chunk, few))

        loss, grads = jax.value_and_grad(total)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    for step, length in enumerate(plan):
        tokens, counted = batch(length, step, practice=length == easy)
        params, opt_state, loss = step_fn(params, opt_state, tokens, counted)
        if (step + 1) % max(1, len(plan) // 20) == 0:
            print(f"  step {step + 1}, length {length}: loss {loss:.4f}", flush=True)
    return params


def chunks(rows: jax.Array) -> jax.Array:
    """`[chunks, few, ..]`: as many rows at once as have `TOKENS` tokens."""
    size = max(1, TOKENS // rows.shape[1])
    while len(rows) % size:
        size -= 1
    return rows.reshape(-1, size, *rows.shape[1:])

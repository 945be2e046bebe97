"""Which sparse attention keeps a trained model's answers, at which density?

A small decoder learns the tasks of `long_context_tasks` with dense attention, on
lengths that double up to `--length`, and its SeerAttention gates then learn where it
attends. Every selector of `sparse_selectors` is then put into all its layers, at some
densities:

- prefill: the sequence, its answer too, is read at once, by blocks. The tokens of a
  block select together, so a later one has a say.
- decode: the prompt is read densely, the answer token by token, by what is kept of the
  cache.

Either way the true answer is fed and each of its tokens must be the likeliest, which is
so exactly if greedy decoding finds it. `density` is of all pairs that causality lets a
query see (prefill), or of the keys in the cache (decode), after rounding to blocks or
pages; `mass` the share of the dense weights on what is kept, given the same queries and
keys. PSA counts a key of level h as 1/h, and what it reads pooled as kept. Times are of
one layer, one sequence: `attend_ms` is of the attention alone; `select_ms` of decode is
of a call, which SnapKV needs once a prompt, and Quest's builds all its bounds anew,
where a decoder keeps them up.

    python -m benchmarks.sparse_frontier --length 512 --json PATH

writes a picture beside the JSON if matplotlib is installed.

Paper: https://arxiv.org/abs/2504.17768 (The Sparse Frontier), whose tasks and models
are larger; that answers are read sparsely in the prefill is ours.
"""

import argparse
import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import common, sparse_selectors
from benchmarks import long_context_tasks as tasks
from sparsejax import attention, formats, models, nn, ops

DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
QUICK_METHODS = ("topk_blocks", "psa", "snapkv", "quest")
SHARES = {"single": 1, "multi": 3, "hops": 3, "words": 1}  # of a batch
TOKENS = 4096  # of a batch in training
LEARNED = 0.9  # least accuracy of a task that counts as learned


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the model is made."""

    length: int
    steps: int
    gate_steps: int
    d_model: int = 64
    num_layers: int = 2
    learning_rate: float = 3e-3
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
    """A decoder with idle gates; some pairs of a head hardly turn over the length."""
    on_gpu = jax.default_backend() == "gpu"  # whose kernels want wider, shorter numbers
    config = models.DecoderConfig(
        vocab_size=tasks.VOCAB_SIZE,
        d_model=recipe.d_model,
        num_layers=recipe.num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64 if on_gpu else 32,
        d_ff=2 * recipe.d_model,
        rope_base=200.0 * recipe.length,
        attention=functools.partial(
            nn.SeerAttention,
            block=recipe.block,
            select=every_block if on_gpu else None,
        ),
        dtype=jnp.bfloat16 if on_gpu else jnp.float32,
    )
    return models.Decoder(config, rngs=nnx.Rngs(0))


def every_block(scores: jax.Array, *, block: int) -> formats.BlockMask:
    """Dense attention by the kernel for blocks, which never holds all scores."""
    return formats.BlockMask.from_blocks(scores > -jnp.inf, (block, block))


# --- training ---


def batch(recipe: Recipe, length: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[num, length]` and which of the last ones count `[num, ANSWER]`."""
    unit = max(1, TOKENS // length // sum(SHARES.values()))
    parts = {
        name: tasks.draw(name, length, unit * share, (0, length, step))
        for name, share in SHARES.items()
    }
    counted = [
        np.tile(tasks.TASKS[n].judged > 0, (len(x), 1)) for n, x in parts.items()
    ]
    return np.concatenate(list(parts.values())), np.concatenate(counted)


def train(recipe: Recipe, model: models.Decoder) -> None:
    """Trains the model in place, then its gates with the model frozen."""
    graph, gates, weights = nnx.split(model, nn.GateParam, nnx.Param)

    def answer_loss(weights, tokens, counted):
        logits = nnx.merge(graph, gates, weights)(tokens[:, :-1])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits[:, -tasks.ANSWER :], tokens[:, -tasks.ANSWER :]
        )
        return jnp.sum(losses * counted)

    def gate_loss(gates, tokens, counted):
        model = nnx.merge(graph, gates, weights)
        model.set_attributes(distill=True)
        model(tokens)
        return nn.pop_gate_losses(model).sum() * counted.sum()

    lengths = recipe.lengths()
    later = recipe.steps // (2 * len(lengths))  # of each length but the first
    first = recipe.steps - later * (len(lengths) - 1)
    plan = [
        length for i, length in enumerate(lengths) for _ in range(later if i else first)
    ]
    weights = _descend(recipe, answer_loss, weights, plan, recipe.learning_rate)
    plan = [recipe.length] * recipe.gate_steps
    gates = _descend(recipe, gate_loss, gates, plan, recipe.gate_learning_rate)
    nnx.update(model, gates, weights)


def _descend(recipe, loss_fn, params, plan: Sequence[int], learning_rate: float):
    """Adam with a warm-up and a cosine; a step on a batch of each length in `plan`."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(50, len(plan) // 4), len(plan), 0.05 * learning_rate
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    @jax.jit
    def step_fn(params, opt_state, tokens, counted):
        def mean(params):
            chunks = _chunks(tokens), _chunks(counted, tokens.shape[1])
            of_chunk = jax.checkpoint(lambda chunk: loss_fn(params, *chunk))
            return jnp.sum(jax.lax.map(of_chunk, chunks)) / counted.sum()

        loss, grads = jax.value_and_grad(mean)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    for step, length in enumerate(plan):
        params, opt_state, loss = step_fn(
            params, opt_state, *batch(recipe, length, step)
        )
        if (step + 1) % max(1, len(plan) // 20) == 0:
            print(f"  step {step + 1}, length {length}: loss {loss:.4f}", flush=True)
    return params


def _chunks(rows: jax.Array, length: int | None = None) -> jax.Array:
    """`[chunks, few, ..]`: as many rows at once as have `TOKENS` tokens."""
    size = max(1, TOKENS // (length or rows.shape[1]))
    while len(rows) % size:
        size -= 1
    return rows.reshape(-1, size, *rows.shape[1:])


# --- the trained model with a selector ---


def attend(query, key, value, selection, block: int) -> tuple[jax.Array, ...]:
    """Outputs, realised density, and recalled mass, means over heads and batch."""
    length = query.shape[1]
    shape = (block, block)
    read = functools.partial(ops.block_attention, causal=True, with_lse=True)
    _, every = read(query, key, value)
    if isinstance(selection, formats.BlockMask):
        out, kept = read(query, key, value, selection)
        density = attention.pair_density(selection, length).mean()
    else:
        levels = sparse_selectors.PSA_LEVELS
        out = attention.pyramid_attention(
            query, key, value, selection, block_shape=shape, levels=levels, causal=True
        )
        any_level = formats.BlockMask.from_blocks(selection > 0, shape)
        _, kept = read(query, key, value, any_level)
        density = jnp.zeros(())
        for h in levels:
            of_level = formats.BlockMask.from_blocks(selection == h, shape)
            density += attention.pair_density(of_level, length).mean() / h
    return out, density, jnp.exp(kept - every).mean()


def look(
    layer: nn.SeerAttention, x, positions
) -> tuple[sparse_selectors.Seen, jax.Array]:
    """What a selector sees in a layer, and the values."""
    query, key, value = layer.project(x, positions)
    return sparse_selectors.Seen(query, key, layer.scores(x, positions)), value


def prefill(model: models.Decoder, tokens, select, density):
    """Likeliest tokens after each of the last, density and mass, all layers sparse."""
    x = model.embed(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    found = []
    for block in model.blocks:
        layer = block.attention
        seen, value = look(layer, block.attention_norm(x), positions)
        y, *measured = attend(
            seen.query, seen.key, value, select(seen, density), layer.block
        )
        found.append(measured)
        x = x + layer.combine(y)
        x = x + block.ffn(block.ffn_norm(x))
    logits = model.logits(x[:, -tasks.ANSWER - 1 : -1])
    return logits.argmax(-1), *jnp.asarray(found).mean(0)


def decode(model: models.Decoder, tokens, select, density):
    """As `prefill`, with a dense prompt and an answer that is read by listed keys."""
    prompt = tokens.shape[1] - tasks.ANSWER
    window = sparse_selectors.WINDOW
    x = model.embed(tokens[:, :prompt])
    positions = jnp.broadcast_to(jnp.arange(prompt), x.shape[:2])
    caches = []
    for block in model.blocks:
        query, key, value = block.attention.project(block.attention_norm(x), positions)
        room = ((0, 0), (0, tasks.ANSWER), (0, 0), (0, 0))
        caches.append((query[:, -window:], jnp.pad(key, room), jnp.pad(value, room)))
        y = ops.block_attention(query, key, value, causal=True)
        x = x + block.attention.combine(y)
        x = x + block.ffn(block.ffn_norm(x))

    def step(caches, at):
        token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
        x, position = model.embed(token), jnp.broadcast_to(at, token.shape)
        new, found = [], []
        for block, (asked, keys, values) in zip(model.blocks, caches, strict=True):
            q, k, v = block.attention.project(block.attention_norm(x), position)
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k, at, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v, at, axis=1)
            cached = sparse_selectors.Cached(asked, q, keys, prompt, at + 1)
            lists = select(cached, density)
            y = ops.listed_attention(q, keys, values, lists, at + 1)
            found.append(
                (lists.density(at + 1).mean(), listed_mass(q, keys, lists, at + 1))
            )
            new.append((asked, keys, values))
            x = x + block.attention.combine(y)
            x = x + block.ffn(block.ffn_norm(x))
        return new, (model.logits(x)[:, 0].argmax(-1), jnp.asarray(found).mean(0))

    ats = prompt + jnp.arange(tasks.ANSWER - 1)
    _, (predicted, found) = jax.lax.scan(step, caches, ats)
    predicted = jnp.pad(predicted.T, ((0, 0), (1, 0)))  # the first token is given
    return predicted, *found.mean(0)


def listed_mass(query, key, lists: formats.KeyLists, length) -> jax.Array:
    """The share of the dense weights on the listed keys."""
    scores = attention.scaled_scores(query, key)  # [batch, kv_heads, group, 1, room]
    there = jnp.arange(key.shape[1]) < length
    weights = jax.nn.softmax(jnp.where(there, scores, -jnp.inf), axis=-1)
    kept = lists.to_mask(key.shape[1]) & there
    kept = jnp.broadcast_to(kept, (len(query), *kept.shape[1:]))
    if kept.shape[1] not in (1, weights.shape[1]):  # a list for each query head
        kept = kept.reshape(*weights.shape[:3], -1)
    else:
        kept = kept[:, :, None]
    return jnp.sum(weights * kept[..., None, :], axis=-1).mean()


# --- the table ---


class Sweep:
    """The trained model on its test sequences."""

    def __init__(self, model: models.Decoder, recipe: Recipe, num: int, repeats: int):
        self.graph, self.state = nnx.split(model)
        self.recipe, self.num, self.repeats = recipe, num, repeats
        drawn = [tasks.draw(name, recipe.length, num, (1,)) for name in tasks.TASKS]
        self.tokens = np.concatenate(drawn)
        first = jnp.asarray(drawn[1][:1])
        layer = model.blocks[0].attention
        x = model.blocks[0].attention_norm(model.embed(first))
        self.seen, self.value = jax.jit(look, static_argnums=())(
            layer, x, jnp.arange(recipe.length)[None]
        )

    def row(
        self, phase: str, method: str, select: Any, density: float
    ) -> dict[str, Any]:
        """Accuracies, realised density, recalled mass and times."""
        walk = {"prefill": prefill, "decode": decode}[phase]

        @jax.jit
        def every(state, tokens):
            model = nnx.merge(self.graph, state)
            of_chunk = lambda chunk: walk(model, chunk, select, density)  # noqa: E731
            return jax.lax.map(of_chunk, _chunks(tokens))

        predicted, realised, mass = every(self.state, self.tokens)
        predicted = np.asarray(predicted).reshape(len(self.tokens), -1)
        accuracies = {}
        for i, name in enumerate(tasks.TASKS):
            rows = slice(i * self.num, (i + 1) * self.num)
            accuracies[name] = tasks.accuracy(name, self.tokens[rows], predicted[rows])
        found = list(accuracies.values())
        return {
            "phase": phase,
            "method": method,
            "asked": density,
            "density": float(realised.mean()),
            "mass": float(mass.mean()),
            **accuracies,
            "mean": float(np.mean(found)),
            "worst": min(found),
            **getattr(self, f"_{phase}_times")(select, density),
        }

    def _prefill_times(self, select, density) -> dict[str, float]:
        def read(query, key, value, selection):
            if isinstance(selection, formats.BlockMask):
                return ops.block_attention(query, key, value, selection, causal=True)
            return attention.pyramid_attention(
                query,
                key,
                value,
                selection,
                block_shape=self.seen.shape,
                levels=sparse_selectors.PSA_LEVELS,
                causal=True,
            )

        choose = jax.jit(lambda seen: select(seen, density))
        operands = (self.seen.query, self.seen.key, self.value, choose(self.seen))
        return self._times(choose, self.seen, read, operands)

    def _decode_times(self, select, density) -> dict[str, float]:
        query, key, _ = self.seen
        prompt = self.recipe.length - tasks.ANSWER
        asked = query[:, prompt - sparse_selectors.WINDOW : prompt]
        length = jnp.asarray(self.recipe.length)

        def choose(arrays):
            cached = sparse_selectors.Cached(*arrays, prompt, length)
            return select(cached, density)

        choose, arrays = jax.jit(choose), (asked, query[:, -1:], key)
        read = functools.partial(ops.listed_attention, length=length)
        operands = (query[:, -1:], key, self.value, choose(arrays))
        return self._times(choose, arrays, read, operands)

    def _times(self, choose, seen, read, operands) -> dict[str, float]:
        select_ms, _ = common.time_ms(choose, seen, repeats=self.repeats)
        attend_ms, _ = common.time_ms(jax.jit(read), *operands, repeats=self.repeats)
        return {"select_ms": select_ms, "attend_ms": attend_ms}


def dense(seen: sparse_selectors.Seen, density: float) -> formats.BlockMask:
    del density
    blocks = jnp.tri(seen.num_blocks, dtype=jnp.bool_)[None, None]
    return formats.BlockMask.from_blocks(blocks, seen.shape)


def conclusions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was learned, and what each density leaves of it."""
    first = rows[0]
    poor = [name for name in tasks.TASKS if first[name] < LEARNED]
    notes = ["the dense model learned all tasks"]
    if poor:
        notes = [
            f"the dense model did not learn {', '.join(poor)}: read no more into it"
        ]
    for density in sorted({row["asked"] for row in rows[1:]}, reverse=True):
        of_density = [row for row in rows[1:] if row["asked"] == density]
        hidden = [
            f"{row['phase']} {row['method']} ({row['mean']:.2f}, {row['worst']:.2f})"
            for row in of_density
            if row["mean"] - row["worst"] > 0.3
        ]
        if hidden:
            notes.append(
                f"asked {density:g}: the mean hides a task that fails (mean, worst): "
                + ", ".join(hidden)
            )
    return notes


def picture(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean and worst accuracy against the realised density, a line a method."""
    from matplotlib.figure import Figure  # of the extra `examples`

    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, phase in enumerate(("prefill", "decode")):
        of_phase = [row for row in rows[1:] if row["phase"] == phase]
        for line, metric in enumerate(("mean", "worst")):
            axes = panels[line, column]
            axes.axhline(rows[0][metric], color="black", ls="--", lw=1, label="dense")
            for method in dict.fromkeys(row["method"] for row in of_phase):
                points = sorted(
                    (row["density"], row[metric])
                    for row in of_phase
                    if row["method"] == method
                )
                axes.plot(*zip(*points, strict=True), ".-", label=method)
            axes.set(title=f"{phase}: {metric} of the tasks", ylim=(-0.03, 1.03))
            axes.set_xscale("log")
        panels[1, column].set_xlabel("realised density")
        panels[0, column].legend(fontsize="small")
    panels[0, 0].set_ylabel("accuracy")
    panels[1, 0].set_ylabel("accuracy")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    args, given = make_parser().parse_known_args(argv)
    shared = common.parse_args(__doc__, repeats=10, quick_repeats=2, argv=given)
    recipe = Recipe(length=args.length, steps=args.steps, gate_steps=args.steps // 10)
    num, densities = args.sequences, DENSITIES
    if shared.quick:
        recipe = Recipe(length=64, steps=3, gate_steps=2, d_model=32, num_layers=1)
        num, densities = 2, (0.25,)
    model = make_model(recipe)
    train(recipe, model)
    sweep = Sweep(model, recipe, num, shared.repeats)
    env = common.environment(
        repeats=shared.repeats, sequences=num, **dataclasses.asdict(recipe)
    )
    cases = [("prefill", "dense", dense, 1.0)]
    for phase, methods in (
        ("prefill", sparse_selectors.PREFILL),
        ("decode", sparse_selectors.DECODE),
    ):
        cases += [
            (phase, name, select, density)
            for name, select in methods.items()
            if not shared.quick or name in QUICK_METHODS
            for density in densities
        ]
    rows = []
    for case in cases:
        rows.append(sweep.row(*case))
        print(common.format_table(rows[-1:]), flush=True)
        common.write_json(shared.json, env, rows, conclusions(rows))
    common.print_table(rows, conclusions(rows))
    if shared.json and importlib.util.find_spec("matplotlib"):
        picture(shared.json.with_suffix(".png"), rows)


def make_parser() -> argparse.ArgumentParser:
    """The options that only this benchmark has; `common.parse_args` takes the rest."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, default=64, help="of a task, to judge")
    return parser


if __name__ == "__main__":
    main()

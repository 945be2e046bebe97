"""Which sparse attention keeps a trained model's answers, at which density?

A small decoder learns the tasks of `long_context_tasks` with dense attention, on
lengths that double up to `--length`, and its SeerAttention gates then learn where it
attends. Every selector of `sparse_selectors` is then put into all its layers but
the local first one, at some densities:

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
of a call, which SnapKV needs once a prompt; Quest's builds all its bounds and Double
Sparsity's all its labels anew, where a decoder keeps them up.

    python -m benchmarks.sparse_frontier --length 512 --json PATH

writes a picture beside the JSON if matplotlib is installed. Further options: `--steps`
of training, `--sequences` of a task to judge by.

Paper: https://arxiv.org/abs/2504.17768 (The Sparse Frontier), whose tasks and models
are larger; that answers are read sparsely in the prefill is ours.
"""

import argparse
import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common, long_context_model, sparse_selectors, sparse_walks
from benchmarks import long_context_tasks as tasks
from sparsejax import formats, models, nn, ops

DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
QUICK_METHODS = ("topk_blocks", "quest")
LEARNED = 0.9  # least accuracy of a task that counts as learned


class Sweep:
    """The trained model on its test sequences."""

    def __init__(
        self,
        model: models.Decoder,
        recipe: long_context_model.Recipe,
        num: int,
        repeats: int,
    ):
        self.graph, self.state = nnx.split(model)
        self.recipe, self.num, self.repeats = recipe, num, repeats
        drawn = [tasks.draw(name, recipe.length, num, (1,)) for name in tasks.TASKS]
        self.tokens = np.concatenate(drawn)
        first = jnp.asarray(drawn[1][:1])
        positions = jnp.arange(recipe.length)[None]
        others = np.concatenate(
            [tasks.draw(name, recipe.length, 1, (2,)) for name in tasks.TASKS]
        )
        self.channels = nnx.jit(sparse_walks.calibrate)(model, jnp.asarray(others))
        local, block, *_ = model.blocks
        self.seen, self.value = sparse_walks.look(
            cast(nn.SeerAttention, block.attention),
            block.attention_norm(local(model.embed(first), positions)),
            positions,
        )

    def row(
        self, phase: str, method: str, select: Any, density: float
    ) -> dict[str, Any]:
        """Accuracies, realised density, recalled mass and times."""
        walk = {
            "prefill": sparse_walks.prefill,
            "decode": functools.partial(sparse_walks.decode, channels=self.channels),
        }[phase]

        @jax.jit
        def every(state, tokens):
            model = nnx.merge(self.graph, state)
            return jax.lax.map(
                lambda chunk: walk(model, chunk, select, density),
                long_context_model.chunks(tokens),
            )

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
        read = functools.partial(sparse_walks.attend, block_shape=self.seen.shape)
        choose = jax.jit(lambda seen: select(seen, density))
        operands = (self.seen.query, self.seen.key, self.value, choose(self.seen))
        return self._times(choose, self.seen, read, operands)

    def _decode_times(self, select, density) -> dict[str, float]:
        query, key, _ = self.seen
        prompt = self.recipe.length - tasks.ANSWER
        asked = query[:, prompt - sparse_selectors.WINDOW : prompt]
        length = jnp.asarray(self.recipe.length)

        def choose(arrays):
            asked, query, key = arrays
            cached = sparse_selectors.Cached(
                asked, query, key, prompt, length, self.channels[1]
            )
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
    parser = make_parser()
    args, given = parser.parse_known_args(argv)
    shared = common.parse_args(__doc__, repeats=10, quick_repeats=2, argv=given)
    times = args.length // tasks.MIN_LENGTH
    if args.length % tasks.MIN_LENGTH or times.bit_count() != 1:
        parser.error(
            f"--length must be {tasks.MIN_LENGTH} times a power of two, so that whole "
            f"blocks fill it; got {args.length}"
        )
    recipe = long_context_model.Recipe(
        length=args.length, steps=args.steps, gate_steps=args.steps // 10
    )
    num, densities = args.sequences, DENSITIES
    if shared.quick:
        recipe = long_context_model.Recipe(
            length=64, steps=3, gate_steps=2, d_model=32, num_layers=1
        )
        num, densities = 2, (0.25,)
    model = long_context_model.make_model(recipe)
    long_context_model.train(recipe, model)
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
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--sequences", type=int, default=64, help="of a task, to judge")
    return parser


if __name__ == "__main__":
    main()

"""Which sparse attention keeps a trained model's answers, at which density?

A small decoder learns the tasks of `long_context_tasks` with dense attention, on
lengths that double up to `--length`, and its SeerAttention gates, one for prefill and
one for decoding, then learn where it attends. Every selector of `sparse_selectors` is
then put into all its layers but the local first one, at some densities:

- prefill: the sequence, its answer too, is read at once, by blocks. The tokens of a
  block select together, so a later one has a say.
- decode: the prompt is read densely, the answer token by token, by what is kept of the
  cache.

Either way the true answer is fed and each of its tokens must be the likeliest, which is
so exactly if greedy decoding finds it. `density` is of all pairs that causality lets a
query see (prefill), or of the keys in the cache (decode), after rounding to blocks or
pages; `mass` the share of the dense weights on what is kept, given the same queries and
keys. PSA counts a key of level h as 1/h, and what it reads pooled as kept. Times are of
one layer, one sequence: `attend_ms` is of the attention alone, `select_ms` of the
choice, a gate's scores included. Of decode it is of a call, which SnapKV needs once a
prompt; Quest's builds all its bounds and Double Sparsity's all its labels anew, where a
decoder keeps them up.

    python -m benchmarks.sparse_frontier --length 512 --json PATH

writes a picture beside the JSON if matplotlib is installed. Further options: `--steps`
of training, `--sequences` of a task to judge by. `--weights FILE` holds the weights
after each stage of the training, `--resume` keeps the rows that the JSON has: with
both, a run that was cut off goes on by the same command.

    python -m benchmarks.sparse_frontier --length 32768 --steps 4000 --json PATH

is for an H100: bfloat16, blocks of 128, and no scores of all pairs anywhere. 8192 takes
six minutes there, of which most is compiling, and below 2 GB; 32768 seven minutes on an
H200. Two cores take about ten minutes to train at 1024 and, where attention is most
of a step, four times as long at twice the length; 8192 needs fewer `--steps` and
`--sequences` there.

Paper: https://arxiv.org/abs/2504.17768 (The Sparse Frontier), whose tasks and models
are larger; that answers are read sparsely in the prefill is ours.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.parts import (
    common,
    long_context_model,
    sparse_selectors,
    sparse_walks,
    timing,
)
from benchmarks.parts import long_context_tasks as tasks
from sparsejax import formats, models, ops

DENSITIES = (0.5, 0.25, 0.1, 0.05)
QUICK_METHODS = ("topk_blocks", "quest")
LEARNED = 0.9  # least accuracy of a task that counts as learned
GPU_TOKENS = 32768  # of a batch there


class Case(NamedTuple):
    phase: str
    method: str
    select: Callable[..., Any]
    asked: float  # density


class Programs(NamedTuple):
    """Compiled for one case: the judging of all sequences, and a layer's two halves."""

    judge: Callable[..., Any]
    choose: Callable[..., Any]
    read: Callable[..., Any]


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
        others = np.concatenate(
            [tasks.draw(name, recipe.length, 1, (2,)) for name in tasks.TASKS]
        )
        self.channels = nnx.jit(sparse_walks.calibrate)(model, jnp.asarray(others))
        self.layer = cast(long_context_model.Gated, model.blocks[1].attention)

        @nnx.jit
        def first_layer(model, tokens):
            local, block, *_ = model.blocks
            positions = jnp.arange(recipe.length)[None]
            x = block.attention_norm(local(model.embed(tokens), positions))
            pairs, rotated, value = sparse_walks.project(block.attention, x, positions)
            cache = sparse_walks.gate_cache(block.attention, pairs[1], recipe.length)
            return pairs, rotated, value, cache

        self.pairs, self.rotated, self.value, self.cache = first_layer(
            model, jnp.asarray(drawn[1][:1])
        )

    def compiled(self, case: Case) -> Programs:
        walk = {
            "prefill": sparse_walks.prefill,
            "decode": functools.partial(sparse_walks.decode, channels=self.channels),
        }[case.phase]

        @jax.jit
        def judge(state, tokens):
            model = nnx.merge(self.graph, state)
            return jax.lax.map(
                lambda chunk: walk(model, chunk, case.select, case.asked),
                long_context_model.chunks(tokens, self.recipe.tokens),
            )

        choose, seen, read, operands = getattr(self, f"_{case.phase}_layer")(case)
        selection = jax.eval_shape(choose, *seen)
        return Programs(
            timing.compile_alone(judge.lower(self.state, self.tokens)),
            timing.compile_alone(jax.jit(choose).lower(*seen)),
            timing.compile_alone(jax.jit(read).lower(*operands, selection)),
        )

    def row(self, case: Case, programs: Programs) -> dict[str, Any]:
        """Accuracies, realised density, recalled mass and times."""
        predicted, realised, mass = programs.judge(self.state, self.tokens)
        predicted = np.asarray(predicted).reshape(len(self.tokens), -1)
        accuracies = {}
        for i, name in enumerate(tasks.TASKS):
            rows = slice(i * self.num, (i + 1) * self.num)
            accuracies[name] = tasks.accuracy(name, self.tokens[rows], predicted[rows])
        found = list(accuracies.values())
        _, seen, _, operands = getattr(self, f"_{case.phase}_layer")(case)
        time_ms = functools.partial(timing.time_ms, repeats=self.repeats)
        chosen = programs.choose(*seen)
        return {
            "phase": case.phase,
            "method": case.method,
            "asked": case.asked,
            "density": float(realised.mean()),
            "mass": float(mass.mean()),
            **accuracies,
            "mean": float(np.mean(found)),
            "worst": min(found),
            "select_ms": time_ms(programs.choose, *seen)[0],
            "attend_ms": time_ms(programs.read, *operands, chosen)[0],
        }

    def _prefill_layer(self, case: Case):
        """To choose, of what; and to read, of what and the choice."""

        def choose(pairs, rotated):
            seen = sparse_walks.look(self.layer, pairs, rotated)
            return case.select(seen, case.asked)

        def read(query, key, value, selection):
            shape = sparse_walks.shape_of_blocks(selection, self.recipe.length)
            return sparse_walks.attend(query, key, value, selection, block_shape=shape)

        return choose, (self.pairs, self.rotated), read, (*self.rotated, self.value)

    def _decode_layer(self, case: Case):
        """As of prefill, for the last token."""
        query, key = self.rotated
        prompt = self.recipe.length - tasks.ANSWER
        asked = query[:, prompt - sparse_selectors.WINDOW : prompt]
        length = jnp.asarray(self.recipe.length)

        def choose(asked, query, key, unrotated, cache):
            cached = sparse_selectors.Cached(
                *(asked, query, key, prompt, length, self.channels[1]),
                gate=sparse_walks.gate_scores(self.layer, cache, unrotated),
            )
            return case.select(cached, case.asked)

        arrays = (asked, query[:, -1:], key, self.pairs[0][:, -1:], self.cache)
        read = functools.partial(ops.listed_attention, length=length)
        return choose, arrays, read, (query[:, -1:], key, self.value)


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
    from matplotlib.figure import Figure  # of the extra `metrics`

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
        panels[1, column].legend(  # below, as lines are everywhere else
            loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, fontsize="small"
        )
    panels[0, 0].set_ylabel("accuracy")
    panels[1, 0].set_ylabel("accuracy")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = common.parse_args(
        __doc__, repeats=10, quick_repeats=2, argv=argv, parser=parser
    )
    times = args.length // tasks.MIN_LENGTH
    if args.length % tasks.MIN_LENGTH or times.bit_count() != 1:
        parser.error(
            f"--length must be {tasks.MIN_LENGTH} times a power of two, so that whole "
            f"blocks fill it; got {args.length}"
        )
    on_gpu = jax.default_backend() == "gpu"
    recipe = long_context_model.Recipe(
        length=args.length,
        steps=args.steps,
        gate_steps=args.steps // 10,
        block=16 if args.length <= 2048 else 128 if on_gpu else 64,
        tokens=GPU_TOKENS if on_gpu else long_context_model.Recipe.tokens,
    )
    num, densities = args.sequences, DENSITIES
    if args.quick:
        recipe = long_context_model.Recipe(
            length=64, steps=3, gate_steps=2, d_model=32, num_layers=1
        )
        num, densities = 2, (0.25,)
    env = common.environment(
        repeats=args.repeats, sequences=num, **dataclasses.asdict(recipe)
    )
    rows = common.read_back(parser, args.json, env) if args.resume else []
    model = long_context_model.make_model(recipe)
    long_context_model.train(recipe, model, args.weights)
    sweep = Sweep(model, recipe, num, args.repeats)
    prefill = [Case("prefill", "dense", dense, 1.0)]
    phases = (
        ("prefill", sparse_selectors.PREFILL, prefill),
        ("decode", sparse_selectors.DECODE, []),
    )
    judged = {(row["phase"], row["method"], row["asked"]) for row in rows}
    for phase, methods, cases in phases:
        cases += [
            Case(phase, name, select, density)
            for name, select in methods.items()
            if not args.quick or name in QUICK_METHODS
            for density in densities
        ]
        cases = [
            case
            for case in cases
            if (case.phase, case.method, case.asked) not in judged
        ]
        programs = timing.side_by_side(sweep.compiled, cases, threads=os.cpu_count())
        for case, of_case in zip(cases, programs, strict=True):
            rows.append(sweep.row(case, of_case))
            print(common.format_table(rows[-1:]), flush=True)
            common.write_json(args.json, env, rows, conclusions(rows))
    common.print_table(rows, conclusions(rows))
    if args.json and importlib.util.find_spec("matplotlib"):
        picture(args.json.with_suffix(".png"), rows)


def make_parser() -> argparse.ArgumentParser:
    """The options that only this benchmark has; `common.parse_args` adds the rest."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--sequences", type=int, default=64, help="of a task, to judge")
    parser.add_argument(
        "--weights", type=pathlib.Path, help="read them here, write what is trained"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that --json has"
    )
    return parser


if __name__ == "__main__":
    main()

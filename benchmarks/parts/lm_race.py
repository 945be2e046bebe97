"""Models raced by the clock: held-out loss against seconds of training.

An arm is a decoder, from nothing, and a way to train it. Each is tuned over the same
learning rates by short runs judged on one part of the text, which favours higher rates
a little, then trained for equal seconds and judged on another; compiling and judging do
not count. The first arm is the dense one, others that are not sparse are controls.
Dense, controls and the sparse arm whose first seed is best on the part that tunes are
repeated for other seeds. Schedules follow the clock (`lm_study.Seconds`), so a loss on
the way is one at a high learning rate: what a shorter run comes to is measured by runs
of `LESS` of the time, of the best sparse arm. What such a race has found may be run for
longer, `--as-in`: dense, controls and that arm at their rates, nothing else.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parts import (
    common,
    installed_text,
    lm_command,
    lm_methods,
    lm_report,
    lm_study,
    lm_text,
    lm_tuning,
    scanned_decoder,
    timing,
)
from benchmarks.parts.scanned_decoder import ScannedDecoder
from sparsejax import models
from sparsejax.typing import Params

LESS = 0.8  # of the time
LOOKS = 12  # at the loss, during a run

Losses = lm_methods.Losses
Tell = Callable[[Params, jax.Array], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the runs."""

    batch_size: int
    seq_len: int
    num_judged: int  # windows of a part
    steps_per_call: int
    seconds: float
    tuning_seconds: float
    learning_rates: tuple[float, ...]


class Arm(NamedTuple):
    """A model and a way to train it.

    `make` takes the decoder, its losses and a plan. `tell` takes the decoder and gives
    a function of weights and a batch that gives columns; it raises if the weights are
    not as they should be.
    """

    config: models.DecoderConfig
    make: Callable[[ScannedDecoder, Losses, lm_study.Plan], lm_study.Method]
    tell: Callable[[ScannedDecoder], Tell] = lambda decoder: lambda *given: {}
    is_sparse: bool = True


def plain(decoder: ScannedDecoder, losses: Losses, plan: lm_study.Plan):
    """Adam; the `make` of arms that are no method of sparse weights."""
    del decoder
    return lm_methods.plain(losses, plan)


def shorter(name: str) -> str:
    """What runs of less time are called."""
    return f"{name}, {LESS:g} of the time"


class Race:
    """All runs of some arms.

    Args:
      arms: by name, the dense one first.
      sizes: of the runs.
      text: of `lm_text` or `installed_text`.
      ledger: keeps the rows.
    """

    def __init__(
        self,
        arms: Mapping[str, Arm],
        sizes: Sizes,
        text: Mapping[str, Any],
        ledger: lm_study.Ledger,
    ):
        self._arms, self._sizes, self._ledger = arms, sizes, ledger
        self._train = jnp.asarray(text["train"])
        self._examples = {
            part: jnp.asarray(spread_windows(text[part], sizes))
            for part in ("tune", "test")
        }
        self._study = functools.cache(self._make_study)

    def run(self, num_seeds: int, rates: Mapping[str, float] | None = None) -> None:
        """Does them, best first where it matters.

        Args:
          num_seeds: of what is repeated.
          rates: by arm, of those that are run, see `repeated`. None: all are tuned and
            run, these repeated, and the best sparse one run in less time.

        Raises:
          OutOfTime: the next run would not fit; those before it are in the ledger.
        """
        length = lm_study.Seconds(self._sizes.seconds)
        less = lm_study.Seconds(LESS * self._sizes.seconds)
        best = []
        if rates is None:
            self._run_each(length)
            rates = repeated(self._ledger.rows, self._arms)
            best = [name for name in rates if self._arms[name].is_sparse]
        self._compile(rates, num_seeds)
        for name in best:
            self._compile([name], num_seeds, called=shorter(name))
        for seed in range(num_seeds):
            for name, lr in rates.items():
                self._row(name, lr, length, seed)
            for name in best:
                self._row(name, rates[name], less, seed, called=shorter(name))

    def _run_each(self, length: lm_study.Seconds) -> None:
        tuning = lm_study.Seconds(self._sizes.tuning_seconds)
        self._compile(self._arms, 1)
        for name in self._arms:
            self._study(name).run(tuning_steps=tuning, steps=length, num_seeds=1)

    def _row(self, name, lr, length, seed: int, called: str | None = None) -> None:
        given = {"steps": length, "seed": seed, "name": called}
        self._study(name).row(name, "test", {"lr": lr}, **given)

    def _compile(self, names, num_seeds: int, called: str | None = None) -> None:
        """Side by side, for arms whose runs are not all there."""
        by_run = {called or name: name for name in names}
        left = lm_report.waiting(self._ledger.rows, by_run, num_seeds)
        studies = [(self._study(by_run[run]), by_run[run]) for run in left]
        timing.side_by_side(lambda found: found[0].compile([found[1]]), studies)

    def _make_study(self, name: str) -> lm_tuning.Study:
        arm, sizes = self._arms[name], self._sizes
        decoder, first = scanned_decoder.create(arm.config, unroll=True)
        losses = functools.partial(
            scanned_decoder.token_loss, decoder, rows=sizes.batch_size
        )
        tell = arm.tell(decoder)
        mean_loss = lm_study.evaluator(losses(), batch_size=sizes.batch_size)

        def judge(trained, part):
            examples = self._examples[part]
            return {
                "loss": float(mean_loss(trained.after, examples)),
                **tell(trained.after, examples[: sizes.batch_size]),
                "weights_million": sum(
                    weight.size for weight in jax.tree.leaves(trained.after["blocks"])
                )
                / 1e6,
                "history": [
                    [entry["seconds"], entry["step"], entry["loss"]]
                    for entry in trained.history
                    if "loss" in entry
                ],
            }

        def watch(before, after):
            del before
            return {"loss": float(mean_loss(after, self._examples["test"]))}

        grid = lm_tuning.grid(lr=sizes.learning_rates)
        make = functools.partial(arm.make, decoder, losses)
        return lm_tuning.Study(
            {name: lm_tuning.Entry(make, grid, judged_by="loss")},
            self._ledger,
            first=first,
            data=self._train,
            draw=scanned_decoder.window_draw(sizes.batch_size, sizes.seq_len),
            judge=judge,
            steps_per_call=sizes.steps_per_call,
            watch=watch,
            looks=LOOKS,
        )


def repeated(
    rows: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm]
) -> dict[str, float]:
    """The rates of dense, of the sparse arm that is best on `tune`, and of controls.

    Raises:
      ValueError: if an arm has not been run.
    """
    runs = {name: lm_report.tested(rows, name) for name in arms}
    missing = [name for name, of_arm in runs.items() if not of_arm]
    if missing:
        raise ValueError(f"every arm must have been run; none is there of {missing}.")
    on_tune = {
        name: lm_report.loss_of(of_arm[0], lm_tuning.ON_TUNE)
        for name, of_arm in runs.items()
        if arms[name].is_sparse
    }
    best = min(on_tune, key=on_tune.__getitem__)
    dense, *others = arms
    controls = [name for name in others if name not in on_tune]
    return {name: runs[name][0]["lr"] for name in (dense, best, *controls)}


def spread_windows(tokens: np.ndarray, sizes: Sizes) -> np.ndarray:
    """As many windows as are judged, from all over the part."""
    found = scanned_decoder.windows(tokens, sizes.seq_len, multiple=sizes.num_judged)
    return found[:: len(found) // sizes.num_judged]


# --- What is told of it ---


def table(
    rows: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """A line an arm; `reaches_dense_s` is where its first seed passes the dense loss.

    That is the mean of the dense runs' last losses.
    """
    names = [name for arm in arms for name in (arm, shorter(arm))]
    columns = ("lr", "steps", "ms_step", "weights_million", *columns, "device")
    lines = lm_report.table(rows, names, columns, losses=("loss",))
    for line in lines:
        if lines[0]["method"] == next(iter(arms)):
            history = lm_report.tested(rows, line["method"])[0]["history"]
            line["reaches_dense_s"] = seconds_to(history, lines[0]["loss"])
    return lines


def seconds_to(history: Sequence[Sequence[float]], loss: float) -> float | None:
    """When a run first has that loss, by straight lines between what was seen."""
    last = None
    for seconds, _, found in history:
        if found is None or not math.isfinite(found):
            last = None
            continue
        if found <= loss:
            if last is None:
                return seconds
            share = (last[1] - loss) / (last[1] - found)
            return last[0] + share * (seconds - last[0])
        last = seconds, found
    return None


def conclusions(
    rows: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm], seconds: float
) -> list[str]:
    """What the table says, in its own numbers."""
    notes = [
        "losses are means over the seeds, nats a byte; what else is in the table is of "
        "seed 0; weights_million is of the blocks, zeros included"
    ]
    dense, *others = arms
    lines = {line["method"]: line for line in table(rows, arms, ())}
    for name in others:
        notes += lm_report.compare(rows, name, dense, "loss")
        reached = lines.get(name, {}).get("reaches_dense_s")
        if reached is not None:
            notes.append(
                f"{name}: on its way it has the dense loss after {reached:.3g} s, "
                f"{reached / seconds:.2f} of the time"
            )
    for name in others:
        less = shorter(name)
        notes += lm_report.compare(rows, less, dense, "loss")
        if less not in lines:
            continue
        for control in others:
            if not arms[control].is_sparse:
                notes += lm_report.compare(rows, name, control, "loss")
        gains = [lm_report.gain(rows, of, dense, "loss") for of in (name, less)]
        verdicts = [lm_report.verdict(*found) for found in gains if found is not None]
        notes.append(
            f"{name}, a loss below the dense one in equal time or in {LESS:g} of it: "
            + min(verdicts, key=lm_report.VERDICTS.index)
        )
    return notes + lm_report.ends_of_grids(rows, arms)


def picture(
    path: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    arms: Mapping[str, Arm],
    title: str,
) -> None:
    """The loss of each arm's first seed over the seconds of its training.

    The line across is the mean of the dense runs' last losses.
    """
    from matplotlib.figure import Figure  # of the extra `metrics`
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    dense = lm_report.tested(rows, next(iter(arms)))
    if dense and all(row["loss"] for row in dense):
        mean = np.mean([row["loss"] for row in dense])
        axes.axhline(mean, color="black", lw=0.5, zorder=0)
    for index, (name, arm) in enumerate(arms.items()):
        for called, style in (
            (name, "-" if arm.is_sparse else "--"),
            (shorter(name), ":"),
        ):
            for row in lm_report.tested(rows, called)[:1]:
                seconds, _, losses = np.array(row["history"], float).T
                label = f"{called}: {row['loss']:.4f}" if row["loss"] else called
                axes.plot(seconds, losses, style, color=f"C{index}", label=label)
    axes.set(
        xlabel="seconds of training",
        ylabel="loss on unseen text, nats a byte",
        title=title,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# --- The command line ---


def main(
    doc: str | None,
    argv: Sequence[str] | None,
    *,
    full: tuple[Callable[[], Mapping[str, Arm]], Sizes],
    quick: tuple[Callable[[], Mapping[str, Arm]], Sizes],
    columns: Sequence[str],
    title: str,
) -> None:
    """That of a study: `columns` are those that its arms tell."""
    parser = lm_command.make_parser()
    parser.add_argument("--seconds", type=float, help="of a run; runs to tune scale")
    parser.add_argument(
        "--as-in",
        type=pathlib.Path,
        metavar="JSON",
        help="of a race that is done: its best sparse arm, dense and controls, at the "
        "rates that were best there, are run alone",
    )
    args = common.parse_args(doc, repeats=3, quick_repeats=2, argv=argv, parser=parser)
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds must be above 0; got {args.seconds}")
    make_arms, sizes = quick if args.quick else full
    arms = make_arms()
    text = lm_text.load() if args.quick else installed_text.load()
    if args.seconds is not None:
        share = sizes.tuning_seconds / sizes.seconds
        lengths = {"seconds": args.seconds, "tuning_seconds": share * args.seconds}
        sizes = dataclasses.replace(sizes, **lengths)
    rates = None
    if args.as_in is not None:
        try:
            rates = repeated(json.loads(args.as_in.read_text())["rows"], arms)
        except (OSError, ValueError, TypeError, KeyError) as error:
            parser.exit(2, f"error: --as-in {args.as_in}: {error}\n")
    settings = {
        "repeats": args.repeats,
        **dataclasses.asdict(sizes),
        "arms": list(arms) if rates is None else rates,
        "text": f"{text['about']} {text['digest']}",
        "device_kind": jax.devices()[0].device_kind,  # another has another clock
    }
    ledger = lm_command.open_ledger(parser, args.json, settings, args.minutes)
    race = Race(arms, sizes, text, ledger)
    lm_command.run_and_tell(
        ledger,
        functools.partial(race.run, args.repeats, rates),
        table=functools.partial(table, arms=arms, columns=columns),
        conclusions=functools.partial(conclusions, arms=arms, seconds=sizes.seconds),
        draw=lambda path, lines: picture(path, ledger.rows, arms, title),
    )

"""What is told of a study's runs: a line a method, who is better, and a picture.

Rows are those of `lm_study.Ledger` with `method`, `judged_on`, `seed` and losses, nats
a token; one that is not finite is None. Where a study prunes, there are `loss_before`
and `loss_after` the hard prune, and the latter is what counts if nothing else is said.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.parts import common

Row = Mapping[str, Any]
BEFORE, AFTER = "loss_before", "loss_after"
VERDICTS = ("holds", "holds, but within two standard errors", "DOES NOT HOLD")


def loss_of(row: Row, column: str = AFTER) -> float:
    """A run that diverged is the worst."""
    loss = row[column]
    return math.inf if loss is None else loss


def tested(rows: Iterable[Row], method: str) -> list[Row]:
    return [
        row for row in rows if row["method"] == method and row["judged_on"] == "test"
    ]


def table(
    rows: Sequence[Row],
    methods: Iterable[str],
    columns: Sequence[str],
    losses: Sequence[str] = (BEFORE, AFTER),
) -> list[dict[str, Any]]:
    """A line a method: means over the seeds that were judged on `test`.

    `columns` are taken from the first seed.
    """
    lines = []
    for name in methods:
        found = tested(rows, name)
        if not found:
            continue
        line = {"method": name, "seeds": len(found)}
        line |= {key: found[0].get(key) for key in columns}
        for column in losses:
            of_seeds = [loss_of(row, column) for row in found]
            line[column], error = common.mean_and_error(of_seeds)
            if len(of_seeds) > 1:
                line[f"{column}_se"] = error
            if "loss" in column:
                line[column.replace("loss", "perplexity")] = math.exp(line[column])
        lines.append(line)
    return lines


def waiting(rows: Iterable[Row], names: Iterable[str], num_seeds: int) -> list[str]:
    """Which methods are not yet judged on `test` with all seeds."""
    rows = list(rows)
    return [name for name in names if len(tested(rows, name)) < num_seeds]


def gain(
    rows: Sequence[Row], better: str, worse: str, column: str = AFTER
) -> tuple[float, float] | None:
    """How much lower the one's loss is, in pairs of seeds that both have; its error.

    Nothing without a pair; the error of a single one is NaN.
    """
    others = {row["seed"]: loss_of(row, column) for row in tested(rows, worse)}
    gains = [
        others[row["seed"]] - loss_of(row, column)
        for row in tested(rows, better)
        if row["seed"] in others
    ]
    return common.mean_and_error(gains) if gains else None


def verdict(by: float, error: float) -> str:
    """One of `VERDICTS` on a loss that is to be lower, by what `gain` gives."""
    if not by > 0:
        return VERDICTS[2]
    return VERDICTS[1] if by <= 2 * error else VERDICTS[0]


def compare(
    rows: Sequence[Row], better: str, worse: str, column: str = AFTER
) -> list[str]:
    """Whether one method has the lower loss, see `gain`; nothing without a pair."""
    found = gain(rows, better, worse, column)
    if found is None:
        return []
    by, error = found
    is_single = math.isnan(error) and math.isfinite(by)  # none has diverged
    spread = "one seed" if is_single else f"+- {error:.1g}"
    said = "holds, but of one seed" if is_single and by > 0 else verdict(by, error)
    return [
        f"{better} better than {worse} in {column}: by {by:.4f} nats ({spread}): {said}"
    ]


def ends_of_grids(rows: Sequence[Row], methods: Iterable[str]) -> list[str]:
    """Which methods took the lowest or the highest rate that they were tuned over."""
    notes = []
    for name in methods:
        tuned = [
            row for row in rows if row["method"] == name and row["judged_on"] == "tune"
        ]
        tried, taken = ({row["lr"] for row in of} for of in (tuned, tested(rows, name)))
        if tried and taken & {min(tried), max(tried)}:
            notes.append(f"{name}: its best lr is at the end of what was tried")
    return notes


def picture(
    path: pathlib.Path, lines: Sequence[Row], *, title: str, dense: str
) -> None:
    """A line a method, from the loss before the prune to that after it."""
    from matplotlib.figure import Figure  # of the extra `metrics`

    figure = Figure(figsize=(8, 1 + 0.4 * len(lines)), layout="constrained")
    axes = figure.subplots()
    blue = "tab:blue"
    for y, line in enumerate(lines):
        before, after = line["loss_before"], line["loss_after"]
        labels = ("before the hard prune", "after it") if y == 0 else (None, None)
        axes.plot([before, after], [y, y], color="lightgray", lw=3, zorder=1)
        axes.scatter(before, y, s=60, fc="white", ec=blue, zorder=2, label=labels[0])
        axes.scatter(after, y, s=20, color=blue, zorder=3, label=labels[1])
        numbers = f"  {before:.3f}" + (f" to {after:.3f}" if after != before else "")
        axes.annotate(numbers, (max(before, after), y), va="center", fontsize="small")
        if line["method"] == dense:
            axes.axvline(before, color="black", ls="--", lw=1, zorder=0, label=dense)
    axes.set_yticks(range(len(lines)), [line["method"] for line in lines])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel="loss on unseen documents, nats a token", title=title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)

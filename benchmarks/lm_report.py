"""What is told of a study's runs: a line a method, who is better, and a picture.

Rows are those of `lm_study.Ledger` with `method`, `judged_on`, `seed`, `loss_before`
and `loss_after` the hard prune, nats a token; a loss that is not finite is None.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import common

Row = Mapping[str, Any]


def loss_of(row: Row, *, after: bool = True) -> float:
    """After the hard prune or before it; a run that diverged is the worst."""
    loss = row["loss_after" if after else "loss_before"]
    return math.inf if loss is None else loss


def tested(rows: Iterable[Row], method: str) -> list[Row]:
    return [
        row for row in rows if row["method"] == method and row["judged_on"] == "test"
    ]


def table(
    rows: Sequence[Row], methods: Iterable[str], columns: Sequence[str]
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
        for key, after in (("before", False), ("after", True)):
            losses = [loss_of(row, after=after) for row in found]
            line[f"loss_{key}"], error = common.mean_and_error(losses)
            if len(losses) > 1:
                line[f"loss_{key}_se"] = error
            line[f"perplexity_{key}"] = math.exp(line[f"loss_{key}"])
        lines.append(line)
    return lines


def compare(rows: Sequence[Row], better: str, worse: str) -> list[str]:
    """Whether one method is better after the prune, in pairs of seeds that both have.

    Nothing without a pair.
    """
    others = {row["seed"]: loss_of(row) for row in tested(rows, worse)}
    gains = [
        others[row["seed"]] - loss_of(row)
        for row in tested(rows, better)
        if row["seed"] in others
    ]
    if not gains:
        return []
    gain, error = common.mean_and_error(gains)
    spread = "one seed" if math.isnan(error) else f"+- {error:.1g}"
    verdict = "holds" if gain > 0 else "DOES NOT HOLD"
    if gain > 0 and not math.isnan(error) and gain <= 2 * error:
        verdict += ", but within two standard errors"
    return [
        f"{better} better than {worse} after the prune: by {gain:.4f} nats ({spread}): "
        f"{verdict}"
    ]


def picture(
    path: pathlib.Path, lines: Sequence[Row], *, title: str, dense: str
) -> None:
    """A line a method, from the loss before the prune to that after it."""
    from matplotlib.figure import Figure  # of the extra `examples`

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

"""What a run has to tell: one picture and one table."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from sparsejax._extras import Extra
from sparsejax.training._files import write_atomic
from sparsejax.training._runs import Row


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays rows out as a table that reads well as text and as Markdown.

    Columns are the keys of the first row; floats get four decimals, None a dash. Of no
    rows it is empty.

    Example:
      >>> print(markdown_table([{"model": "dense", "loss": 1.5}, {"model": "sparse"}]))
      | model  |   loss |
      |--------|-------:|
      | dense  | 1.5000 |
      | sparse |      - |
    """
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    number = [not isinstance(rows[0][column], str) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, number, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width + 1) + (":" if right else "-")
        for width, right in zip(widths, number, strict=True)
    ]
    return "\n".join([line(columns), f"|{'|'.join(rule)}|", *map(line, cells)])


def draw_report(
    path: str | Path,
    rows: Sequence[Row],
    *,
    title: str,
    mask: Bool[np.ndarray, "rows cols"] | None = None,
    mask_name: str = "",
) -> None:
    """Draws a run's metrics into a PNG.

    Four panels, each left empty where the run has no such numbers: bits per byte of
    every phase, on training batches and on validation; the sparsity of each leaf over
    time, and the share of its magnitude that sits on pruned weights; the mask drift
    (weights whose mask changed) per tenth of a phase; and a corner of one mask.

    Args:
      path: of the PNG; replaced as a whole.
      rows: what `Run.rows` returns. Used are `bits_per_byte`, `mask_changes`,
        `validation_bits_per_byte`, and, dicts by leaf, `leaf_sparsity` and
        `leaf_pruned_magnitude`: the shares that `metrics.leaf_metrics` measures.
      title: stands above.
      mask: True = kept.
      mask_name: stands above the mask.
    """
    with Extra("examples"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    (loss, sparsity), (drift, corner) = figure.subplots(2, 2)
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    for index, phase in enumerate(phases):
        of_phase = [row for row in rows if row["phase"] == phase]
        _draw_loss(loss, of_phase, label=phase, color=f"C{index}")
        _draw_leaves(sparsity, of_phase)
        _draw_drift(drift, of_phase, label=phase, color=f"C{index}")
    loss.set(title="bits per byte (dots: validation)", xlabel="step")
    loss.set_ylim(*_interesting(_series(rows, "validation_bits_per_byte")[1]))
    loss.legend()
    sparsity.set(
        title="sparsity by leaf (dashed: pruned share of L1 norm)",
        xlabel="step",
        ylim=(0, 1),
    )
    drift.set(title="mask drift: weights that changed sides (SAD)", xlabel="step")
    _draw_mask(corner, mask, mask_name)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_atomic(path, png.getvalue())


def _interesting(values: np.ndarray) -> tuple[float | None, float | None]:
    """Limits that leave room for the end of training; its first steps run out."""
    if not values.size:
        return None, None
    low, high = values.min(), values.max()
    return 0.95 * low, min(1.02 * high, 1.6 * low)


def _draw_loss(axes: Any, rows: Sequence[Row], *, label: str, color: str) -> None:
    steps, values = _series(rows, "bits_per_byte")
    if values.size:
        # An average over a fortieth of the phase; the first values are left out.
        width = max(1, values.size // 40)
        mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[width - 1 :], mean, color=color, alpha=0.6, lw=1)
    steps, values = _series(rows, "validation_bits_per_byte")
    axes.plot(steps, values, "o-", color=color, ms=3, lw=1.5, label=label)


def _draw_leaves(axes: Any, rows: Sequence[Row]) -> None:
    for key, style in (("leaf_sparsity", "-"), ("leaf_pruned_magnitude", "--")):
        measured = [row for row in rows if row.get(key)]
        names = list(measured[0][key]) if measured else []
        for index, name in enumerate(names):
            color = (index / len(names), 0.3, 1 - index / len(names))  # blue to red
            values = [row[key][name] for row in measured]
            axes.plot([row["step"] for row in measured], values, style, color=color)


def _draw_drift(axes: Any, rows: Sequence[Row], *, label: str, color: str) -> None:
    steps, changes = _series(rows, "mask_changes")
    if not changes.any():
        return
    parts = [part for part in np.array_split(np.arange(steps.size), 10) if part.size]
    heights = [changes[part].sum() for part in parts]
    left = [steps[part[0]] for part in parts]
    widths = [part.size for part in parts]
    axes.bar(left, heights, widths, align="edge", color=color, ec="white", label=label)
    axes.legend()


def _draw_mask(axes: Any, mask: np.ndarray | None, name: str) -> None:
    axes.set_axis_off()
    if mask is not None:
        corner = np.asarray(mask)[:64, :64]
        axes.imshow(corner, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{name}, corner of {mask.shape} (black: kept)")


def _series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps), np.array(values)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else str(value)
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else str(value)

"""Pictures of metrics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Real

from sparsejax._extras import Extra


def plot_density(
    steps: Real[ArrayLike, " points"],
    densities: Real[ArrayLike, "points layers"],
    *,
    names: Sequence[str] | None = None,
    title: str = "activation density by layer",
    log: bool = False,
) -> Any:
    """Draws the density of each layer over training.

    One panel. The horizontal axis is the training step, the vertical one the density:
    the share of activations in use, a fraction from 0 to 1. Each layer is a line, from
    blue (first layer) to red (last); their mean is dashed black.

    Args:
      steps: training step of each measurement.
      densities: of each layer at each step, such as `ActivationCounts.density`.
      names: of the layers, for the legend; default: layer 0, 1, ...
      title: stands above.
      log: draws densities on a logarithmic axis, for very sparse layers; zeros are then
        not shown.

    Returns:
      A `matplotlib.figure.Figure`, bound to no window; `figure.savefig(path)` saves it.

    Raises:
      ValueError: if the shapes do not fit, or a density is not in [0, 1].

    Example:
      >>> figure = plot_density([0, 100], [[0.5, 0.5], [0.2, 0.1]])
      >>> figure.axes[0].get_xlabel()
      'training step'
    """
    steps, densities = np.asarray(steps), np.asarray(densities, np.float64)
    if densities.ndim != 2 or steps.shape != densities.shape[:1]:
        raise ValueError(
            "`densities` must be [points, layers] with one row for each of `steps`; "
            f"got {densities.shape} for steps of shape {steps.shape}."
        )
    if not np.all((densities >= 0) & (densities <= 1)):
        raise ValueError(
            "`densities` must be fractions in [0, 1]; got values from "
            f"{densities.min()} to {densities.max()}. Divide percentages by 100."
        )
    num_layers = densities.shape[1]
    names = [f"layer {i}" for i in range(num_layers)] if names is None else names
    if len(names) != num_layers:
        raise ValueError(
            f"`names` must have one entry for each of the {num_layers} layers; got "
            f"{len(names)}."
        )
    with Extra("metrics"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names):
        depth = index / max(num_layers - 1, 1)
        color = (depth, 0.3, 1 - depth)
        axes.plot(steps, densities[:, index], ".-", color=color, lw=1, label=name)
    if num_layers > 1:
        mean = densities.mean(axis=1)
        axes.plot(steps, mean, "--", color="black", lw=2, label="mean of layers")
    axes.set(title=title, xlabel="training step", ylabel="density (share in use)")
    if log:
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(top=1)
    else:
        axes.set_ylim(0, 1)
    if num_layers:
        axes.legend(fontsize="small", ncols=max(1, (num_layers + 1) // 12))
    return figure

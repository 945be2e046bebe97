"""How the activation ratio changes with training: two fitted laws."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float

from sparsejax._extras import Extra


class ReluLaw(NamedTuple):
    """`A(D) = exp(-c * D**alpha + b) + limit`: falls towards `limit`."""

    alpha: float
    b: float
    c: float
    limit: float  # A0, the activation ratio after endless training


class SiluLaw(NamedTuple):
    """`A(D) = -c / D**alpha + limit`: rises towards `limit`."""

    alpha: float
    c: float
    limit: float  # A0, the activation ratio after endless training


def relu_law(
    law: ReluLaw, tokens: Float[ArrayLike, "*points"]
) -> Float[np.ndarray, "*points"]:
    """The activation ratio that a fitted law gives a ReLU model.

    Args:
      law: from `fit_relu_law`.
      tokens: trained on, in the unit of the fit (the paper's are billions).

    Returns:
      Fractions, float64.

    Example:
      >>> law = ReluLaw(alpha=1.53, b=-3.46, c=1.56e-4, limit=0.0648)  # 2.4B, table
      >>> relu_law(law, [400, 800]).round(4)
      array([0.0719, 0.0652])

    References:
      Luo et al., 2024, https://arxiv.org/abs/2411.02335: the power laws and their fits.
    """
    tokens = np.asarray(tokens, np.float64)
    return np.exp(-law.c * tokens**law.alpha + law.b) + law.limit


def silu_law(
    law: SiluLaw, tokens: Float[ArrayLike, "*points"]
) -> Float[np.ndarray, "*points"]:
    """The activation ratio that a fitted law gives a SiLU model.

    Args:
      law: from `fit_silu_law`.
      tokens: trained on, in the unit of the fit (the paper's are billions).

    Returns:
      Fractions, float64.

    Example:
      >>> law = SiluLaw(alpha=1.0, c=0.4, limit=0.38)
      >>> silu_law(law, [4.0, 40.0])
      array([0.28, 0.37])

    References:
      Luo et al., 2024, https://arxiv.org/abs/2411.02335: the power laws and their fits.
    """
    return -law.c / np.asarray(tokens, np.float64) ** law.alpha + law.limit


def fit_relu_law(
    tokens: Float[ArrayLike, " points"], ratios: Float[ArrayLike, " points"]
) -> ReluLaw:
    """Fits the activation ratios of a ReLU model over training.

    Least squares by Levenberg-Marquardt, on the host, from the best point of a grid.
    Needs SciPy. The limit is only as good as the data: measure until the curve is
    nearly flat.

    Args:
      tokens: trained on at each checkpoint, positive; the paper's unit is billions.
      ratios: activation ratios (densities) there, fractions in (0, 1), all measured in
        one way, such as CETT-PPL-1%.

    Returns:
      The law; `relu_law` evaluates it.

    Raises:
      ValueError: if there are fewer than 4 checkpoints, or values out of range.

    Example:
      >>> tokens = np.linspace(10, 800, 40)
      >>> law = ReluLaw(alpha=1.53, b=-3.46, c=1.56e-4, limit=0.0648)
      >>> round(fit_relu_law(tokens, relu_law(law, tokens)).limit, 4)
      0.0648

    References:
      Luo et al., 2024, https://arxiv.org/abs/2411.02335: the power laws and their fits.
      The starting point is ours.
    """
    tokens, ratios, unit = _checked(tokens, ratios, num_parameters=4)
    starts = []
    for alpha in np.linspace(0.1, 2.0, 20):
        for log_c in np.linspace(-6.0, 3.0, 28):
            # For given exponents the law is a line in exp(b) and the limit.
            line = _line(np.exp(-np.exp(log_c) * tokens**alpha), ratios)
            if line is not None and line.slope > 0:
                start = alpha, math.log(line.slope), log_c, line.intercept
                starts.append((line.error, start))
    # nothing falls: a flat curve, whose exponents no fit can tell
    start = min(starts)[1] if starts else (1.0, -9.0, 0.0, float(np.mean(ratios)))
    alpha, b, log_c, limit = _least_squares(
        lambda p: np.exp(-np.exp(p[2]) * tokens ** p[0] + p[1]) + p[3] - ratios, start
    )
    return ReluLaw(alpha, b, math.exp(log_c) / unit**alpha, limit)


def fit_silu_law(
    tokens: Float[ArrayLike, " points"], ratios: Float[ArrayLike, " points"]
) -> SiluLaw:
    """Fits the activation ratios of a SiLU model over training.

    Least squares by Levenberg-Marquardt, on the host, from the best point of a grid.
    Needs SciPy.

    Args:
      tokens: trained on at each checkpoint, positive; the paper's unit is billions.
      ratios: activation ratios (densities) there, fractions in (0, 1), all measured in
        one way, such as CETT-PPL-1%.

    Returns:
      The law; `silu_law` evaluates it.

    Raises:
      ValueError: if there are fewer than 3 checkpoints, or values out of range.

    Example:
      >>> tokens = np.linspace(10, 800, 40)
      >>> law = SiluLaw(alpha=0.995, c=0.562, limit=0.383)
      >>> round(fit_silu_law(tokens, silu_law(law, tokens)).limit, 4)
      0.383

    References:
      Luo et al., 2024, https://arxiv.org/abs/2411.02335: the power laws and their fits.
      The starting point is ours.
    """
    tokens, ratios, unit = _checked(tokens, ratios, num_parameters=3)
    starts = []
    for alpha in np.linspace(0.1, 3.0, 30):
        line = _line(tokens**-alpha, ratios)  # a line in c and the limit
        if line is not None:
            starts.append((line.error, (alpha, -line.slope, line.intercept)))
    start = min(starts)[1] if starts else (1.0, 0.0, float(np.mean(ratios)))
    alpha, c, limit = _least_squares(
        lambda p: -p[1] * tokens ** -p[0] + p[2] - ratios, start
    )
    return SiluLaw(alpha, c * unit**alpha, limit)


class _Line(NamedTuple):
    slope: float
    intercept: float
    error: float  # sum of squares


def _line(x: np.ndarray, y: np.ndarray) -> _Line | None:
    """The least-squares line; None if the points share one x."""
    x_mean, y_mean = x.mean(), y.mean()
    spread = np.sum((x - x_mean) ** 2)
    if spread <= 1e-20:
        return None
    slope = float(np.sum((x - x_mean) * (y - y_mean)) / spread)
    intercept = float(y_mean - slope * x_mean)
    return _Line(slope, intercept, float(np.sum((slope * x + intercept - y) ** 2)))


def _least_squares(
    residuals: Callable[[np.ndarray], np.ndarray], start: tuple[float, ...]
) -> list[float]:
    with Extra("metrics"):
        from scipy import optimize

    with np.errstate(over="ignore", invalid="ignore"):  # a wild step is rejected
        found = optimize.least_squares(
            residuals, np.array(start), method="lm", x_scale="jac", max_nfev=5000
        )
    return [float(value) for value in found.x]


def _checked(
    tokens: Float[ArrayLike, " points"],
    ratios: Float[ArrayLike, " points"],
    *,
    num_parameters: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Float64 arrays with the tokens in units of their geometric mean, and that."""
    tokens, ratios = np.asarray(tokens, np.float64), np.asarray(ratios, np.float64)
    if tokens.ndim != 1 or tokens.shape != ratios.shape or tokens.size < num_parameters:
        raise ValueError(
            "`tokens` and `ratios` must be lists of one length, at least "
            f"{num_parameters}; got shapes {tokens.shape} and {ratios.shape}."
        )
    if not np.all((tokens > 0) & np.isfinite(tokens)):
        raise ValueError(
            f"`tokens` must be positive and finite; got {tokens.min()}. Leave the "
            "checkpoint before training out."
        )
    if not np.all((ratios > 0) & (ratios < 1)):
        raise ValueError(
            "`ratios` must be fractions in (0, 1); got values from "
            f"{ratios.min()} to {ratios.max()}. Divide percentages by 100."
        )
    unit = float(np.exp(np.mean(np.log(tokens))))
    return tokens / unit, ratios, unit

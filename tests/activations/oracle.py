"""Slow NumPy forms of the selectors in float64, written from the paper."""

import math

import numpy as np


def quantile(p):
    """The standard normal quantile, by bisection of its distribution."""
    low, high = -40.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        if 0.5 * math.erfc(-middle / math.sqrt(2)) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def threshold_of_row(row, k, ddof=0):
    """theta of one row of entries that all count; -inf if all survive."""
    n = len(row)
    if k >= n:
        return -math.inf
    mean = sum(row) / n
    std = math.sqrt(sum((v - mean) ** 2 for v in row) / (n - ddof))
    return mean + std * quantile(1 - k / n)


def soft(u, delta=0.0):
    if u <= 0:
        return 0.0
    return u * u / (2 * delta) if u <= delta else u - delta / 2


def statistical(x, k, *, where=None, ddof=0, delta=0.0):
    """(values, thresholds) of rows along the last axis."""
    x = np.asarray(x, np.float64)
    where = np.broadcast_to(True if where is None else where, x.shape)
    values, thetas = np.zeros(x.shape), np.zeros((*x.shape[:-1], 1))
    for i in np.ndindex(x.shape[:-1]):
        row = [float(v) for v, kept in zip(x[i], where[i], strict=True) if kept]
        theta = threshold_of_row(row, k, ddof)
        thetas[i] = theta
        for j in range(x.shape[-1]):
            if where[i][j]:
                full = theta == -math.inf
                values[i][j] = x[i][j] if full else soft(x[i][j] - theta, delta)
    return values, thetas


def statistical_gradient(x, g, k):
    """The derivative of `statistical`, row by row, its sums written out."""
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    d = x.shape[-1]
    z = quantile(1 - k / d)
    dx = np.zeros(x.shape)
    for i in np.ndindex(x.shape[:-1]):
        mean, std = x[i].mean(), x[i].std()
        active = x[i] > mean + z * std
        total = g[i][active].sum()
        dx[i] = g[i] * active - total * (1 / d + z * (x[i] - mean) / (d * std))
    return dx


def exact(x, k):
    """The mask of the k highest, ties to the lower index, NaN lowest."""
    x = np.asarray(x, np.float64)
    mask = np.zeros(x.shape, bool)
    for i in np.ndindex(x.shape[:-1]):
        row = [(bool(np.isnan(v)), -v, j) for j, v in enumerate(x[i])]
        row = [(nan, 0.0 if nan else v, j) for nan, v, j in row]
        for _, _, j in sorted(row)[:k]:
            mask[i][j] = True
    return mask


def blocks(x, k, block, pool, where=None):
    """(values, mask) of rows along the last axis."""
    x = np.asarray(x, np.float64)
    where = np.broadcast_to(True if where is None else where, x.shape)
    values, mask = np.zeros(x.shape), np.zeros(x.shape, bool)
    for i in np.ndindex(x.shape[:-1]):
        num = int(where[i].sum())
        tiles = {}
        for start in range(0, x.shape[-1], block):
            inside = [j for j in range(start, start + block) if where[i][j]]
            if inside:
                entries = [x[i][j] for j in inside]
                score = max(entries) if pool == "max" else sum(entries) / len(entries)
                tiles[tuple(inside)] = score
        if k >= num:
            values[i], mask[i] = np.where(where[i], x[i], 0), where[i]
            continue
        scores = list(tiles.values())
        mean = sum(scores) / len(scores)
        std = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
        theta = mean + std * quantile(1 - k / num)
        for inside, score in tiles.items():
            if score > theta:
                for j in inside:
                    mask[i][j] = True
                    values[i][j] = max(x[i][j] - theta, 0.0)
    return values, mask

"""The rooms' promises in slow NumPy and Python, from the papers' equations."""

import itertools
import math

import numpy as np


def best_first(values, among=None):
    """Flat indices by falling value: NaN last, of equal ones the lower index first."""
    values = np.asarray(values, np.float64).reshape(-1)
    chosen = range(values.size) if among is None else np.flatnonzero(among)
    # sorted is stable; -0.0 == 0.0
    return sorted(
        chosen, key=lambda i: (1, 0) if math.isnan(values[i]) else (0, -values[i])
    )


def topk(values, num_kept, among=None):
    mask = np.zeros(np.shape(values), bool)
    mask.reshape(-1)[best_first(values, among)[:num_kept]] = True
    return mask


def per_layer(fn, stacked, *arrays):
    """Applies `fn` to each index of the stacked axes."""
    lead = arrays[0].shape[:stacked]
    out = [fn(*(a[i] for a in arrays)) for i in np.ndindex(lead)]
    return np.reshape(out, lead + np.shape(out[0])) if out else None


def groups(shape, m, axis):
    """The index arrays of each N:M group of an array."""
    axis %= len(shape)
    flat = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), axis, -1)
    return flat.reshape(-1, m)


def nm(values, n, m, axis, among=None):
    """`n` is a number, or one per group in the order of `groups`."""
    values = np.asarray(values, np.float64)
    # the library ranks -inf and NaN alike, as lowest
    flat = np.where(values == -np.inf, np.nan, values).reshape(-1)
    allowed = np.ones(flat.shape, bool) if among is None else among.reshape(-1)
    mask = np.zeros(flat.shape, bool)
    found = groups(values.shape, m, axis)
    for group, count in zip(found, np.broadcast_to(n, len(found)), strict=True):
        order = best_first(flat[group], allowed[group])
        mask[group[order[:count]]] = True
    return mask.reshape(values.shape)


def tiles(shape, block):
    """Slices of each block, in row-major order; blocks cover the last axes."""
    split = len(shape) - len(block)
    block = (1,) * split + tuple(block)
    starts = [range(0, size, b) for size, b in zip(shape, block, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, start + b) for start, b in zip(corner, block, strict=True)
        )


def channels(shape, axis):
    """Slices of each channel along `axis`."""
    for i in range(shape[axis]):
        index = [slice(None)] * len(shape)
        index[axis] = slice(i, i + 1)
        yield tuple(index)


def units(shape, kind):
    """Slices of each unit of one layer: ("block", shape), ("channel", axis), None."""
    if kind is None:
        kind = ("block", (1,) * len(shape))
    name, value = kind
    if name == "block":
        return list(tiles(shape, value))
    return list(channels(shape, value % len(shape)))

"""What selectors share: the highest of a row, by sorting and by counting pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import _window

FORMS = (_window._keep_by_sorting, _window._keep_by_counting)


def oracle(row, num_kept):
    """Numbers from the highest, NaN after them; of equal ones those further left."""
    numbers = [i for i in range(len(row)) if not np.isnan(row[i])]
    order = sorted(numbers, key=lambda i: (-row[i], i))
    order += [i for i in range(len(row)) if np.isnan(row[i])]
    kept = np.zeros(len(row), bool)
    kept[order[:num_kept]] = True
    return kept


def rows(size):
    rng = np.random.default_rng(size)
    found = rng.integers(-2, 3, (2, 3, size)).astype(np.float32)
    for value in (np.nan, np.inf, -np.inf):
        found[rng.random(found.shape) < 0.15] = value
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 9, 70])
def test_keeps_the_highest(form, size):
    values = rows(size)
    for num_kept in {1, size // 2 or 1, size}:
        got = np.asarray(form(jnp.asarray(values), num_kept))
        for at in np.ndindex(2, 3):
            np.testing.assert_array_equal(got[at], oracle(values[at], num_kept))


@pytest.mark.parametrize("form", FORMS)
def test_keeps_as_many_as_each_row_asks(form):
    values = rows(20)
    counts = np.arange(6).reshape(2, 3) * 4
    got = np.asarray(form(jnp.asarray(values), jnp.asarray(counts)))
    for at in np.ndindex(2, 3):
        np.testing.assert_array_equal(got[at], oracle(values[at], counts[at]))
    np.testing.assert_array_equal(got.sum(-1), counts)

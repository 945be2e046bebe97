"""How tiles are shared out: complete, in order, and balanced to a list."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

_schedule = importlib.import_module("sparsejax.ops.block_matmul._schedule")


@functools.partial(jax.jit, static_argnums=(1, 2))
def cut(costs, windows, programs):
    """First and last list of each program in each window, `[windows, programs]`."""
    share = jnp.sum(costs) / programs

    def of_program(number):
        targets = [share * number, share * (number + 1)]
        at = _schedule.cuts(lambda i: costs[i], len(costs), targets)
        return [
            jnp.stack([_schedule.whole(a, jnp.int32(g), windows) for a in at])
            for g in range(windows)
        ]

    found = jax.vmap(of_program)(jnp.arange(programs))
    return jnp.stack(found).transpose(2, 0, 1)


def loads(costs, first, last):
    """The cost of each program's lists over all windows."""
    ends = np.concatenate([[0], np.cumsum(costs)])
    return (ends[last] - ends[first]).sum(axis=0)


class ShareTest(parameterized.TestCase):
    @parameterized.product(windows=[1, 4, 7], programs=[1, 5, 33])
    def test_complete_and_balanced(self, windows, programs):
        costs = np.random.default_rng(windows).integers(1, 10, 43)
        costs[3] = 90  # one long list
        first, last = np.asarray(cut(jnp.asarray(costs), windows, programs))
        np.testing.assert_array_equal(first[:, 0], 0)
        np.testing.assert_array_equal(last[:, -1], 43)
        np.testing.assert_array_equal(first[:, 1:], last[:, :-1])  # each list once
        self.assertTrue((last >= first).all())
        fair = windows * costs.sum() / programs
        # at either end of a share the error is below one list, in all windows
        error = np.abs(loads(costs, first, last) - fair)
        self.assertLess(error.max(), 2 * costs.max())
        long = ((first <= 4) & (last >= 3)).any(axis=0)
        # neither end is in or beside the long list
        self.assertLess(error[~long].max(initial=0), 2 * np.sort(costs)[-2])

    def test_beyond_the_last(self):
        costs = jnp.array([3, 1, 2], jnp.int32)
        at = _schedule.cuts(lambda i: costs[i], 3, [jnp.float32(n) for n in (6, 9)])
        self.assertEqual(list(map(float, at)), [3, 3])

    def test_equal_costs(self):
        first, last = cut(jnp.ones(8, jnp.int32), 2, 4)
        np.testing.assert_array_equal(first, [[0, 2, 4, 6]] * 2)
        np.testing.assert_array_equal(last, [[2, 4, 6, 8]] * 2)

    def test_a_full_list_among_short_ones(self):
        """One full block column among 63 of 10 %: within 1.3 of an even share."""
        costs = np.full(64, 6)
        costs[10] = 64
        first, last = np.asarray(cut(jnp.asarray(costs), 8, 33))
        load = loads(costs, first, last)
        self.assertLess(load.max(), 1.3 * load.mean())


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0, 1))
def test_every_kept_block_is_found_once(seed, density):
    kept = np.random.default_rng(seed).random((20, 35)) < density
    num = kept.sum(axis=1)
    found = _walk(jnp.asarray(num), 20 * 35)[: num.sum()]
    want = [(row, entry) for row in range(20) for entry in range(num[row])]
    assert sorted(map(tuple, found.tolist())) == want


def test_blocks_found_together_lie_together():
    """Of a full mask, 256 in a row are 16 rows and 16 columns."""
    found = _walk(jnp.full(64, 64), 64 * 64)
    for first in range(0, 64 * 64, 256):
        for axis in range(2):
            assert len(np.unique(found[first : first + 256, axis])) == 16


@functools.partial(jax.jit, static_argnums=1)
def _find(num, rows):
    start = jnp.int32(-1), jnp.int32(0), jnp.int32(0)
    return _schedule.nth_kept(start, jnp.int32(7), lambda r: num[r], rows, 35)


def test_ends_where_there_are_not_as_many():
    for kept in (0, 6):
        (region, *_), _, _ = _find(jnp.zeros(20, jnp.int32).at[3].set(kept), 20)
        assert region == 2 * 3 - 1  # the last: two times 16 rows, three strips


@functools.partial(jax.jit, static_argnums=1)
def _scan(num, most):
    def step(state, n):
        state, row, entry = _schedule.nth_kept(state, n, lambda r: num[r], *_sizes(num))
        return state, jnp.stack([row, entry])

    start = jnp.int32(-1), jnp.int32(0), jnp.int32(0)
    # those beyond the last are not asked for
    numbers = jnp.minimum(jnp.arange(most), jnp.maximum(num.sum() - 1, 0))
    return jax.lax.cond(
        num.sum() > 0,
        lambda: jax.lax.scan(step, start, numbers)[1],
        lambda: jnp.zeros((most, 2), jnp.int32),
    )


def _sizes(num):
    return (20, 35) if len(num) == 20 else (64, 64)


def _walk(num, most):
    return np.asarray(_scan(num.astype(jnp.int32), most))

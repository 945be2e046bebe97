"""How tiles are shared out: complete, in order, and balanced to a tile."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.formats import BlockMask

_schedule = importlib.import_module("sparsejax.ops.block_matmul._schedule")


class SharesTest(parameterized.TestCase):
    @parameterized.product(windows=[1, 4, 7], copies=[1, 3], programs=[1, 5, 132])
    def test_complete_and_balanced(self, windows, copies, programs):
        costs = np.random.default_rng(windows).uniform(0.5, 9, 40).astype(np.float32)
        costs[3] = 90  # one long list
        got = np.asarray(
            _schedule.shares(
                jnp.asarray(costs), copies=copies, windows=windows, programs=programs
            )
        )
        self.assertEqual(got.shape, (windows, programs + 1))
        np.testing.assert_array_equal(got[:, 0], 0)
        np.testing.assert_array_equal(got[:, -1], 40 * copies)
        self.assertTrue((np.diff(got, axis=1) >= 0).all())
        tile_costs = np.repeat(costs, copies)
        ends = np.concatenate([[0], np.cumsum(tile_costs)])
        load = np.diff(ends[got], axis=1).sum(axis=0)
        fair = windows * tile_costs.sum() / programs
        # at either end of a share the error is below one tile of its list, in all
        error = np.abs(load - fair)
        self.assertLess(error.max(), 2 * costs.max())
        long = (got[:, :-1] <= 4 * copies) & (got[:, 1:] >= 3 * copies)
        short = ~long.any(axis=0)  # neither end is in or beside the long list
        self.assertLess(error[short].max(initial=0), 2 * np.sort(costs)[-2])

    def test_equal_costs(self):
        got = _schedule.shares(jnp.ones(8), copies=2, windows=1, programs=4)
        np.testing.assert_array_equal(got, [[0, 4, 8, 12, 16]])

    def test_a_full_list_among_short_ones(self):
        """One full block column among 63 of 10 %: within 1.2 of an even share."""
        counts = np.full(64, 6.0, np.float32)
        counts[10] = 64
        got = np.asarray(
            _schedule.shares(jnp.asarray(counts), copies=8, windows=4, programs=132)
        )
        ends = np.concatenate([[0], np.cumsum(np.repeat(counts, 8))])
        load = np.diff(ends[got], axis=1).sum(axis=0)
        self.assertLess(load.max(), 1.2 * load.mean())


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0, 1))
def test_kept_blocks_come_first(seed, density):
    kept = np.random.default_rng(seed).random((20, 35)) < density
    order, num_kept = _kept_first(kept)
    assert num_kept == kept.sum()
    np.testing.assert_array_equal(np.sort(order), np.arange(kept.size))
    assert kept.reshape(-1)[order[:num_kept]].all()


@jax.jit
def _jitted(kept):
    return _schedule.kept_first(BlockMask.from_blocks(kept, (8, 8)))


def _kept_first(kept):
    order, num_kept = _jitted(kept)
    return np.asarray(order), int(num_kept)

"""Each tile is some program's, once, in whichever order; programs stay together."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

_plan, _tiles, _together = (
    importlib.import_module(f"sparsejax.ops.block_matmul.{name}")
    for name in ("_plan", "_tiles", "_together")
)


@functools.partial(jax.jit, static_argnums=1)
def visited(num, plan):
    """How often each tile is visited, and by whom, `[row_tiles, units]`."""
    operands = plan.operands(num)

    def of_program(program, found):
        def visit(row_tile, unit, found):
            times, owner = found
            at = row_tile, unit
            return times.at[at].add(1), owner.at[at].set(program)

        return plan.walk(operands, program, visit, found)

    nothing = jnp.zeros((plan.row_tiles, plan.units), jnp.int32)
    found = nothing, nothing - 1
    return jax.lax.fori_loop(0, plan.order.programs, of_program, found)


def make(lists, units_of_list, row_tiles, window, num_sms, together):
    tiles = _tiles.Tiles(128, 8, window=window, num_sms=num_sms)
    order = tiles.order(lists * units_of_list, row_tiles)
    return _plan.Plan(order, lists, units_of_list, row_tiles, 2, together)


@settings(max_examples=40, deadline=None)
@given(
    num=st.lists(st.integers(0, 20), min_size=1, max_size=24),
    units_of_list=st.sampled_from([1, 2]),
    row_tiles=st.integers(1, 9),
    window=st.integers(1, 4),
    num_sms=st.integers(1, 30),
    together=st.booleans(),
)
def test_each_tile_once(num, together, units_of_list, **sizes):
    plan = make(len(num), units_of_list, together=together, **sizes)
    times, _ = visited(jnp.array(num, jnp.int32), plan)
    np.testing.assert_array_equal(times, 1)


class TogetherTest(parameterized.TestCase):
    @parameterized.parameters((0.05, 1.25), (0.1, 1.15), (0.5, 1.05))
    def test_programs_stay_together(self, density, most):
        """After any number of windows, the programs are less than a list apart."""
        rng = np.random.default_rng(0)
        num = rng.binomial(64, density, 64)
        plan = make(64, 1, row_tiles=32, window=4, num_sms=132, together=True)
        self.assertTrue(plan.may_stay)
        units, is_even = plan_units(num, plan)
        self.assertTrue(is_even)
        done = np.cumsum(num[units].sum(axis=-1), axis=0)  # [windows, programs]
        apart = done.max(axis=1) - done.min(axis=1)
        self.assertLess(apart.max(), 2 * num.max())
        self.assertLess(done[-1].max(), most * done[-1].mean())

    def test_pairs_long_with_short(self):
        """The first window of an oracle: sorted, the i-th with the i-th last."""
        num = np.array([4, 0, 7, 7, 1, 9])
        units, _ = _together.units_in_turn(jnp.array(num), 3, 1, 1)
        order = sorted(range(6), key=lambda i: (-num[i], i))
        want = [[order[i], order[-1 - i]] for i in range(3)]
        np.testing.assert_array_equal(units[0], want)

    @parameterized.parameters(1, 2)
    def test_a_full_list_is_shared_out(self, units_of_list):
        num = np.full(64, 6)
        _, is_even = _together.units_in_turn(jnp.array(num), 32, 8, units_of_list)
        self.assertTrue(is_even)
        num[10] = 64
        _, is_even = _together.units_in_turn(jnp.array(num), 32, 8, units_of_list)
        self.assertFalse(is_even)

    def test_too_few_would_be_busy(self):
        """Of a prime number of units, one program has all of them."""
        plan = make(61, 1, row_tiles=32, window=4, num_sms=132, together=True)
        self.assertFalse(plan.may_stay)
        self.assertNotIn("units", plan.operands(jnp.ones(61, jnp.int32)))

    def test_nothing_kept(self):
        plan = make(8, 1, row_tiles=4, window=2, num_sms=8, together=True)
        times, _ = visited(jnp.zeros(8, jnp.int32), plan)
        np.testing.assert_array_equal(times, 1)


def plan_units(num, plan):
    operands = plan.operands(jnp.asarray(num, jnp.int32))
    return np.asarray(operands["units"]), bool(operands["is_even"][0])

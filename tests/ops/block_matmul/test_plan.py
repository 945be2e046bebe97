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


def make(lists, units_of_list, row_tiles, window, num_sms, together, longest=64):
    tiles = _tiles.Tiles(128, 8, window=window, num_sms=num_sms)
    order = tiles.order(lists * units_of_list, row_tiles)
    return _plan.Plan(order, lists, longest, units_of_list, row_tiles, 2, together)


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


def test_the_last_program_ends_with_the_last_list():
    """Also where its end, 44 shares of a 44th of 101084, is rounded to less."""
    num = np.full(416, 121)
    num[:119], num[-1] = 122, 0
    assert (2 * num + 1).sum() == 101084
    plan = make(416, 1, 24, window=3, num_sms=132, together=False, longest=128)
    assert plan.order.across == 44
    operands = plan.operands(jnp.array(num, jnp.int32))
    # not jitted: XLA may round a product of constants otherwise
    _, last = plan._share(operands, jnp.int32(43))
    assert last == 416


@functools.partial(jax.jit, static_argnums=1)
def turns(num, plan):
    """Of which window, how many units and which, `[programs, windows, 2 + units]`."""
    in_turn = plan.turns(plan.operands(num))

    def of(program, window):
        here = in_turn.of_program(program)(window)
        units = jax.vmap(here.unit)(jnp.arange(plan.units))
        there = jnp.where(jnp.arange(plan.units) < here.stop, units, -1)
        return here.rows, here.stop, there

    programs = jnp.arange(plan.order.across)
    each = jax.vmap(jax.vmap(of, (None, 0)), (0, None))
    return in_turn.stays, *each(programs, jnp.arange(plan.windows))


def worked(num, **sizes):
    """Of which window; how much work is done after each, both `[programs, windows]`."""
    plan = make(len(num), 1, row_tiles=32, window=4, together=True, **sizes)
    assert plan.may_stay
    stays, of_window, _, units = map(np.asarray, turns(jnp.asarray(num), plan))
    assert stays
    done = np.cumsum((num[units] * (units >= 0)).sum(axis=-1), axis=1)
    return of_window, done


class TogetherTest(parameterized.TestCase):
    @parameterized.parameters((0.02, 1.5), (0.05, 1.25), (0.1, 1.15), (0.5, 1.1))
    def test_programs_stay_together(self, density, most):
        """After any number of windows, the programs are less than a list apart."""
        num = np.random.default_rng(0).binomial(64, density, 64)
        of_window, done = worked(num, num_sms=132)
        np.testing.assert_array_equal(of_window, np.broadcast_to(range(8), (33, 8)))
        apart = done.max(axis=0) - done.min(axis=0)
        self.assertLess(apart.max(), 2 * num.max())
        self.assertLess(done[:, -1].max(), most * done[:, -1].mean())

    @parameterized.parameters(16, 32, 64)
    def test_a_full_list_has_programs_of_its_own(self, longest):
        """It takes some windows; in the end all have had about as much to do."""
        num = np.random.default_rng(0).binomial(64, 0.1, 64)
        num[10] = longest
        of_window, done = worked(num, num_sms=132)
        self.assertEqual(np.all(of_window == range(8)), longest == 16)
        # a tile of it is a half of what a program has, so that some have more
        self.assertLess(done[:, -1].max(), 1.3 * done[:, -1].mean())
        # the others are together
        own = np.any(np.diff(done, prepend=0) >= longest, axis=1)
        self.assertEqual(own.sum(), 8 if longest == 64 else own.sum())
        apart = done[~own].max(axis=0) - done[~own].min(axis=0)
        self.assertLess(apart.max(), 2 * num[np.arange(64) != 10].max())

    def test_pairs_long_with_short(self):
        """The first window of an oracle: sorted, the i-th with the i-th last."""
        num = np.array([4, 0, 7, 7, 1, 9])
        plan = make(6, 1, row_tiles=2, window=1, num_sms=3, together=True)
        _, _, _, units = turns(jnp.array(num), plan)
        order = sorted(range(6), key=lambda i: (-num[i], i))
        want = [[order[i], order[-1 - i]] for i in range(3)]
        np.testing.assert_array_equal(units[:, 0, :2], want)

    @parameterized.parameters(1, 2)
    def test_two_full_lists_are_shared_out(self, units_of_list):
        num = np.full(64, 6)
        for lengths, stays in (((6, 6), True), ((64, 6), True), ((64, 64), False)):
            num[10], num[20] = lengths
            plan = make(64, units_of_list, 32, window=4, num_sms=132, together=True)
            self.assertEqual(turns(jnp.array(num), plan)[0], stays)

    @parameterized.parameters((132, 38, True), (132, 39, False), (128, 39, True))
    def test_many_are_shared_out_if_that_occupies_more(self, num_sms, kept, stays):
        """Of 33 programs a row of tiles, 31 have two of 64 units and two have one."""
        plan = make(64, 1, row_tiles=32, window=4, num_sms=num_sms, together=True)
        self.assertEqual(turns(jnp.full(64, kept), plan)[0], stays)

    def test_too_few_would_be_busy(self):
        """Of 34 units, one of 33 programs has two."""
        plan = make(34, 1, row_tiles=32, window=4, num_sms=132, together=True)
        self.assertFalse(plan.may_stay)
        self.assertNotIn("by_rank", plan.operands(jnp.ones(34, jnp.int32)))

    def test_nothing_kept(self):
        plan = make(8, 1, row_tiles=4, window=2, num_sms=8, together=True)
        times, _ = visited(jnp.zeros(8, jnp.int32), plan)
        np.testing.assert_array_equal(times, 1)

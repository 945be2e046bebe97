"""How tiles are cut: every step once, and each program knows the pieces of all."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

_split = importlib.import_module("sparsejax.ops.block_matmul._split")


class SplitTest(parameterized.TestCase):
    @parameterized.product(programs=[2, 5, 132], steps=[32, 129])
    def test_every_step_is_in_one_piece(self, programs, steps):
        for num_tiles in (0, 1, programs - 1, programs, 2 * programs + programs // 3):
            split = _split.Split.of(jnp.int32(num_tiles), steps, programs)
            left = int(split.left)
            self.assertEqual(int(split.whole) + left, num_tiles)
            self.assertEqual(int(split.whole) % programs if left else 0, 0)
            begin, end = map(np.asarray, jax.vmap(split.run)(jnp.arange(programs)))
            covered, makers, pieces = np.zeros(left * steps, int), {}, []
            for program in np.flatnonzero(end > begin):
                covered[begin[program] : end[program]] += 1
                tiles = range(begin[program] // steps, -(-end[program] // steps))
                self.assertLessEqual(len(tiles), 2)
                for n in tiles:
                    makers.setdefault(n, []).append(program)
                    pieces.append(int(split.piece(jnp.int32(program), jnp.int32(n))))
            np.testing.assert_array_equal(covered, 1)
            self.assertLen(set(pieces), len(pieces))
            self.assertTrue(all(0 <= piece < 2 * programs for piece in pieces))
            for n in range(left):
                first, last = map(int, split.programs_of(jnp.int32(n)))
                self.assertSequenceEqual(range(first, last), makers[n])

    @parameterized.parameters(
        # tiles, cut: what is idle in the last round against 16 steps of all programs
        (64, 64),  # half of the programs, for 128 steps
        (132, 0),
        (132 + 91, 91),
        (132 + 120, 0),
    )
    def test_cuts_what_would_leave_programs_idle(self, num_tiles, want):
        split = _split.Split.of(jnp.int32(num_tiles), 128, 132)
        self.assertEqual(int(split.left), want)

    def test_may_cut(self):
        self.assertFalse(_split.may_cut(31, 132))  # pieces would be too short
        self.assertTrue(_split.may_cut(32, 132))
        self.assertFalse(_split.may_cut(2**17, 132))  # steps could not be counted

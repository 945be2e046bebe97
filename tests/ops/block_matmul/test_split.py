"""How tiles are cut: every step once, and each program knows the pieces of all."""

import importlib

import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

_split = importlib.import_module("sparsejax.ops.block_matmul._split")


class SplitTest(parameterized.TestCase):
    @parameterized.product(programs=[2, 5, 132], steps=[48, 129])
    def test_every_step_is_in_one_piece(self, programs, steps):
        for num_tiles in (0, 1, programs - 1, programs, 2 * programs + programs // 3):
            split = _split.Split.of(jnp.int32(num_tiles), steps, programs)
            left, num_pieces = int(split.left), int(split.num_pieces)
            self.assertEqual(int(split.whole) + left, num_tiles)
            self.assertEqual(int(split.whole) % programs if left else 0, 0)
            self.assertLessEqual(num_pieces, _split.most_pieces(programs))
            covered = np.zeros((left, steps), int)
            for number in range(num_pieces):
                n, first, num = map(int, split.piece(jnp.int32(number)))
                self.assertGreaterEqual(num, 16)
                covered[n, first : first + num] += 1
            np.testing.assert_array_equal(covered, 1)
            numbers = split.number(*jnp.indices((left, int(split.parts))))
            self.assertEqual(set(np.ravel(numbers)), set(range(num_pieces)))

    @parameterized.parameters(
        # tiles of a number of steps, cut into parts; the last two in two rounds
        (66, 128, 66, 2),
        (132, 128, 0, 1),
        (132 + 13, 128, 13, 8),
        (132 + 13, 1024, 13, 10),
        (132 + 120, 1024, 0, 1),
        (67, 128, 0, 1),
        (67, 256, 67, 3),
        (88, 256, 88, 3),
    )
    def test_cuts_what_would_leave_programs_idle(self, num_tiles, steps, left, parts):
        split = _split.Split.of(jnp.int32(num_tiles), steps, 132)
        self.assertEqual(int(split.left), left)
        self.assertEqual(int(split.parts), parts)

    def test_may_cut(self):
        self.assertFalse(_split.may_cut(47))  # pieces would be too short
        self.assertTrue(_split.may_cut(48))

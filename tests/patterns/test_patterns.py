"""The four patterns: what they accept, and how they divide a leaf into units."""

from absl.testing import parameterized

from sparsejax.patterns import (
    NM,
    Block,
    Channel,
    Unstructured,
    check_sparsity,
    geometric_frames,
    stepwise_frames,
)


class UnitShapeTest(parameterized.TestCase):
    @parameterized.parameters(
        (Unstructured(), (3, 4, 5), 1, (3, 4, 5)),
        (NM(2, 4), (3, 8, 5), 1, (3, 8, 5)),
        (NM(2, 4, axis=0), (8, 5), 0, (8, 5)),
        (NM(2, 4, axis=1), (3, 8, 5), 1, (3, 8, 5)),
        (NM(1, 4), (0, 5), 0, (0, 5)),
        (Block((2, 4)), (6, 8), 0, (3, 2)),
        (Block((2, 4)), (5, 6, 8), 1, (5, 3, 2)),
        (Block((2, 4)), (5, 6, 8), 0, (5, 3, 2)),
        (Block((4,)), (5, 8), 0, (5, 2)),
        (Block((3, 3, 2)), (3, 3, 4, 7), 0, None),
        (Block((1, 3, 4, 7)), (3, 3, 4, 7), 0, (3, 1, 1, 1)),
        (Block((2, 2)), (0, 4), 0, (0, 2)),
        (Channel(), (6, 8), 0, (1, 8)),
        (Channel(-2), (6, 8), 0, (6, 1)),
        (Channel(0), (6, 8), 0, (6, 1)),
        (Channel(-1), (5, 6, 8), 1, (5, 1, 8)),
        (Channel(1), (5, 6, 8), 1, (5, 6, 1)),
        (Channel(), (0, 8), 0, (1, 8)),
    )
    def test_unit_shape(self, pattern, shape, stacked, want):
        if want is None:
            with self.assertRaisesRegex(ValueError, "must divide the last axes"):
                pattern.unit_shape(shape, stacked)
        else:
            self.assertEqual(pattern.unit_shape(shape, stacked), want)

    @parameterized.parameters(
        (NM(2, 4), (6, 8), 0, r"`m` must divide.*m=4 for axis -2 of shape \(6, 8\)"),
        (NM(2, 4), (8,), 0, r"axis -2 must be one of the axes"),
        (NM(2, 4), (4, 8), 1, r"beyond the 1 stacked ones of shape \(4, 8\)"),
        (NM(2, 4, axis=0), (4, 8, 8), 1, "axis 0 must be one of the axes beyond"),
        (NM(2, 4, axis=3), (4, 8, 8), 0, "axis 3 must be one of the axes"),
        (NM(2, 4, axis=-4), (4, 8, 8), 0, "axis -4 must be one of the axes"),
        (Block((2, 4)), (8,), 0, "need 2 axes beyond the 0 stacked ones"),
        (Block((2, 4)), (2, 8), 1, "need 2 axes beyond the 1 stacked ones"),
        (Block((3, 4)), (8, 8), 0, r"must divide the last axes; got shape \(8, 8\)"),
        (Channel(2), (8, 8), 0, "axis 2 must be one of the axes"),
        (Channel(0), (2, 8, 8), 1, "axis 0 must be one of the axes beyond"),
    )
    def test_does_not_suit_the_leaf(self, pattern, shape, stacked, match):
        with self.assertRaisesRegex(ValueError, match):
            pattern.unit_shape(shape, stacked)


class ValidationTest(parameterized.TestCase):
    @parameterized.parameters((0, 4), (5, 4), (-1, 4), (0, 0), (1, 0))
    def test_n_and_m(self, n, m):
        with self.assertRaisesRegex(ValueError, rf"0 < n <= m; got n={n}, m={m}"):
            NM(n, m)

    @parameterized.parameters(((),), ((0, 2),), ((2, -1),))
    def test_block(self, shape):
        with self.assertRaisesRegex(ValueError, "positive sizes"):
            Block(shape)

    @parameterized.parameters(0, 0.0, 0.5, 1 - 1e-9, False)
    def test_sparsity_in_range(self, sparsity):
        check_sparsity(sparsity)

    @parameterized.parameters(-0.1, 1, 1.0, 2, float("nan"), float("inf"))
    def test_sparsity_out_of_range(self, sparsity):
        with self.assertRaisesRegex(ValueError, r"fraction in \[0, 1\).*at \['k'\]"):
            check_sparsity(sparsity, at="['k']")

    def test_a_percentage_is_recognised(self):
        with self.assertRaisesRegex(ValueError, "divide by 100"):
            check_sparsity(90)

    def test_patterns_are_static(self):
        for pattern in (Unstructured(), NM(2, 4), Block([2, 4]), Channel()):
            self.assertEqual(hash(pattern), hash(type(pattern)(**vars(pattern))))
            self.assertEqual(pattern.sparsity, 0.5 if pattern == NM(2, 4) else None)


class FramesTest(parameterized.TestCase):
    """Frames of the code released with Bambhaniya et al., 2024, and others by hand."""

    @parameterized.parameters(
        (1, 16, [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]),
        (2, 4, [(3, 4), (2, 4)]),
        (1, 4, [(3, 4), (2, 4), (1, 4)]),
        (1, 32, [(31, 32), (16, 32), (8, 32), (4, 32), (2, 32), (1, 32)]),
        (1, 128, [(127, 128)] + [(2**i, 128) for i in range(6, -1, -1)]),
        (2, 8, [(7, 8), (4, 8), (2, 8)]),
        (4, 4, [(4, 4)]),
    )
    def test_stepwise(self, n, m, want):
        frames = stepwise_frames(NM(n, m, axis=1))
        self.assertEqual([(f.n, f.m) for f in frames], want)
        self.assertEqual({f.axis for f in frames}, {1})
        densities = [1 - f.sparsity for f in frames]
        self.assertEqual(densities, sorted(densities, reverse=True))

    @parameterized.parameters((3, 8), (2, 6), (3, 4))
    def test_stepwise_needs_a_power_of_two(self, n, m):
        with self.assertRaisesRegex(ValueError, f"power of two; got {n}:{m}"):
            stepwise_frames(NM(n, m))

    @parameterized.parameters(
        (1, 8, 8, [(8, 64), (4, 32), (2, 16), (1, 8)]),
        (1, 8, 16, [(16, 128), (8, 64), (4, 32), (2, 16), (1, 8)]),
        (2, 4, 8, [(16, 32), (8, 16), (4, 8), (2, 4)]),
        (2, 4, 1, [(2, 4)]),
    )
    def test_geometric(self, n, m, first_factor, want):
        frames = geometric_frames(NM(n, m, axis=0), first_factor=first_factor)
        self.assertEqual([(f.n, f.m) for f in frames], want)
        self.assertEqual({(f.axis, f.sparsity) for f in frames}, {(0, 1 - n / m)})

    @parameterized.parameters(0, 3, -2)
    def test_geometric_needs_a_power_of_two(self, first_factor):
        with self.assertRaisesRegex(ValueError, "`first_factor` must be a power"):
            geometric_frames(NM(1, 8), first_factor=first_factor)

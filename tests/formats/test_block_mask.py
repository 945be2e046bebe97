"""BlockMask against lists made by a loop: counts, order, room, scores, combination."""

import dataclasses
import functools
import itertools

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsejax as sj
from sparsejax.formats import _block_mask
from tests.masks.hlo import operations

BLOCK = (2, 3)
ROWS, COLUMNS = 4, 6
CAPACITIES = [None, 2, (None, 2), (3, 1)]
blocks = hnp.arrays(np.bool_, (ROWS, COLUMNS))
few = settings(max_examples=25)


@functools.partial(jax.jit, static_argnames="capacity")
def from_blocks(kept, capacity=None):
    return sj.BlockMask.from_blocks(kept, BLOCK, capacity=capacity)


to_blocks = jax.jit(lambda mask: mask.to_blocks())
to_dense = jax.jit(lambda mask: mask.to_dense())
density = jax.jit(lambda mask: mask.density())


@functools.partial(jax.jit, static_argnames="capacity")
def combined(a, b, capacity=(None, None)):
    """Two masks of a capacity each, and the blocks that both and either keep."""
    a, b = from_blocks(a, capacity[0]), from_blocks(b, capacity[1])
    return a, b, a & b, a | b


@jax.jit
def from_dense(mask):
    return sj.BlockMask.from_dense(mask, BLOCK, capacity=2)


@functools.partial(jax.jit, static_argnames="num_kept")
def from_scores(scores, num_kept):
    return sj.BlockMask.from_scores(scores, BLOCK, num_kept)


def lists_of(kept, room):
    """Counts, and ascending indices that repeat the last up to `room`."""
    num = [int(row.sum()) for row in kept]
    indices = []
    for row in kept:
        found = [j for j, one in enumerate(row) if one]
        indices.append((found + [found[-1] if found else 0] * room)[:room])
    return num, indices


def oracle(kept, capacity):
    """The fields of a mask, by name: rows give up blocks first, then columns."""
    rooms = capacity if isinstance(capacity, tuple) else (capacity, None)
    row_room, column_room = (
        size if room is None else min(room, size)
        for room, size in zip(rooms, kept.shape[::-1], strict=True)
    )
    fitting = np.zeros_like(kept)
    for i, row in enumerate(kept):
        fitting[i, np.flatnonzero(row)[:row_room]] = True
    for j, column in enumerate(fitting.T.copy()):
        fitting[np.flatnonzero(column)[column_room:], j] = False
    num, indices = lists_of(fitting, row_room)
    num_t, indices_t = lists_of(fitting.T, column_room)
    overflowed = bool((fitting != kept).any())
    fields = dict(num=num, indices=indices, num_t=num_t, indices_t=indices_t)
    return fitting, fields | {"overflowed": overflowed}


def assert_fields(mask, fields):
    for name, value in fields.items():
        got = getattr(mask, name)
        want = np.asarray(value, bool if name == "overflowed" else np.int32)
        np.testing.assert_array_equal(got, want, err_msg=name)
        assert got.dtype == want.dtype and got.shape == want.shape, name


class FromBlocksTest(parameterized.TestCase):
    @parameterized.product(capacity=CAPACITIES)
    @few
    @given(kept=blocks)
    def test_lists_match_oracle(self, capacity, kept):
        fitting, fields = oracle(kept, capacity)
        mask = from_blocks(kept, capacity)
        assert_fields(mask, fields)
        self.assertEqual(int(mask.num.sum()), int(mask.num_t.sum()))
        np.testing.assert_array_equal(to_blocks(mask), fitting)
        np.testing.assert_array_equal(to_blocks(mask.T), fitting.T)

    def test_empty_and_full(self):
        for share in (0, 1):
            kept = np.full((ROWS, COLUMNS), bool(share))
            mask = from_blocks(kept, 99)
            assert_fields(mask, oracle(kept, None)[1])
            self.assertEqual(float(density(mask)), share)
        self.assertEqual(mask.blocks_shape, (ROWS, COLUMNS))
        self.assertEqual(mask.shape, (8, 18))

    def test_leading_axes_and_vmap(self):
        kept = np.random.default_rng(0).random((2, 3, ROWS, COLUMNS)) < 0.4
        capacity = (3, 2)
        mask = from_blocks(kept, capacity)
        self.assertEqual(mask.shape, (2, 3, 8, 18))
        one = functools.partial(from_blocks, capacity=capacity)
        mapped = jax.jit(jax.vmap(jax.vmap(one)))(kept)
        chex.assert_trees_all_equal(mask, mapped)
        fitting = np.zeros_like(kept)
        for at in itertools.product(range(2), range(3)):
            fitting[at], fields = oracle(kept[at], capacity)
            assert_fields(
                jax.tree.map(lambda a, at=at: np.asarray(a)[at], mask), fields
            )
        self.assertEqual({*np.asarray(mask.overflowed).flat}, {True, False})
        dense = np.kron(fitting, np.ones(BLOCK, bool))
        np.testing.assert_array_equal(to_dense(mask), dense)
        np.testing.assert_allclose(density(mask), fitting.mean((-1, -2)), rtol=1e-6)

    def test_ten_topologies_one_trace(self):
        def build(kept):
            return sj.BlockMask.from_blocks(kept, BLOCK, capacity=(3, 2))

        fn = jax.jit(chex.assert_max_traces(build, n=1))
        for seed in range(10):
            kept = np.random.default_rng(seed).random((ROWS, COLUMNS)) < seed / 9
            assert_fields(fn(kept), oracle(kept, (3, 2))[1])

    def test_does_not_sort(self):
        kept = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.bool_)
        self.assertNotIn("sort", operations(from_blocks, kept, capacity=(3, 2)))

    def test_entries_beyond_a_count_mean_nothing(self):
        kept = np.random.default_rng(1).random((ROWS, COLUMNS)) < 0.4
        mask = from_blocks(kept)
        beyond = np.arange(COLUMNS) >= np.asarray(mask.num)[:, None]
        other = np.where(beyond, COLUMNS - 1 - mask.indices, mask.indices)
        changed = dataclasses.replace(mask, indices=jnp.asarray(other))
        np.testing.assert_array_equal(to_blocks(changed), kept)

    def test_is_a_pytree_of_five_arrays(self):
        mask = from_blocks(np.ones((ROWS, COLUMNS), bool))
        leaves, tree = jax.tree.flatten(mask)
        self.assertLen(leaves, 5)
        self.assertEqual(jax.tree.unflatten(tree, leaves).block_shape, BLOCK)
        shapes = jax.eval_shape(lambda m: m.T, mask)
        self.assertEqual(shapes.shape, (18, 8))
        other = dataclasses.replace(mask, block_shape=(3, 2))
        self.assertNotEqual(jax.tree.structure(mask), jax.tree.structure(other))


class FromDenseTest(parameterized.TestCase):
    @few
    @given(
        mask=hnp.arrays(
            np.bool_, (6, 9), elements=st.integers(0, 9).map(lambda i: i == 0)
        )
    )
    def test_a_block_with_any_true_is_kept(self, mask):
        kept = np.zeros((3, 3), bool)
        for i, j in itertools.product(range(3), range(3)):
            kept[i, j] = mask[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].any()
        got = from_dense(mask)
        assert_fields(got, oracle(kept, 2)[1])

    def test_of_what_to_dense_gives(self):
        kept = np.random.default_rng(2).random((2, ROWS, COLUMNS)) < 0.5
        mask = from_blocks(kept)
        again = jax.jit(lambda m: sj.BlockMask.from_dense(m.to_dense(), BLOCK))(mask)
        chex.assert_trees_all_equal(again, mask)


# few values, so many ties
score = st.sampled_from([-np.inf, np.nan, -1.0, -0.0, 0.0, 0.5, 2.0, np.inf])


class FromScoresTest(parameterized.TestCase):
    @parameterized.parameters(1, 3, COLUMNS)
    @few
    @given(scores=hnp.arrays(np.float32, (ROWS, COLUMNS), elements=score))
    def test_matches_oracle(self, num_kept, scores):
        kept = np.zeros(scores.shape, bool)
        for i, row in enumerate(scores):
            usable = [j for j in range(COLUMNS) if row[j] > -np.inf]
            best = sorted(usable, key=lambda j, row=row: -row[j])  # stable
            kept[i, best[:num_kept]] = True
        mask = from_scores(scores, num_kept)
        self.assertEqual(mask.indices.shape, (ROWS, num_kept))
        self.assertEqual(mask.indices_t.shape, (COLUMNS, ROWS))
        np.testing.assert_array_equal(to_blocks(mask), kept)
        self.assertFalse(mask.overflowed)

    def test_leading_axes_and_vmap(self):
        scores = np.random.default_rng(0).normal(size=(2, 3, ROWS, COLUMNS))
        scores = jnp.asarray(scores, jnp.bfloat16)
        got = from_scores(scores, 2)
        one = functools.partial(from_scores, num_kept=2)
        mapped = jax.jit(jax.vmap(jax.vmap(one)))(scores)
        chex.assert_trees_all_equal(got, mapped)
        np.testing.assert_array_equal(got.num, 2)

    def test_a_row_with_less_room_keeps_its_highest(self):
        scores = jnp.array([[0.0, 5, 1, 9], [3, -jnp.inf, -jnp.inf, -jnp.inf]])
        mask = sj.BlockMask.from_scores(scores, BLOCK, 3, capacity=2)
        kept = [[False, True, False, True], [True, False, False, False]]
        np.testing.assert_array_equal(to_blocks(mask), kept)
        self.assertTrue(mask.overflowed)
        mask = sj.BlockMask.from_scores(scores[1:], BLOCK, 3, capacity=2)
        self.assertFalse(mask.overflowed)

    def test_no_gradient_reaches_the_scores(self):
        def loss(scores):
            mask = sj.BlockMask.from_scores(scores, BLOCK, 2)
            return jnp.sum(jnp.where(mask.to_blocks(), scores, 0))

        scores = np.random.default_rng(1).normal(size=(ROWS, COLUMNS))
        scores = scores.astype(np.float32)
        want = to_blocks(from_scores(scores, 2))
        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(scores), want)

    def test_capacity_of_columns_overflows(self):
        scores = np.tile(np.arange(COLUMNS, dtype=np.float32), (ROWS, 1))
        build = functools.partial(sj.BlockMask.from_scores, capacity=(2, 3))
        mask = jax.jit(build, static_argnums=(1, 2))(scores, BLOCK, 2)
        self.assertTrue(mask.overflowed)
        np.testing.assert_array_equal(mask.num, [2, 2, 2, 0])


class CombineTest(parameterized.TestCase):
    @few
    @given(a=blocks, b=blocks)
    def test_and_or(self, a, b):
        *_, both, either = combined(a, b)
        np.testing.assert_array_equal(to_blocks(both), a & b)
        np.testing.assert_array_equal(to_blocks(either), a | b)

    def test_room_and_overflow(self):
        kept = np.eye(ROWS, COLUMNS, dtype=bool)
        small, full, both, either = combined(kept, ~kept, ((1, 1), (2, None)))
        self.assertEqual((bool(small.overflowed), bool(full.overflowed)), (False, True))
        # no list of an intersection is longer than the shorter, of a union than both
        self.assertEqual(both.indices.shape, (ROWS, 1))
        self.assertEqual(both.indices_t.shape, (COLUMNS, 1))
        self.assertEqual(either.indices.shape, (ROWS, 3))
        self.assertEqual(either.indices_t.shape, (COLUMNS, ROWS))
        self.assertTrue(both.overflowed and either.overflowed)
        want = np.asarray(to_blocks(small)) | np.asarray(to_blocks(full))
        np.testing.assert_array_equal(to_blocks(either), want)

    def test_leading_axes_broadcast(self):
        kept = np.random.default_rng(3).random((2, 3, ROWS, COLUMNS)) < 0.5
        *_, both, _ = combined(kept[:1, :1], kept)
        np.testing.assert_array_equal(to_blocks(both), kept[:1, :1] & kept)

    def test_others_are_refused(self):
        mask = from_blocks(np.ones((ROWS, COLUMNS), bool))
        other = dataclasses.replace(mask, block_shape=(3, 2))
        with self.assertRaisesRegex(
            ValueError, r"equal blocks.*got \(4, 6\) blocks of \(2, 3\) and .*\(3, 2\)"
        ):
            _ = mask & other
        with self.assertRaisesRegex(ValueError, r"and \(6, 4\) blocks of \(2, 3\)"):
            _ = mask | other.T
        with self.assertRaisesRegex(TypeError, "unsupported operand"):
            _ = mask & True


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        ((2, 3), "float32", {}, TypeError, r"must be bool; got float32\[2,3\]"),
        ((3,), "bool", {}, ValueError, r"have rows and columns; got shape \(3,\)"),
        ((0, 3), "bool", {}, ValueError, r"have rows and columns; got shape \(0, "),
        ((4, 6), "bool", {"capacity": 0}, ValueError, "`capacity` must .* 1; got 0"),
        (
            (4, 6),
            "bool",
            {"capacity": (None, 0)},
            ValueError,
            r"`capacity` must be at least 1; got 0",
        ),
        (
            (4, 6),
            "bool",
            {"block_shape": (0, 3)},
            ValueError,
            r"`block_shape` must be positive; got \(0, 3\)",
        ),
        (
            (4, 6),
            "bool",
            {"block_shape": 2},
            TypeError,
            r"`block_shape` must be `\(height, width\)`.* got 2",
        ),
        (
            (4, 6),
            "bool",
            {"block_shape": (2, 3, 1)},
            TypeError,
            r"`block_shape` must be `\(height, width\)`.* got \(2, 3, 1\)",
        ),
        (
            (4, 6),
            "bool",
            {"block_shape": (2, 1.5)},
            TypeError,
            "must be a Python int; got 1.5",
        ),
        ((4, 6), "bool", {"capacity": 2.5}, TypeError, "`capacity` must .* got 2.5"),
        ((4, 6), "bool", {"capacity": (1, 2, 3)}, TypeError, r"got \(1, 2, 3\)"),
    )
    def test_from_blocks_and_from_dense(self, shape, dtype, settings, error, message):
        settings = {"block_shape": BLOCK} | settings
        for build in (sj.BlockMask.from_blocks, sj.BlockMask.from_dense):
            with self.assertRaisesRegex(error, message):
                build(jnp.ones(shape, dtype), **settings)

    def test_blocks_that_do_not_divide(self):
        for shape in [(5, 6), (4, 7)]:
            with self.assertRaisesRegex(
                ValueError, r"blocks of \(2, 3\) must divide .*Pad the mask or choose"
            ):
                sj.BlockMask.from_dense(jnp.ones(shape, bool), BLOCK)

    @parameterized.parameters(
        ((4, 6), "int32", 2, TypeError, r"`scores` must be floating; got int32\[4,6\]"),
        ((4, 6), "float32", 0, ValueError, r"in \[1, 6\], the block columns; got 0"),
        ((4, 6), "float32", 1.5, TypeError, "`num_kept` must be .* got 1.5"),
        ((4, 6), "float32", 7, ValueError, r"in \[1, 6\], the block columns; got 7"),
        ((6,), "float32", 2, ValueError, r"must have rows and columns; got shape"),
        ((), "float32", 1, ValueError, r"in \[1, 0\]"),
    )
    def test_from_scores(self, shape, dtype, num_kept, error, message):
        with self.assertRaisesRegex(error, message):
            sj.BlockMask.from_scores(jnp.ones(shape, dtype), BLOCK, num_kept)


@pytest.mark.parametrize("size", [5, 70])
def test_lists_by_bits_are_those_by_scatter(size):
    rng = np.random.default_rng(size)
    kept = jnp.asarray(rng.random((7, size)) < rng.random((7, 1)))
    kept = kept.at[0].set(False).at[1].set(True)

    @jax.jit
    def both(kept):
        ways = (_block_mask._lists_by_bits, _block_mask._lists_by_scatter)
        return [[way(kept, room) for room in (size // 2, size)] for way in ways]

    chex.assert_trees_all_equal(*both(kept))

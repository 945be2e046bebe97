"""BlockSparse: what is stored and where, against loops over the blocks."""

import dataclasses

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings

import sparsejax as sj
from sparsejax.formats import block_positions, block_slots

BLOCK = (2, 3)
ROWS, COLUMNS = 4, 5
CAPACITY = 14
blocks = hnp.arrays(np.bool_, (ROWS, COLUMNS))
few = settings(max_examples=25)
matrix = np.random.default_rng(0).normal(size=(8, 15)).astype(np.float32)


from_blocks = jax.jit(lambda kept: sj.BlockMask.from_blocks(kept, BLOCK))
to_dense = jax.jit(lambda w: w.to_dense())


@jax.jit
def stored(kept, matrix):
    """A matrix with room for some blocks more or less, and what is computed of it."""
    mask = sj.BlockMask.from_blocks(kept, BLOCK)
    w = sj.BlockSparse.from_dense(matrix, mask, capacity=CAPACITY)
    positions = block_positions(mask, ROWS * COLUMNS)
    return w, w.to_dense(), positions, block_slots(mask)


@few
@given(kept=blocks)
def test_matches_oracle(kept):
    poisoned = np.where(np.kron(kept, np.ones(BLOCK, bool)), matrix, np.nan)
    w, dense, (rows, columns), (slots, slots_t) = stored(kept, poisoned)
    order = np.argwhere(kept)  # row-major
    position = {tuple(at): slot for slot, at in enumerate(order)}
    np.testing.assert_array_equal(rows[: len(order)], order[:, 0])
    np.testing.assert_array_equal(columns[: len(order)], order[:, 1])
    assert (rows < ROWS).all() and (columns < COLUMNS).all()
    want = np.zeros((CAPACITY, *BLOCK), np.float32)
    want_dense = np.zeros_like(matrix)
    for (i, j), slot in position.items():
        if slot < CAPACITY:  # more are not stored where the mask is traced
            at = np.s_[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            want[slot] = want_dense[at] = matrix[at]
    np.testing.assert_array_equal(w.values, want)
    np.testing.assert_array_equal(dense, want_dense)
    for lists, found in [(kept, slots), (kept.T, slots_t)]:
        for i, line in enumerate(lists):
            keys = [(i, j) if lists is kept else (j, i) for j in np.flatnonzero(line)]
            listed = [position[key] for key in keys]
            padding = [listed[-1]] * (line.size - len(listed)) if listed else []
            got = np.asarray(found[i])[: len(listed + padding)]
            np.testing.assert_array_equal(got, listed + padding)


class BlockSparseTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.kept = np.random.default_rng(1).random((ROWS, COLUMNS)) < 0.5
        self.mask = from_blocks(self.kept)

    def test_default_capacity(self):
        w = sj.BlockSparse.from_dense(matrix, self.mask)  # outside of jit
        self.assertEqual(w.values.shape, (self.kept.sum(), *BLOCK))
        self.assertEqual((w.shape, w.dtype), (matrix.shape, jnp.float32))
        want = np.where(np.kron(self.kept, np.ones(BLOCK, bool)), matrix, 0)
        np.testing.assert_array_equal(to_dense(w), want)
        # the count of a traced mask is not known: room for all
        traced = jax.eval_shape(sj.BlockSparse.from_dense, matrix, self.mask)
        self.assertEqual(traced.values.shape, (ROWS * COLUMNS, *BLOCK))
        empty = sj.BlockSparse.from_dense(matrix, from_blocks(self.kept & False))
        self.assertEqual(empty.values.shape, (1, *BLOCK))
        np.testing.assert_array_equal(to_dense(empty), 0)

    def test_what_is_beyond_the_kept_is_not_read(self):
        w = stored(self.kept, matrix)[0]
        used = np.arange(CAPACITY) < self.kept.sum()
        self.assertFalse(used.all())
        poisoned = np.where(used[:, None, None], w.values, np.nan)

        def loss(values):
            dense = sj.BlockSparse(values, self.mask).to_dense()
            return jnp.sum(dense**2), dense

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, dense), grad = run(poisoned)
        np.testing.assert_array_equal(dense, to_dense(w))
        np.testing.assert_array_equal(grad, 2 * w.values)

    def test_slots_do_not_depend_on_entries_beyond_a_count(self):
        slots = jax.jit(block_slots)
        want, want_t = slots(self.mask)
        beyond = np.arange(COLUMNS) >= np.asarray(self.mask.num)[:, None]
        indices = np.asarray(self.mask.indices)
        other = np.where(beyond, COLUMNS - 1 - indices, indices)
        got, got_t = slots(dataclasses.replace(self.mask, indices=other))
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(got_t, want_t)

    def test_a_mask_of_numpy(self):
        """As a checkpoint holds it, closed over."""
        mask = jax.device_get(self.mask)

        @jax.jit
        def run(matrix):
            w = sj.BlockSparse.from_dense(matrix, mask)
            return w, w.to_dense(), block_slots(mask)

        w, dense, slots = run(matrix)
        np.testing.assert_array_equal(dense, to_dense(w))
        for got, want in zip(slots, block_slots(self.mask), strict=True):
            np.testing.assert_array_equal(got, want)

    def test_errors(self):
        build = sj.BlockSparse.from_dense
        with self.assertRaisesRegex(
            ValueError, r"`matrix` must have the shape.*got \(2, 2\) and .*\(8, 15\)"
        ):
            build(jnp.ones((2, 2)), self.mask)
        stacked = from_blocks(self.kept[None])
        with self.assertRaisesRegex(ValueError, "without leading axes"):
            build(matrix[None], stacked)
        with self.assertRaisesRegex(TypeError, "`mask` must be a BlockMask; got Array"):
            build(matrix, self.mask.to_dense())
        with self.assertRaisesRegex(TypeError, "`capacity` must be .* got 40.0"):
            build(matrix, self.mask, capacity=40.0)  # pyright: ignore
        total = self.kept.sum()
        for capacity in (0, total - 1):
            with self.assertRaisesRegex(
                ValueError, f"all kept .*got capacity={capacity} and {total} blocks"
            ):
                build(matrix, self.mask, capacity=capacity)

"""block_matmul against a loop over blocks in NumPy, with the formulas of its gradients.

The reference runs here: it is the oracle of the kernels, which have files of their own.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import sparsejax as sj
from sparsejax.ops import block_matmul

BLOCK = (2, 3)
ROWS, COLUMNS = 4, 5
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2, jnp.float16: 3e-3}


def silu(z):
    """Of float64, with its derivative."""
    gate = 1 / (1 + np.exp(-z))
    return z * gate, gate * (1 + z * (1 - gate))


def oracle(kept, x, w, bias, dy, activated=False, full_dw=False):
    """y, dx, dw and db in float64; no block that is not kept is touched."""
    x, w, bias, dy = (np.asarray(a, np.float64) for a in (x, w, bias, dy))
    lead = x.shape[:-1]
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    height, width = BLOCK
    blocks = [
        (np.s_[i * height : (i + 1) * height], np.s_[j * width : (j + 1) * width])
        for i, j in np.argwhere(kept)
    ]
    z = np.tile(bias, (len(x), 1))
    for rows, columns in blocks:
        z[:, columns] += x[:, rows] @ w[rows, columns]
    y = z
    if activated:
        y, slope = silu(z)
        dy = dy * slope
    dx, dw = np.zeros_like(x), np.zeros(w.shape)
    for rows, columns in blocks:
        dx[:, rows] += dy[:, columns] @ w[rows, columns].T
        dw[rows, columns] = x[:, rows].T @ dy[:, columns]
    if full_dw:
        dw = x.T @ dy
    return y.reshape(*lead, -1), dx.reshape(*lead, -1), dw, dy.sum(0)


def operands(dtype=jnp.float32, lead=(7,)):
    """x, w, bias and dy."""
    rng = np.random.default_rng(len(lead))
    d_in, d_out = ROWS * BLOCK[0], COLUMNS * BLOCK[1]
    shapes = (*lead, d_in), (d_in, d_out), (d_out,), (*lead, d_out)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def block_masks():
    """Blocks of every density, with an empty row and an empty column among them."""
    rng = np.random.default_rng(0)
    for density in (0.0, 0.2, 0.5, 0.8, 1.0):
        yield rng.random((ROWS, COLUMNS)) < density
    kept = np.ones((ROWS, COLUMNS), bool)
    kept[1], kept[:, 3] = False, False
    yield kept


def with_gradients(mask, x, w, bias, dy, full_dw=False, activation=None):
    """y, dx, dw and db; `w` is dense, or the values of a `BlockSparse`."""

    def fn(x, w, bias):
        at = dict(bias=bias, activation=activation)
        if w.ndim == 3:
            return block_matmul(x, sj.BlockSparse(w, mask), **at)
        return block_matmul(x, w, mask, full_dw=full_dw, **at)

    y, vjp = jax.vjp(fn, x, w, bias)
    return y, *vjp(dy)


run = jax.jit(with_gradients, static_argnames="activation")
from_blocks = jax.jit(lambda kept: sj.BlockMask.from_blocks(kept, BLOCK))


def assert_close(got, want, dtype=jnp.float32):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        limit = TOLERANCE[dtype] * (1 + np.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=limit)


class BlockMatmulTest(parameterized.TestCase):
    @parameterized.product(
        dtype=list(TOLERANCE), activation=[None, jax.nn.silu], lead=[(2, 1, 3)]
    )
    def test_matches_oracle(self, dtype, activation, lead):
        args = operands(dtype, lead)
        kept = np.random.default_rng(1).random((ROWS, COLUMNS)) < 0.5
        got = run(from_blocks(kept), *args, activation=activation)
        assert_close(got, oracle(kept, *args, activated=activation is not None), dtype)

    def test_every_density_with_one_trace(self):
        args = operands()
        fn = jax.jit(chex.assert_max_traces(with_gradients, n=1))
        for kept in block_masks():
            assert_close(fn(from_blocks(kept), *args), oracle(kept, *args))

    def test_full_dw_may_be_traced(self):
        args = operands()
        for kept in block_masks():
            for full in (False, True):  # one program
                got = run(from_blocks(kept), *args, jnp.asarray(full))
                assert_close(got, oracle(kept, *args, full_dw=full))
        known = jax.jit(functools.partial(with_gradients, full_dw=True))
        assert_close(known(from_blocks(kept), *args), oracle(kept, *args, full_dw=True))

    def test_what_is_not_kept_is_not_read(self):
        x, w, *rest = operands()
        for kept in block_masks():
            elements = np.kron(kept, np.ones(BLOCK, bool))
            mask, poisoned = from_blocks(kept), jnp.where(elements, w, jnp.nan)
            got, want = run(mask, x, poisoned, *rest), run(mask, x, w, *rest)
            chex.assert_trees_all_equal(got, want)
            chex.assert_tree_all_finite(got)

    @parameterized.parameters(False, True)
    def test_what_no_kept_block_meets_is_not_read(self, compact_w):
        x, w, bias, dy = operands()
        kept = np.random.default_rng(3).random((ROWS, COLUMNS)) < 0.6
        kept[1], kept[:, 3] = False, False
        mask = from_blocks(kept)
        if compact_w:
            w = compact(w, mask)
        rows, columns = (
            np.repeat(kept.any(axis=1 - axis), side) for axis, side in enumerate(BLOCK)
        )
        for nothing in (jnp.nan, jnp.inf):
            poisoned = jnp.where(rows, x, nothing), w, bias, dy
            got = run(mask, *poisoned)
            chex.assert_trees_all_equal(got, run(mask, x, w, bias, dy))
            poisoned = x, w, bias, jnp.where(columns, dy, nothing)
            *got, db = run(mask, *poisoned)
            chex.assert_trees_all_equal(got, list(run(mask, x, w, bias, dy)[:3]))
            np.testing.assert_array_equal(np.isfinite(db), columns)

    def test_block_sparse_is_the_dense_product_of_its_blocks(self):
        x, w, *rest = operands()
        for kept in block_masks():
            mask = from_blocks(kept)
            values = compact(w, mask).at[kept.sum() :].set(jnp.nan)
            y, dx, dvalues, db = run(mask, x, values, *rest)
            *want, dw, want_db = oracle(kept, x, w, *rest)
            assert_close((y, dx, db), (*want, want_db))
            dense = jnp.asarray(dw, jnp.float32)
            np.testing.assert_allclose(dvalues, compact(dense, mask), atol=1e-5)

    def test_padding_of_the_lists_means_nothing(self):
        args = operands()
        kept = np.random.default_rng(2).random((ROWS, COLUMNS)) < 0.4
        mask = from_blocks(kept)
        beyond = np.arange(COLUMNS) >= np.asarray(mask.num)[:, None]
        beyond_t = np.arange(ROWS) >= np.asarray(mask.num_t)[:, None]
        changed = {
            "indices": jnp.where(beyond, 2, mask.indices),
            "indices_t": jnp.where(beyond_t, 2, mask.indices_t),
        }
        for name, lists in changed.items():
            self.assertTrue((lists != getattr(mask, name)).any())
        other = dataclasses.replace(mask, **changed)
        chex.assert_trees_all_equal(run(other, *args), run(mask, *args))

    def test_scan_over_layers_and_vmap(self):
        x, w, bias, _ = operands()
        kept = np.stack(list(block_masks()))
        masks = from_blocks(kept)

        def layer(carry, mask):
            return carry, block_matmul(x, w, mask, bias=bias)

        scanned = jax.jit(lambda m: jax.lax.scan(layer, 0, m)[1])(masks)
        mapped = jax.jit(jax.vmap(lambda m: layer(0, m)[1]))(masks)
        chex.assert_trees_all_close(mapped, scanned, rtol=1e-5, atol=1e-5)
        want = [oracle(k, x, w, bias, scanned[0])[0] for k in kept]
        np.testing.assert_allclose(scanned, np.stack(want), atol=1e-5)

    def test_no_rows(self):
        args = operands(lead=(2, 0))
        y, dx, dw, db = run(from_blocks(np.ones((ROWS, COLUMNS), bool)), *args)
        self.assertEqual((y.shape, dx.shape), ((2, 0, 15), (2, 0, 8)))
        np.testing.assert_array_equal(dw, 0)
        np.testing.assert_array_equal(db, 0)

    def test_half_precision_sums_are_float32(self):
        x = jnp.full((1, 8192), 1 + 2**-7, jnp.bfloat16)
        mask = sj.BlockMask.from_blocks(jnp.ones((1, 1), bool), (8192, 1))
        y = block_matmul(x, jnp.ones((8192, 1), jnp.bfloat16), mask)
        self.assertEqual(float(y[0, 0]), 8256.0)  # 8192 + 64


@jax.jit
def compact(w, mask):
    return sj.BlockSparse.from_dense(w, mask, capacity=ROWS * COLUMNS + 2).values


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(x="int32[7,8]"), TypeError, r"one dtype; got x int32\[7,8\] and w float"),
        (dict(x="bfloat16[7,8]"), TypeError, r"x bfloat16\[7,8\] and w .*Cast one"),
        (dict(x="float32[7,6]"), ValueError, r"agree on d_in; .*\[7,6\] and d_in=8"),
        (dict(x="float32[]"), ValueError, r"agree on d_in; got x float32\[\]"),
        (dict(w="float32[8,12]"), ValueError, r"shape of its mask; got w \(8, 12\) an"),
        (dict(bias="float32[8]"), ValueError, r"shape \(15,\), as d_out; got \(8,\)"),
        (dict(full_dw="bool[2]"), TypeError, "`full_dw` must be one bool; got"),
        (dict(full_dw="int32[]"), TypeError, "`full_dw` must be one bool; got"),
    )
    def test_operands(self, other, error, message):
        given = dict(x="float32[7,8]", w="float32[8,15]") | other
        arrays = {}
        for name, text in given.items():
            dtype, shape = text.removesuffix("]").split("[")
            arrays[name] = jnp.ones([int(n) for n in shape.split(",") if n], dtype)
        mask = from_blocks(np.ones((ROWS, COLUMNS), bool))
        x, w = arrays.pop("x"), arrays.pop("w")
        with self.assertRaisesRegex(error, message):
            block_matmul(x, w, mask, **arrays)

    def test_masks(self):
        x, w, *_ = operands()
        kept = np.ones((ROWS, COLUMNS), bool)
        mask = from_blocks(kept)
        stored = sj.BlockSparse(compact(w, mask), mask)
        with self.assertRaisesRegex(ValueError, "must be given with a dense `w`"):
            block_matmul(x, w)
        with self.assertRaisesRegex(TypeError, "must be a BlockMask; got ndarray. Bui"):
            block_matmul(x, w, kept)
        with self.assertRaisesRegex(ValueError, r"no leading axes; .*\(1, 8, 15\)"):
            block_matmul(x, w, from_blocks(kept[None]))
        with self.assertRaisesRegex(ValueError, "must be None: a `BlockSparse` has"):
            block_matmul(x, stored, mask)
        with self.assertRaisesRegex(ValueError, "`full_dw` must be False for a `Block"):
            block_matmul(x, stored, full_dw=True)
        other = sj.BlockSparse(stored.values[:, :1], mask)
        with self.assertRaisesRegex(ValueError, r"blocks of \(2, 3\), .*\(22, 1, 3\)"):
            block_matmul(x, other)
        with self.assertRaisesRegex(ValueError, "None or one of .*got 'triton'"):
            block_matmul(x, w, mask, implementation="triton")

"""The highest pages: a list by NumPy, the kernel against the reference, refusals.

Bounds and queries are small integers, of which every sum is exact: many are equal.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax.ops import highest_pages
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter

PAGE = 3


def operands(batch, heads, kv_heads, pages, dim, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    bounds = rng.integers(-2, 3, size=(2, batch, pages, kv_heads, dim))
    query = rng.integers(-2, 3, size=(batch, heads, dim))
    query[..., 3:] = 0  # so that most scores are equal to others
    arrays = (query, bounds.min(axis=0), bounds.max(axis=0))
    return [jnp.asarray(a, dtype) for a in arrays]


def jitted(implementation, **options):
    options |= {"page_size": PAGE, "implementation": implementation}
    return jax.jit(functools.partial(highest_pages, **options))


def by_sorting(query, low, high, length, num_kept):
    """One list: of a query head, or of several that share it."""
    query, low, high = (np.asarray(a, np.float64) for a in (query, low, high))
    used = -(-length // PAGE)
    each = np.maximum(query[:, None] * low[:used], query[:, None] * high[:used])
    scores = each.sum(axis=(0, 2))
    scores[-1:] = np.inf
    return sorted(np.argsort(-scores, kind="stable")[:num_kept])


class HighestPagesTest(parameterized.TestCase):
    @parameterized.product(per_head=[False, True], num_kept=[1, 4, 9])
    def test_against_sorting(self, per_head, num_kept):
        query, low, high = operands(3, 4, 2, 9, 5, jnp.float32)
        lengths = [27, 10, 0]
        call = jitted(None, num_kept=num_kept, per_head=per_head)
        lists = call(query, low, high, jnp.array(lengths))
        self.assertEqual(lists.indices.shape, (3, 4 if per_head else 2, num_kept))
        for at in np.ndindex(*lists.num.shape):
            batch, row = at
            heads = slice(row, row + 1) if per_head else slice(2 * row, 2 * row + 2)
            bounds = (a[batch, :, heads.start // 2] for a in (low, high))
            want = by_sorting(query[batch, heads], *bounds, lengths[batch], num_kept)
            np.testing.assert_array_equal(lists.num[at], len(want))
            np.testing.assert_array_equal(lists.indices[at][: len(want)], want)

    # each of two programs: more than a machine of two cores can run are waited for
    @parameterized.parameters(
        ((1, 4, 2, 128, 64), 9, False, [384]),  # no multiple of four
        ((2, 2, 1, 128, 128), 100, True, [290, 0]),  # entries of both; no keys
    )
    @needs_gpu_interpreter
    def test_kernel_equals_the_reference(self, sizes, num_kept, per_head, lengths):
        query, low, high = operands(*sizes)
        if num_kept > 64:  # NaN ranks below every number
            low = low.at[0, 3].set(jnp.nan)
        given = query, low, high, jnp.array(lengths)
        options = {"num_kept": num_kept, "per_head": per_head}
        want = jitted("reference", **options)(*given)
        with gpu_interpreted():
            got = jitted("mosaic_gpu", **options)(*given)
        for leaf, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_array_equal(leaf, other)

    def test_no_sequence_for_cuda(self):
        """None takes the reference: a kernel has no program to start."""
        given = (*operands(0, 4, 2, 64, 64), jnp.zeros(0, jnp.int32))
        call = jax.jit(lambda *a: jax.tree.leaves(jitted(None, num_kept=4)(*a)))
        exported = jax.export.export(call, platforms=["cuda"])(*given)
        self.assertNotIn("@mosaic_gpu", exported.mlir_module())
        self.assertEqual([a.shape[0] for a in call(*given)], [0, 0, 0])

    def test_lowers_for_cuda(self):
        given = (*operands(1, 8, 2, 512, 128), jnp.array([1500]))
        call = jitted("mosaic_gpu", num_kept=32)
        exported = jax.export.export(
            jax.jit(lambda *a: jax.tree.leaves(call(*a))), platforms=["cuda"]
        )(*given)
        self.assertEqual(exported.mlir_module().count("@mosaic_gpu"), 1)

    @parameterized.parameters(
        ({"dtype": jnp.float32}, "must be bfloat16 or float16, all"),
        ({"batch": 0}, r"there must be a query; got shape \(0, 4, 64\)"),
        ({"dim": 32}, "`head_dim` must be one of"),
        ({"pages": 100}, "multiple of 64, and at most 1024; got 100"),
        ({"pages": 2048}, "at most 1024; got 2048"),
        ({"heads": 34}, "at most 16 heads may share a key head; got 34 heads and 2"),
    )
    def test_kernel_says_why(self, change, reason):
        sizes = {"batch": 1, "heads": 4, "kv_heads": 2, "pages": 64, "dim": 64}
        sizes |= change
        given = (*operands(**sizes), jnp.full(sizes["batch"], 9))
        with self.assertRaisesRegex(NotImplementedError, reason):
            jitted("mosaic_gpu", num_kept=4)(*given)

    @parameterized.parameters(
        ({"query": jnp.zeros((1, 3, 8))}, r"divides heads; got \(1, 3, 8\), \(1, 4"),
        ({"high": jnp.zeros((1, 5, 2, 8))}, r"\(1, 5, 2, 8\) and int32\[1\]\."),
        ({"lengths": jnp.zeros(2, jnp.int32)}, r"and int32\[2\]\."),
        ({"lengths": jnp.ones(1)}, r"`lengths` integers .* and float32\[1\]\."),
        ({"page_size": 0}, "`page_size` must be at least 1; got 0"),
        ({"num_kept": 5}, r"`num_kept` must be in \[1, 4\], the pages; got 5"),
        ({"num_kept": 0}, r"must be in \[1, 4\], .*got 0"),
    )
    def test_refuses(self, change, message):
        names = ("query", "low", "high")
        given = dict(zip(names, operands(1, 4, 2, 4, 8), strict=True))
        given |= {"lengths": jnp.array([9]), "num_kept": 2, "page_size": PAGE}
        with self.assertRaisesRegex(ValueError, message):
            highest_pages(**given | change)


@pytest.mark.gpu
class DeviceTest(parameterized.TestCase):
    @parameterized.product(pages=[64, 512, 1024], num_kept=[32, 62])
    def test_equals_the_reference(self, pages, num_kept):
        query, low, high = operands(2, 8, 2, pages, 128)
        given = query, low, high, jnp.array([PAGE * pages, PAGE * pages // 2])
        got, want = (
            jitted(name, num_kept=num_kept)(*given)
            for name in ("mosaic_gpu", "reference")
        )
        for leaf, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_array_equal(leaf, other)

"""Attention to listed keys: against loops, its kernel, what it refuses."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax.formats import KeyLists
from sparsejax.ops import listed_attention
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter

_kernel, _listed = (
    importlib.import_module(f"sparsejax.ops.block_attention.{name}")
    for name in ("_mosaic_gpu_listed", "_listed")
)


def operands(batch, queries, slots, heads, kv_heads, dim, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, queries, heads, dim)] + 2 * [(batch, slots, kv_heads, dim)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def make_lists(lead, pages, page_size, capacity=None):
    """The last list of all is empty, if there are several."""
    kept = np.random.default_rng(0).random((*lead, pages)) < 0.5
    if lead != (1, 1):
        kept[-1, -1] = False
    options = {"page_size": page_size, "capacity": capacity}
    return jax.jit(functools.partial(KeyLists.from_mask, **options))(kept)


def by_loops(q, k, v, lists, lengths, scale):
    """The definition, a query and a head at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, queries, heads, _ = q.shape
    size, out = lists.page_size, np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            lead = lists.num.shape
            at = (b if lead[0] > 1 else 0, h * lead[1] // heads)
            pages = np.asarray(lists.indices[at])[: int(lists.num[at])]
            seen = [p * size + i for p in pages for i in range(size)]
            seen = [s for s in seen if s < lengths[b]]
            if not seen:
                continue
            head = h * k.shape[2] // heads
            for i in range(queries):
                scores = k[b, seen, head] @ q[b, i, h] * scale
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ v[b, seen, head] / weights.sum()
    return out


class ListedAttentionTest(parameterized.TestCase):
    @parameterized.parameters(
        ((2, 1, 24, 4, 2, 8), (2, 2), 4, [24, 10]),
        ((2, 3, 24, 4, 2, 8), (1, 4), 1, [24, 0]),  # a list a query head; no keys
        ((1, 1, 22, 2, 2, 8), (1, 1), 4, [21]),  # a last page beyond the cache
    )
    def test_against_loops(self, sizes, lead, page_size, lengths):
        q, k, v = operands(*sizes)
        lists = make_lists(lead, -(-sizes[2] // page_size), page_size)
        # what is not in the cache yet may hold anything
        beyond = jnp.arange(sizes[2]) >= jnp.asarray(lengths)[:, None]
        k, v = (jnp.where(beyond[..., None, None], jnp.nan, a) for a in (k, v))
        call = jax.jit(functools.partial(listed_attention, scale=0.7))
        got = call(q, k, v, lists, jnp.asarray(lengths))
        clean = (jnp.nan_to_num(a) for a in (k, v))
        want = by_loops(q, *clean, lists, lengths, 0.7)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        self.assertTrue((want != 0).any())

    def test_no_sequence(self):
        q, k, v = operands(0, 1, 8, 4, 2, 8)
        got = jax.jit(listed_attention)(q, k, v, make_lists((1, 2), 2, 4), 5)
        self.assertEqual(got.shape, (0, 1, 4, 8))

    @parameterized.parameters(
        ({"lists": "x"}, TypeError, "must be KeyLists; got str"),
        ({"k": jnp.zeros((1, 8, 1, 8), jnp.bfloat16)}, TypeError, "for `k`. Cast it"),
        (
            {"v": jnp.zeros((1, 9, 1, 8))},
            ValueError,
            r"`k` and `v` must have one shape",
        ),
        ({"q": jnp.zeros((1, 1, 3, 4))}, ValueError, "agree on batch and head_dim"),
        ({"lead": (1, 3)}, ValueError, r"\[1 or 1, 1, 1 or 2\]"),
        ({"length": jnp.zeros(2, jnp.int32)}, ValueError, "one for each of 1"),
        ({"length": 9}, ValueError, r"`length` must be in \[0, 8\]; got 9"),
        ({"scale": -1.0}, ValueError, "`scale` must be positive"),
    )
    def test_refuses(self, change, error, message):
        q, k, v = operands(1, 1, 8, 2, 1, 8)
        lists = make_lists(change.pop("lead", (1, 1)), 2, 4)
        given = {"q": q, "k": k, "v": v, "lists": lists, "length": 8} | change
        scale = given.pop("scale", None)
        with self.assertRaisesRegex(error, message):
            listed_attention(*given.values(), scale=scale)

    @parameterized.parameters(
        ({"page_size": 64}, "pages must be a multiple of 128 keys"),
        ({"queries": 200}, r"at most 64; got 200 \* 2"),
        ({"dim": 32}, "`head_dim` must be one of"),
    )
    def test_kernel_says_why(self, change, reason):
        options = {"page_size": 128, "queries": 1, "dim": 64} | change
        q, k, v = operands(
            1, options["queries"], 256, 2, 1, options["dim"], jnp.bfloat16
        )
        lists = make_lists((1, 1), 256 // options["page_size"], options["page_size"])
        with self.assertRaisesRegex(NotImplementedError, reason):
            listed_attention(q, k, v, lists, 5, implementation="mosaic_gpu")

    def test_lowers_for_cuda(self):
        q, k, v = operands(1, 1, 1024, 8, 2, 128, jnp.bfloat16)
        lists = make_lists((1, 2), 8, 128, capacity=3)
        call = functools.partial(listed_attention, implementation="mosaic_gpu")
        exported = jax.export.export(jax.jit(call), platforms=["cuda"])(
            q, k, v, lists, jnp.int32(1000)
        )
        self.assertEqual(exported.mlir_module().count("@mosaic_gpu"), 1)

    def test_gradients_of_a_kernel(self):
        """They are those of the reference, which a program for a GPU has too."""
        operand = operands(2, 1, 256, 4, 2, 64, jnp.bfloat16)
        lists, length = make_lists((1, 2), 2, 128), jnp.array([200, 0])

        def grads(implementation, *operand):
            def loss(q, k, v):
                fn = functools.partial(listed_attention, implementation=implementation)
                return fn(q, k, v, lists, length).astype(jnp.float32).sum()

            return jax.value_and_grad(loss, (0, 1, 2))(*operand)

        call = jax.jit(functools.partial(grads, "mosaic_gpu"))
        exported = jax.export.export(call, platforms=["cuda"])(*operand)
        self.assertEqual(exported.mlir_module().count("@mosaic_gpu"), 1)

        @jax.jit
        def of_kernel(*operand):
            kernel = functools.partial(
                _listed._with_gradients, _listed._gathered, 0.125
            )
            out, vjp = jax.vjp(lambda *a: kernel(*a, lists, length), *operand)
            return vjp(jnp.ones_like(out))

        want = jax.jit(functools.partial(grads, "reference"))(*operand)[1]
        for a, b in zip(of_kernel(*operand), want, strict=True):
            self.assertTrue(jnp.any(b != 0))
            np.testing.assert_array_equal(a, b)

    # two warpgroups in all: more than a machine of two cores can run are waited for
    @parameterized.parameters(
        # a list each, the last of all empty; with more tiles than slots
        ((2, 1, 512, 4, 2, 64), (2, 2), 3, (2, 1, 64), [450, 512]),
        # three queries, one list; a tile of rows that begins before the last head's
        ((1, 3, 512, 4, 2, 128), (1, 1), 2, (1, 2, 128), [200]),
        # more rows than warpgroups, of one list
        ((1, 9, 256, 1, 1, 64), (1, 1), 2, (2, 1, 64), [200]),
    )
    @needs_gpu_interpreter
    def test_kernel_matches(self, sizes, lead, capacity, cut, lengths):
        q, k, v = operands(*sizes, jnp.bfloat16)
        lists = make_lists(lead, sizes[2] // 128, 128, capacity=capacity)
        length = jnp.array(lengths)
        reference = functools.partial(listed_attention, implementation="reference")
        want = jax.jit(reference)(q, k, v, lists, length)
        tiles = _kernel.Tiles(*cut, in_registers=False)
        call = functools.partial(
            _kernel.listed_attention, scale=sizes[-1] ** -0.5, tiles=tiles
        )
        with gpu_interpreted():
            got = jax.jit(call)(q, k, v, lists, length)
        np.testing.assert_allclose(
            got.astype(jnp.float32), want.astype(jnp.float32), atol=0.02
        )
        if lead == (2, 2):
            np.testing.assert_array_equal(got[1, :, 2:], 0)  # nothing is listed

    @parameterized.parameters(
        (8, 4096, 16), (32, 4096, 4), (8, 512, 4), (1, 128, 1), (200, 4096, 1)
    )
    def test_programs_that_share_a_list(self, lists, keys, parts):
        self.assertEqual(_kernel.Tiles.default(lists, keys).parts, parts)


def test_a_key_that_no_list_names_feeds_no_gradient():
    q, k, v = operands(1, 1, 4, 2, 2, 2)
    kept = jnp.arange(4) > 0  # by the second head alone
    lists = KeyLists.from_mask(jnp.stack([kept & False, kept])[None])

    def total(q, k, v):
        return listed_attention(q, k, v, lists, 4).sum()

    want = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    k, v = (x.at[:, 0].set(jnp.nan) for x in (k, v))
    got = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(got[0][:, :, 0], 0)


@pytest.mark.gpu
class DeviceTest(parameterized.TestCase):
    @parameterized.parameters(
        (2, 1, 128, 8, 2), (2, 1, 64, 4, 4), (1, 1, 128, 32, 8), (1, 5, 128, 4, 1)
    )
    def test_matches_reference(self, batch, queries, dim, heads, kv_heads):
        q, k, v = operands(batch, queries, 8192, heads, kv_heads, dim, jnp.bfloat16)
        lists = make_lists((batch, kv_heads), 64, 128, capacity=40)
        length = jnp.array([8000, 8192])[:batch]
        got, again, want = (
            jax.jit(functools.partial(listed_attention, implementation=name))(
                q, k, v, lists, length
            ).astype(jnp.float32)
            for name in ("mosaic_gpu", "mosaic_gpu", "reference")
        )
        np.testing.assert_allclose(got, want, atol=0.02)
        np.testing.assert_array_equal(got, again)

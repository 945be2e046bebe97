"""Quest against loops over pages, its bound, and bounds kept up key by key."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsejax import attention, ops
from tests.attention import prompts

ROOM, PAGE = 26, 4  # seven pages, the last of two keys
LENGTHS = np.array([26, 14])  # that one, and one with room left
quest = jax.jit(attention.quest, static_argnames=("num_kept", "per_head"))
page_scores = jax.jit(attention.page_scores, static_argnames="per_head")
page_bounds = jax.jit(attention.page_bounds, static_argnames="page_size")


def last_queries(query):
    return jnp.stack([query[b, n - 1] for b, n in enumerate(LENGTHS)])[:, None]


def scores_oracle(query, key, length, per_head):
    """Of one sequence: channel by channel, the better end of the page."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    pages = -(-length // PAGE)
    scores = np.zeros((prompts.HEADS, pages))
    for h, p, c in np.ndindex(*scores.shape, prompts.DIM):
        own = key[p * PAGE : min((p + 1) * PAGE, length), h // prompts.GROUP, c]
        scores[h, p] += max(query[h, c] * own.min(), query[h, c] * own.max())
    if per_head:
        return scores
    return scores.reshape(prompts.KV_HEADS, prompts.GROUP, pages).sum(axis=1)


class QuestTest(parameterized.TestCase):
    @parameterized.product(num_kept=[0, 2, 6], per_head=[False, True])
    def test_equals_the_oracle(self, num_kept, per_head):
        """The shorter sequence has four pages, fewer than are kept at six."""
        query, key = prompts.prompt(ROOM)
        query = last_queries(query)

        def select(query, key, lengths):
            bounds = attention.page_bounds(key, lengths=lengths, page_size=PAGE)
            return attention.quest(query, bounds, num_kept=num_kept, per_head=per_head)

        @jax.jit
        def run(*operands):
            lists = select(*operands)
            again = jax.vmap(select)(*(x[None] for x in operands))
            return lists, lists.density(operands[-1]), again

        lists, density, again = run(query, key, jnp.asarray(LENGTHS))
        heads = prompts.HEADS if per_head else prompts.KV_HEADS
        self.assertEqual(lists.indices.shape, (2, heads, num_kept + 1))
        for b, length in enumerate(LENGTHS):
            scores = scores_oracle(query[b, 0], key[b], length, per_head)
            current = (length - 1) // PAGE
            for h in range(heads):
                earlier = prompts.highest_oracle(scores[h, :current], num_kept)
                want = sorted({*earlier, current})
                np.testing.assert_array_equal(lists.num[b, h], len(want))
                np.testing.assert_array_equal(lists.indices[b, h, : len(want)], want)
                keys = sum(min(PAGE, length - p * PAGE) for p in want)
                np.testing.assert_allclose(density[b, h], keys / length, rtol=1e-6)
        self.assertEqual(lists.page_size, PAGE)
        prompts.assert_same_under_vmap(lists, again)

    def test_all_pages_are_dense_attention(self):
        query, key = prompts.prompt(ROOM)
        query = last_queries(query)

        @jax.jit
        def attended(query, key):
            bounds = attention.page_bounds(key, lengths=LENGTHS, page_size=PAGE)
            lists = attention.quest(query, bounds, num_kept=6)
            return ops.listed_attention(query, key, key, lists, LENGTHS)

        seen = jnp.arange(ROOM) < jnp.asarray(LENGTHS)[:, None, None, None]
        want = jax.nn.dot_product_attention(query, key, key, mask=seen)
        np.testing.assert_allclose(attended(query, key), want, atol=1e-5)

    def test_an_empty_cache_and_a_nan_query(self):
        query, key = prompts.prompt(ROOM)
        empty = page_bounds(key, lengths=0, page_size=PAGE)
        lists = quest(query[:, :1], empty, num_kept=2)
        np.testing.assert_array_equal(lists.num, 0)
        bounds = page_bounds(key, page_size=PAGE)
        lists = quest(query[:, -1:].at[0].set(jnp.nan), bounds, num_kept=2)
        np.testing.assert_array_equal(lists.num, 3)
        np.testing.assert_array_equal(lists.indices[..., -1], 6)


class BoundTest(parameterized.TestCase):
    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_pages_of_one_key_have_its_product(self, dtype):
        query, key = (x.astype(dtype) for x in prompts.prompt(ROOM))
        bounds = attention.page_bounds(key, page_size=1)
        got = page_scores(query[:, -1:], bounds, per_head=True)
        query, key = (np.asarray(x, np.float64) for x in (query, key))
        key = key.repeat(prompts.GROUP, axis=2)
        want = np.einsum("bhd,bkhd->bhk", query[:, -1], key)
        np.testing.assert_allclose(got, want, atol=1e-5)

    def test_keys_taken_in_one_by_one(self):
        """Equal to bounds built at once, after a page that was not full."""
        _, key = prompts.prompt(ROOM)
        start = jnp.array([3, 8])

        def step(bounds, i):
            new = jnp.take_along_axis(
                key, (start + i)[:, None, None, None], axis=1, mode="clip"
            )
            return attention.append_key(bounds, new), None

        @jax.jit
        def run(key):
            bounds = attention.page_bounds(key, lengths=start, page_size=PAGE)
            return jax.lax.scan(step, bounds, jnp.arange(15))[0]

        got, want = run(key), page_bounds(key, lengths=start + 15, page_size=PAGE)
        for leaf, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_array_equal(leaf, other)

    def test_what_lies_behind_the_keys_is_not_read(self):
        query, key = prompts.prompt(ROOM)
        bounds = page_bounds(key.at[:, 14:].set(jnp.nan), lengths=14, page_size=PAGE)
        scores = np.asarray(page_scores(query[:, 13:14], bounds))
        self.assertTrue(np.isfinite(scores[..., :4]).all())
        self.assertTrue(np.isneginf(scores[..., 4:]).all())
        self.assertTrue(np.isposinf(bounds.low[:, 4:]).all())

    def test_a_key_beyond_the_room_is_dropped(self):
        _, key = prompts.prompt(ROOM)
        full = page_bounds(key, lengths=7 * PAGE, page_size=PAGE)
        more = attention.append_key(full, 9 + key[:, :1])
        np.testing.assert_array_equal(more.high, full.high)


entries = st.floats(-100, 100, width=32)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    query=hnp.arrays(np.float32, (1, 1, 2, 5), elements=entries),
    key=hnp.arrays(np.float32, (1, 12, 1, 5), elements=entries),
    length=st.integers(1, 12),
)
def test_no_key_scores_above_the_bound_of_its_page(query, key, length):
    """Each head's own bound, and the shared one: a sum over the heads."""
    bounds = page_bounds(key, lengths=length, page_size=5)
    each = np.asarray(page_scores(query, bounds, per_head=True), np.float64)[0]
    shared = np.asarray(page_scores(query, bounds), np.float64)[0, 0]
    products = key[0, :length, 0].astype(np.float64) @ query[0, 0].T.astype(np.float64)
    sizes = np.abs(key).max() * np.abs(query).sum()
    slack = 1e-6 * sizes  # float32 sums in another order
    for j in range(length):
        assert (each[:, j // 5] >= products[j] - slack).all()
        assert shared[j // 5] >= products[j].sum() - slack


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    query=hnp.arrays(np.int8, (1, 1, 2, 5)), key=hnp.arrays(np.int8, (1, 12, 1, 5))
)
def test_the_bound_has_no_slack_where_sums_are_exact(query, key):
    products = key[0, :, 0].astype(np.int64) @ query[0, 0].T.astype(np.int64)
    query, key = query.astype(np.float32), key.astype(np.float32)
    got = page_scores(query, page_bounds(key, page_size=5), per_head=True)
    for j in range(12):
        assert (got[0, :, j // 5] >= products[j]).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_kept": 7}, "`num_kept` must be at most the 6 earlier pages .*; got 7"),
        ({"num_kept": -1}, "`num_kept` must be at least 0, .*; got -1"),
        ({"page_size": 27}, r"`page_size` must be in \[1, 26\], .*; got 27. Choose"),
        ({"page_size": 0}, r"`page_size` must be in \[1, 26\], .*; got 0"),
        ({"heads": 3}, r"must divide its heads; got \(2, 1, 3, 8\) and .*7, 2, 8\)"),
        ({"queries": 2}, r"must be \[batch, 1, heads, .*; got \(2, 2, 4, 8\)"),
    ],
)
def test_bad_settings_raise(changed, message):
    query, key = prompts.prompt(ROOM)
    options = dict(num_kept=2, page_size=PAGE, queries=1, heads=4) | changed
    query = query[:, : options["queries"], : options["heads"]]
    with pytest.raises(ValueError, match=message):
        bounds = attention.page_bounds(key, page_size=options["page_size"])
        attention.quest(query, bounds, num_kept=options["num_kept"])


def test_keys_of_another_shape_raise():
    with pytest.raises(ValueError, match=r"`key` must be \[batch, .*got shape \(4, 2"):
        attention.page_bounds(jnp.ones((4, 2, 8)))


@pytest.mark.parametrize("shape", [(2, 2, 2, 8), (2, 1, 1, 8), (1, 1, 2, 8), (2, 2, 8)])
def test_a_next_key_of_another_shape_raises(shape):
    bounds = attention.page_bounds(prompts.prompt(ROOM)[1], lengths=3, page_size=PAGE)
    with pytest.raises(ValueError, match=r"`key` must be .*\(2, 1, 2, 8\); got shape"):
        attention.append_key(bounds, jnp.ones(shape))


def test_scores_of_another_query_raise():
    bounds = attention.page_bounds(prompts.prompt(ROOM)[1], page_size=PAGE)
    with pytest.raises(ValueError, match=r"must divide its heads; got \(2, 1, 3, 8\)"):
        attention.page_scores(jnp.ones((2, 1, 3, 8)), bounds)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.array([1, 2, 3]), "`lengths` must be one integer, or one for each of 2 "),
        (2.5, "one integer, .*; got ~float32"),
        (-1, rf"`lengths` must be in \[0, {ROOM}\]; got -1 for sequence 0. Give how"),
        ([0, ROOM + 1], f"; got {ROOM + 1} for sequence 1"),
    ],
)
def test_lengths_that_do_not_fit_raise(lengths, message):
    with pytest.raises(ValueError, match=message):
        attention.page_bounds(prompts.prompt(ROOM)[1], lengths=lengths, page_size=PAGE)


def test_no_gradient():
    def total(query, key):
        bounds = attention.page_bounds(key, page_size=4, lengths=8)
        bounds = attention.append_key(bounds, key[:, :1])
        scores = attention.page_scores(query[:, -1:], bounds)
        return bounds.low.sum() + bounds.high.sum() + scores.sum()

    x = jax.random.normal(jax.random.key(0), (1, 12, 2, 8))
    for grad in jax.grad(total, argnums=(0, 1))(x, x):
        np.testing.assert_array_equal(grad, 0)

"""SnapKV and Ada-SnapKV against loops over keys, and what is left of a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import attention, ops
from tests.attention import prompts
from tests.attention.snapkv_oracle import ada_oracle, importance_oracle

LENGTH = 40
SMALL = dict(num_kept=9, window=7, pool_size=5, local=3, sink=2)
ALWAYS = {0, 1, LENGTH - 3, LENGTH - 2, LENGTH - 1}


def run_with_vmap(select):
    @jax.jit
    def run(query, key):
        lists, again = select(query, key), jax.vmap(select)(query[None], key[None])
        return lists, lists.density(key.shape[1]), again

    return run


def assert_lists(lists, at, want):
    """The list at `at` holds `want`, ascending, then its last index."""
    num = int(lists.num[at])
    np.testing.assert_array_equal(lists.indices[at][:num], sorted(want))
    assert (lists.indices[at][num:] == max(want)).all()


class SnapKVTest(parameterized.TestCase):
    @parameterized.parameters((5, 5, ALWAYS), (LENGTH, 5, ALWAYS), (15, 15, ()))
    def test_equals_the_oracle(self, num_kept, pool_size, always):
        """With keys of all the prompt, and queries of no more than its end.

        Where no key is forced the zeros beyond the ends show: they count.
        """
        query, key = prompts.prompt(LENGTH)
        options = SMALL | dict(num_kept=num_kept, pool_size=pool_size)
        options |= {} if always else dict(local=0, sink=0)
        run = run_with_vmap(functools.partial(attention.snapkv, **options))
        lists, density, again = run(query[:, -12:], key)
        scores = importance_oracle(
            query, key, 7, pool_size, lambda own: own.mean(axis=0).sum(axis=0)
        )
        for at in np.ndindex(scores.shape[:2]):
            want = prompts.highest_oracle(scores[at], num_kept, always)
            assert_lists(lists, at, want)
            self.assertLen(want, num_kept)
        np.testing.assert_allclose(density, num_kept / LENGTH, rtol=1e-6)
        self.assertEqual(lists.indices.shape, (2, prompts.KV_HEADS, num_kept))
        self.assertFalse(lists.overflowed.any())
        prompts.assert_same_under_vmap(lists, again)

    def test_keys_at_the_ends_are_not_smoothed_into_their_neighbours(self):
        """They are forced after the pooling: before it, `inf` would spread."""
        query, key = np.zeros((2, 1, LENGTH, 1, 4), np.float32)
        query[..., 0] = key[0, 20, 0, 0] = 8  # the one key that matters
        lists = jax.jit(
            functools.partial(attention.snapkv, **SMALL | dict(num_kept=10))
        )(query, key)
        np.testing.assert_array_equal(
            lists.indices[0, 0], [0, 1, 18, 19, 20, 21, 22, 37, 38, 39]
        )

    def test_all_keys_are_dense_attention(self):
        query, key = prompts.prompt(LENGTH)
        now = query[:, -1:]

        @jax.jit
        def attended(query, key):
            lists = attention.snapkv(query, key, **SMALL | dict(num_kept=LENGTH))
            return ops.listed_attention(now, key, key, lists, LENGTH)

        want = jax.nn.dot_product_attention(now, key, key)
        np.testing.assert_allclose(attended(query, key), want, atol=1e-5)


class AdaSnapKVTest(parameterized.TestCase):
    @parameterized.parameters((9, 0.2), (9, 0.8), (5, 0.2), (LENGTH, 0.5))
    def test_equals_the_oracle(self, num_kept, min_share):
        x = prompts.prompt(LENGTH)
        options = SMALL | dict(num_kept=num_kept, min_share=min_share)
        run = run_with_vmap(functools.partial(attention.ada_snapkv, **options))
        lists, density, again = run(*x)
        scores = importance_oracle(*x, 7, 5, lambda own: own.max(axis=(0, 1)))
        own = max(int(min_share * num_kept), 5)
        for b in range(2):
            kept = ada_oracle(scores[b], num_kept, own, ALWAYS)
            for h, want in enumerate(kept):
                assert_lists(lists, (b, h), want)
                np.testing.assert_allclose(density[b, h], len(want) / LENGTH, rtol=1e-6)
                self.assertLessEqual(ALWAYS, want)
        np.testing.assert_array_equal(lists.num.sum(axis=1), 2 * num_kept)
        self.assertGreaterEqual(lists.num.min(), own)
        self.assertFalse(lists.overflowed.any())
        if num_kept == 9 and min_share == 0.2:
            self.assertGreater(np.ptp(lists.num), 0)  # heads differ
        prompts.assert_same_under_vmap(lists, again)

    @pytest.mark.once
    def test_equal_heads_keep_what_each_would_alone(self):
        """One query is asked, by one head a key head: its sum is its maximum."""
        query, key = prompts.prompt(LENGTH)
        query, key = query[:, :, :1].repeat(2, 2), key[:, :, :1].repeat(2, 2)
        options = SMALL | dict(window=1)
        ada = jax.jit(functools.partial(attention.ada_snapkv, **options))(query, key)
        one = jax.jit(functools.partial(attention.snapkv, **options))(query, key)
        np.testing.assert_array_equal(ada.num, one.num)
        np.testing.assert_array_equal(ada.indices[..., :9], one.indices)

    def test_all_is_kept_by_count_where_scores_are_nan(self):
        query, key = prompts.prompt(LENGTH)
        query = query.at[0, -1].set(jnp.nan)
        lists = jax.jit(functools.partial(attention.ada_snapkv, **SMALL))(query, key)
        np.testing.assert_array_equal(lists.num.sum(axis=1), 18)


@pytest.mark.once
@pytest.mark.parametrize("select", [attention.snapkv, attention.ada_snapkv])
def test_of_unlike_lengths_each_prompt_is_read_as_alone(select):
    """Some have fewer keys than are kept, or fewer queries than are asked."""
    lengths = (LENGTH, 21, 12, 8, 4, 1)
    query, key = prompts.prompt(LENGTH, batch=len(lengths))
    beyond = (np.arange(LENGTH) >= np.array(lengths)[:, None])[..., None, None]
    filled = [jnp.where(beyond, jnp.nan, x) for x in (query, key)]
    run = jax.jit(functools.partial(select, **SMALL))
    lists = run(*filled, lengths=jnp.array(lengths))
    for row, length in enumerate(lengths):
        ends = {*range(min(2, length)), *range(max(0, length - 3), length)}
        num_kept, window = min(9, length), min(7, length)
        own = [x[row : row + 1, :length] for x in (query, key)]
        if select is attention.snapkv:
            scores = importance_oracle(
                *own, window, 5, lambda of_head: of_head.mean(axis=0).sum(axis=0)
            )[0]
            kept = [prompts.highest_oracle(of, num_kept, ends) for of in scores]
        else:
            scores = importance_oracle(
                *own, window, 5, lambda of_head: of_head.max(axis=(0, 1))
            )[0]
            kept = ada_oracle(scores, num_kept, min(5, length), ends)
        for head, want in enumerate(kept):
            assert_lists(lists, (row, head), want)
    assert not lists.overflowed.any()


@pytest.mark.parametrize("select", [attention.snapkv, attention.ada_snapkv])
def test_lengths_that_do_not_fit_raise(select):
    query, key = prompts.prompt(LENGTH)
    with pytest.raises(ValueError, match=r"each of 2 sequences; got int32\[3\]"):
        select(query, key, **SMALL, lengths=jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"in \[1, 40\]; got 1000 for sequence 1"):
        select(query, key, **SMALL, lengths=[40, 1000])
    with pytest.raises(ValueError, match=r"of all the prompt .*12 queries and 40 keys"):
        select(query[:, -12:], key, **SMALL, lengths=30)


@pytest.mark.parametrize("select", [attention.snapkv, attention.ada_snapkv])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_kept": 41}, "`num_kept` must be at most the 40 keys .*; got 41. Lower"),
        (
            {"num_kept": 4},
            "`num_kept` must be at least 5, the `local` last .*; got 4. Raise",
        ),
        ({"window": 41}, "`window` must be at most the 40 queries .*; got 41"),
        ({"pool_size": 4}, "`pool_size` must be odd and at least 1; got 4"),
        ({"local": 41}, "`local` must be at most the 40 keys .*; got 41"),
        ({"sink": -1}, "`sink` must be at least 0, .*; got -1"),
        ({"heads": 3}, r"key heads must divide .*got \(2, 40, 3, 8\)"),
        ({"keys": 39}, "no longer; got 40 queries and 39 keys"),
    ],
)
def test_bad_settings_raise(select, changed, message):
    query, key = prompts.prompt(LENGTH)
    options = SMALL | changed
    query = query[:, :, : options.pop("heads", 4)]
    key = key[:, : options.pop("keys", LENGTH)]
    with pytest.raises(ValueError, match=message):
        select(query, key, **options)


def test_a_bad_share_raises():
    with pytest.raises(ValueError, match=r"`min_share` must be in \[0, 1\], .*got 1.2"):
        attention.ada_snapkv(*prompts.prompt(LENGTH), **SMALL, min_share=1.2)


def test_what_is_each_heads_own_is_rounded_down():
    """Head 0 attends to 16 keys alone, head 1 to all: what is shared is head 0's."""
    query, key = jnp.ones((1, 40, 2, 4)), jnp.zeros((1, 40, 2, 4))
    key = key.at[:, 5:21, 0].set(8)
    options = SMALL | dict(pool_size=1, min_share=0.75)
    lists = attention.ada_snapkv(query, key, **options)
    np.testing.assert_array_equal(lists.num, [[12, 6]])  # 6 of 6.75


@pytest.mark.parametrize("select", [attention.snapkv, attention.ada_snapkv])
def test_ends_that_meet_are_all_keys(select):
    options = SMALL | dict(num_kept=LENGTH, local=30, sink=20)
    assert (select(*prompts.prompt(LENGTH), **options).num == LENGTH).all()

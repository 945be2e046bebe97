"""Double Sparsity against loops over heads and keys; what its calibration finds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import attention, ops
from tests.attention import prompts

ROOM, CHANNELS = 26, 3
LENGTHS = np.array([26, 14])
KINDS = ("qk", "qk_var", "q", "k")
channel_scores = jax.jit(attention.channel_scores, static_argnames="kind")
key_labels = jax.jit(attention.key_labels, static_argnames="bits")
label_scores = jax.jit(attention.label_scores)
double_sparsity = jax.jit(
    attention.double_sparsity, static_argnames=("num_kept", "sink", "local")
)


def last_queries(query):
    return jnp.stack([query[b, n - 1] for b, n in enumerate(LENGTHS)])[:, None]


def channel_scores_oracle(query, key, kind):
    """Token by token; `[heads, head_dim]`."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    scores = np.zeros((prompts.HEADS, prompts.DIM))
    for b, t, h in np.ndindex(query.shape[:3]):
        q, k = query[b, t, h], key[b, t, h // prompts.GROUP]
        across = np.var(key[b, :, h // prompts.GROUP], axis=0)
        of = {"qk": abs(q * k), "q": abs(q), "k": abs(k), "qk_var": q**2 * across}
        scores[h] += of[kind]
    return scores


def fake_quant(label, bits):
    """A vector with each entry moved to the nearest of `2 ** bits` even steps."""
    if bits is None:
        return label
    low, step = label.min(), (label.max() - label.min()) / (2**bits - 1)
    codes = np.clip(np.round((label - low) / (step or 1)), 0, 2**bits - 1)
    return low + step * codes


def label_scores_oracle(query, key, indices, bits):
    """Of one sequence, `[label_heads, keys]`; labels are rounded in float32."""
    query, key = np.asarray(query), np.asarray(key)
    scores = np.zeros((len(indices), len(key)))
    for h, j in np.ndindex(len(query), len(key)):
        own = h * len(indices) // len(query)
        label = fake_quant(query[h, indices[own]], bits).astype(np.float64)
        other = fake_quant(key[j, h // prompts.GROUP, indices[own]], bits)
        scores[own, j] += label @ other
    return scores


def found_channels(query, key, num_channels=CHANNELS, per_head=False):
    return attention.select_channels(
        attention.channel_scores(query, key),
        num_channels=num_channels,
        per_head=per_head,
    )


class ChannelsTest(parameterized.TestCase):
    @parameterized.parameters(*KINDS)
    def test_scores_equal_the_oracle_and_add_up(self, kind):
        """Over batches and, but for the variance over a sequence, over its parts.

        The released code's "qk" is that of the last part alone.
        """
        query, key = prompts.prompt(8)
        got = channel_scores(query, key, kind=kind)
        want = channel_scores_oracle(query, key, kind)
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-5)
        axis = 0 if kind == "qk_var" else 1
        parts = zip(*(jnp.split(x, 2, axis) for x in (query, key)), strict=True)
        each = [channel_scores(*part, kind=kind) for part in parts]
        np.testing.assert_allclose(each[0] + each[1], got, rtol=1e-5)
        self.assertGreater(np.abs(each[1] - got).max(), 1.0)

    @parameterized.product(per_head=[False, True])
    def test_channels_are_the_highest(self, per_head):
        scores = np.random.default_rng(0).random((3, 2, 2, 8)).astype(np.float32)
        scores[0, 0] = 1.0  # the lower of tied channels
        select = jax.jit(
            attention.select_channels, static_argnames=("num_channels", "per_head")
        )
        got = select(scores, num_channels=3, per_head=per_head)
        ranked = scores.reshape(3, 4, 8) if per_head else scores.sum(axis=2)
        for at in np.ndindex(ranked.shape[:2]):
            want = sorted(prompts.highest_oracle(ranked[at], 3))
            np.testing.assert_array_equal(got.indices[at], want)
        self.assertEqual((got.num_heads, got.num_kv_heads, got.head_dim), (4, 2, 8))

    @parameterized.parameters(*KINDS)
    def test_finds_channels_of_large_entries(self, kind):
        query, key = prompts.prompt(32)
        planted = np.array([[1, 4, 5], [0, 2, 7]])
        scale = np.ones((2, 8), np.float32)
        np.put_along_axis(scale, planted, 8, axis=1)
        scores = channel_scores(query * scale.repeat(2, 0), key * scale, kind=kind)
        got = attention.select_channels(scores, num_channels=3)
        np.testing.assert_array_equal(got.indices, planted)

    def test_what_all_keys_share_misleads_products_but_no_variance(self):
        query, key = prompts.prompt(32)
        key = key.at[..., 3].set(50.0)  # adds the same to each product of a query
        for kind in ("qk", "k", "qk_var"):
            scores = channel_scores(query, key, kind=kind)
            got = attention.select_channels(scores, num_channels=3).indices
            self.assertEqual(bool((got == 3).any()), kind != "qk_var", kind)

    def test_interleaved_rotation(self):
        """As in the released code: c goes to (2 c mod d) + floor(2 c / d)."""
        scores = jnp.zeros((1, 1, 8)).at[0, 0, jnp.array([1, 4, 6])].set(1.0)
        channels = attention.select_channels(scores, num_channels=3)
        moved = attention.interleaved_channels(channels)
        np.testing.assert_array_equal(moved.indices, [[1, 2, 5]])
        x = np.arange(8.0)
        other = np.stack([x[:4], x[4:]], axis=1).reshape(-1)  # pairs side by side
        np.testing.assert_array_equal(np.sort(other[moved.indices[0]]), [1, 4, 6])


class LabelsTest(parameterized.TestCase):
    @parameterized.product(bits=[None, 4], per_head=[False, True])
    def test_scores_and_lists_equal_the_oracle(self, bits, per_head):
        """With fewer keys than are kept in the shorter sequence, and under `vmap`."""
        query, key = prompts.prompt(ROOM)
        channels = found_channels(query, key, per_head=per_head)
        query, num_kept = last_queries(query), 16

        def select(query, key, lengths, ends):
            labels = attention.key_labels(key, channels, lengths=lengths, bits=bits)
            options = dict(num_kept=num_kept) | ends
            lists = attention.double_sparsity(query, labels, **options)
            return attention.label_scores(query, labels), lists

        @jax.jit
        def run(*x):
            again = jax.vmap(lambda *x: select(*x, {})[1])(*(a[None] for a in x))
            forced = select(*x, dict(num_kept=5, sink=1, local=2))[1]
            return *select(*x, {}), forced, again

        scores, lists, forced, again = run(query, key, jnp.asarray(LENGTHS))
        heads = prompts.HEADS if per_head else prompts.KV_HEADS
        self.assertEqual(lists.indices.shape, (2, heads, num_kept))
        self.assertEqual(lists.page_size, 1)
        for b, n in enumerate(LENGTHS):
            want = label_scores_oracle(
                query[b, 0], key[b, :n], np.asarray(channels.indices), bits
            )
            np.testing.assert_allclose(scores[b, :, :n], want, atol=1e-5)
            self.assertTrue(np.isneginf(scores[b, :, n:]).all())
            for h in range(heads):
                for got, count, always in (
                    (lists, num_kept, set()),
                    (forced, 5, {0, n - 2, n - 1}),
                ):
                    best = sorted(prompts.highest_oracle(want[h], count, always))
                    np.testing.assert_array_equal(got.num[b, h], len(best))
                    kept = got.indices[b, h, : len(best)]
                    np.testing.assert_array_equal(kept, best)
        prompts.assert_same_under_vmap(lists, again)

    def test_with_all_channels_it_is_the_exact_best(self):
        """The labels' product is that of whole keys; all keys are dense attention."""
        query, key = prompts.prompt(ROOM)
        channels = found_channels(query, key, num_channels=8, per_head=True)
        query = last_queries(query)

        @jax.jit
        def attended(query, key):
            labels = attention.key_labels(key, channels, lengths=LENGTHS)
            best = attention.double_sparsity(query, labels, num_kept=5)
            every = attention.double_sparsity(query, labels, num_kept=ROOM)
            out = ops.listed_attention(query, key, key, every, LENGTHS)
            seen = jnp.arange(ROOM) < jnp.asarray(LENGTHS)[:, None, None, None]
            return best, out, jax.nn.dot_product_attention(query, key, key, mask=seen)

        best, got, want = attended(query, key)
        np.testing.assert_allclose(got, want, atol=1e-5)
        key = np.asarray(key, np.float64).repeat(prompts.GROUP, axis=2)
        for b, h in np.ndindex(2, prompts.HEADS):
            products = key[b, : LENGTHS[b], h] @ np.asarray(query[b, 0, h])
            want = sorted(prompts.highest_oracle(products, 5))
            np.testing.assert_array_equal(best.indices[b, h], want)

    @parameterized.parameters(None, 2)
    def test_labels_taken_in_one_by_one(self, bits):
        """Equal to those made at once; the last has no room and is dropped."""
        query, key = prompts.prompt(ROOM)
        channels = found_channels(query, key)
        start = jnp.array([3, 20])

        def step(labels, i):
            new = jnp.take_along_axis(
                key, (start + i)[:, None, None, None], axis=1, mode="clip"
            )
            return attention.append_label(labels, new), None

        @jax.jit
        def run(key):
            there = jnp.arange(ROOM) < start[:, None]
            so_far = jnp.where(there[..., None, None], key, 0)
            labels = attention.key_labels(so_far, channels, lengths=start, bits=bits)
            return jax.lax.scan(step, labels, jnp.arange(7))[0]

        got = run(key)
        want = key_labels(key, channels, lengths=start + 7, bits=bits)
        np.testing.assert_array_equal(got.lengths, [10, 27])
        for leaf, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            if leaf.ndim < 3:
                continue
            for b, n in enumerate((10, 26)):
                np.testing.assert_array_equal(leaf[b, :n], other[b, :n])

    def test_codes_are_near_and_keep_constant_labels(self):
        """Within half a step, and the more bits the nearer."""
        key = prompts.prompt(ROOM)[1].at[:, 0].set(0.7)
        channels = found_channels(*prompts.prompt(8), num_channels=8)
        exact = np.asarray(key)
        spread = exact.max(axis=-1) - exact.min(axis=-1)
        errors = []
        for bits in (1, 4, 8):
            labels = key_labels(key, channels, bits=bits)
            self.assertEqual(labels.values.dtype, jnp.uint8)
            self.assertEqual(int(labels.values.max()), 2**bits - 1)
            got = labels.low[..., None] + labels.step[..., None] * labels.values
            errors.append(np.abs(got - exact))
            most = spread / (2 * (2**bits - 1)) + 1e-6
            self.assertTrue((errors[-1] <= most[..., None]).all())
            np.testing.assert_array_equal(got[:, 0], exact[:, 0])
        self.assertLess(errors[1].mean(), errors[0].mean())
        self.assertLess(errors[2].mean(), errors[1].mean())

    def test_bits_are_heeded(self):
        """The released conversion does not pass them on: all layers had 4."""
        query, key = prompts.prompt(ROOM)
        channels = found_channels(query, key)
        scores = [
            np.asarray(label_scores(query[:, -1:], key_labels(key, channels, bits=n)))
            for n in (None, 8, 4, 2)
        ]
        off = [np.abs(s - scores[0]).mean() for s in scores[1:]]
        self.assertLess(off[0], off[1] / 4)
        self.assertLess(off[1], off[2] / 2)

    @pytest.mark.once
    def test_a_nan_and_an_infinity_stay_among_the_keys(self):
        query, key = prompts.prompt(ROOM)
        channels = found_channels(query, key)
        key = key.at[:, 14:].set(jnp.nan).at[0, 2].set(jnp.nan).at[0, 5].set(jnp.inf)
        labels = key_labels(key, channels, lengths=14)
        query = jnp.abs(query[:, 13:14]).at[1].set(jnp.nan)
        lists = double_sparsity(query, labels, num_kept=13, local=1)
        np.testing.assert_array_equal(lists.num, 13)
        self.assertLess(lists.indices.max(), 14)
        self.assertFalse((lists.indices[0] == 2).any())
        self.assertTrue((lists.indices == 13).any(axis=-1).all())


@pytest.mark.once
def test_calibrated_channels_find_a_needle_where_others_do_not():
    """One key points along the query, in channels of very unequal sizes."""
    rng = np.random.default_rng(0)
    draws, room, dim = 50, 256, 32
    scale = np.exp(rng.normal(size=dim) * 1.5)
    query = rng.normal(size=(draws, 1, 1, dim)) * scale
    key = rng.normal(size=(draws, room, 1, dim)) * scale
    needle = rng.integers(0, room, draws)
    key[np.arange(draws), needle] = 2 * query[:, 0]
    query, key = (jnp.asarray(x, jnp.float32) for x in (query, key))
    text = jnp.asarray(rng.normal(size=(2, 1, 64, 1, dim)) * scale, jnp.float32)
    best = attention.select_channels(channel_scores(*text), num_channels=8)
    random = dataclasses.replace(
        best, indices=jnp.asarray(rng.permutation(dim)[None, :8])
    )
    found = []
    for channels in (best, random):
        lists = double_sparsity(query, key_labels(key, channels), num_kept=8)
        found.append(np.mean((lists.indices[:, 0] == needle[:, None]).any(axis=-1)))
    assert found[0] >= 0.95
    assert found[1] < found[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "kq"}, "`kind` must be one of .*; got 'kq'"),
        ({"seq": 8}, "of the same tokens; got 8 queries and 26 keys"),
        ({"num_channels": 9}, r"`num_channels` must be in \[1, 8\], .*; got 9"),
        ({"num_channels": 0}, r"`num_channels` must be in \[1, 8\], .*; got 0"),
        ({"bits": 0}, r"`bits` must be in \[1, 8\], or None; got 0"),
        ({"bits": 9}, r"`bits` must be in \[1, 8\], or None; got 9"),
        ({"num_kept": 27}, "at most the 26 keys of the cache .*; got 27"),
        ({"num_kept": 2, "sink": 2, "local": 1}, "`num_kept` must be at least 3"),
        ({"num_kept": 0}, "`num_kept` must be at least 1"),
        (
            {"dim": 6},
            r"`key` must be .*2, 8\], .*calibrated on; got .*2, 6\)",
        ),
        ({"kv_heads": 1}, r"`key` must be .*2, 8\].*got shape \(2, 26, 1, 8\)"),
        ({"heads": 2}, r"`query` must be .*4, 8\].*got shape \(2, 1, 2, 8\)"),
        ({"queries": 2}, r"one position in each .*; got \(2, 2, 4, 8\)"),
        ({"layers": 3}, r"`channels` must be of one layer, .*; got shape \(3, 2, 3\)"),
    ],
)
def test_bad_settings_raise(changed, message):
    o = dict(kind="qk", seq=ROOM, num_channels=3, bits=None, num_kept=4, sink=0)
    o |= dict(local=0, dim=8, kv_heads=2, heads=4, queries=1, layers=None) | changed

    def run(query, key):
        scores = attention.channel_scores(query[:, : o["seq"]], key, kind=o["kind"])
        if o["layers"]:
            scores = jnp.stack([scores] * o["layers"])
        channels = attention.select_channels(scores, num_channels=o["num_channels"])
        key = key[:, :, : o["kv_heads"], : o["dim"]]
        labels = attention.key_labels(key, channels, bits=o["bits"])
        query = query[:, : o["queries"], : o["heads"]]
        options = {name: o[name] for name in ("num_kept", "sink", "local")}
        return attention.double_sparsity(query, labels, **options)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, *prompts.prompt(ROOM))


@pytest.mark.parametrize("shape", [(2, 2, 2, 8), (2, 1, 1, 8), (1, 1, 2, 8), (2, 2, 8)])
def test_a_next_key_of_another_shape_raises(shape):
    query, key = prompts.prompt(ROOM)
    scores = attention.channel_scores(query, key)
    channels = attention.select_channels(scores, num_channels=3)
    labels = attention.key_labels(key, channels, lengths=3)
    with pytest.raises(ValueError, match=r"`key` must be .*\(2, 1, 2, 8\); got shape"):
        attention.append_label(labels, jnp.ones(shape))


def test_lengths_that_do_not_fit_raise():
    query, key = prompts.prompt(ROOM)
    scores = attention.channel_scores(query, key)
    channels = attention.select_channels(scores, num_channels=3)
    with pytest.raises(ValueError, match=r"`lengths` must be .* of 2 .*int32\[3\]"):
        attention.key_labels(key, channels, lengths=jnp.ones(3, jnp.int32))


def test_scores_of_another_shape_raise():
    with pytest.raises(ValueError, match=r"\[\*lead, kv_.*; got shape \(4, 8\)"):
        attention.select_channels(jnp.ones((4, 8)), num_channels=2)


def test_no_gradient():
    def total(query, key):
        scores = attention.channel_scores(query, key)
        channels = attention.select_channels(scores, num_channels=2)
        labels = attention.key_labels(key, channels, lengths=8)
        labels = attention.append_label(labels, key[:, :1])
        found = attention.label_scores(query[:, -1:], labels)[..., :8]
        return scores.sum() + labels.values.sum() + found.sum()

    x = jax.random.normal(jax.random.key(0), (1, 9, 2, 8))
    for grad in jax.grad(total, argnums=(0, 1))(x, x):
        np.testing.assert_array_equal(grad, 0)


def test_labels_of_narrow_keys_have_float32_scales():
    key = jax.random.normal(jax.random.key(0), (1, 8, 1, 16), jnp.bfloat16)
    channels = attention.select_channels(jnp.ones((1, 1, 16)), num_channels=16)
    labels = attention.key_labels(key, channels, bits=8)
    assert labels.low.dtype == labels.step.dtype == jnp.float32

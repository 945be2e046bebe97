"""SeerAttention against loops written from the paper: gate, target, loss, selection."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import sparsejax as sj
from sparsejax import attention, nn, ops

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all is compilation

HEADS, KV_HEADS, DIM, GROUP = 4, 2, 8, 2
BASE = 100.0
rotate = functools.partial(nn.apply_rope, base=BASE)

scores_of = jax.jit(
    functools.partial(attention.seer_scores, rotate=rotate), static_argnames="block"
)
target_of = jax.jit(attention.seer_target, static_argnames="block")
decode_target_of = jax.jit(attention.seer_decode_target, static_argnames="block")
loss_and_grad = jax.jit(
    jax.value_and_grad(attention.seer_loss), static_argnames=("skip", "reduction")
)

topk = jax.jit(
    attention.seer_topk, static_argnames=("num_kept", "block", "dense_last_rows")
)
topk_traced = jax.jit(attention.seer_topk, static_argnames=("block", "dense_last_rows"))
threshold = jax.jit(
    attention.seer_threshold, static_argnames=("block", "dense_last_rows")
)
blocks_of = jax.jit(sj.BlockMask.to_blocks)


def operands(seq=26, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, seq, HEADS, DIM), (2, seq, KV_HEADS, DIM)
    return [jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes]


def rope_oracle(x, position):
    """One vector: pairs are `(i, i + half)`."""
    half, out = len(x) // 2, np.zeros(len(x))
    for i in range(half):
        angle = position * BASE ** (-i / half)
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def features_oracle(keys):
    """Keys of one block and head, as many as it really has."""
    return np.concatenate([keys.max(axis=0), keys.min(axis=0), keys.mean(axis=0)])


def scores_oracle(gate, query, key, block):
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    of_query, of_key = (None if w is None else np.asarray(w, np.float64) for w in gate)
    blocks = -(-query.shape[1] // block)
    scores = np.full((len(query), HEADS, blocks, blocks), -np.inf)
    for b, h, i, j in np.ndindex(scores.shape):
        if j > i:
            continue
        q = query[b, i * block : (i + 1) * block, h].mean(axis=0)
        k = features_oracle(key[b, j * block : (j + 1) * block, h // GROUP])
        if of_query is None:
            k = k @ of_key[h]
        else:
            q, k = q @ of_query[h], k @ of_key[h // GROUP]
        q, k = rope_oracle(q, i * block), rope_oracle(k, j * block)
        scores[b, h, i, j] = q @ k / np.sqrt(len(q))
    return scores


def softmax_oracle(query, key):
    """The causal attention map, `[batch, heads, seq, seq]`."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    seq = query.shape[1]
    weights = np.zeros((len(query), HEADS, seq, seq))
    for b, h, t in np.ndindex(weights.shape[:3]):
        s = key[b, : t + 1, h // GROUP] @ query[b, t, h] / np.sqrt(DIM)
        weights[b, h, t, : t + 1] = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
    return weights


def target_oracle(query, key, block):
    weights = softmax_oracle(query, key)
    blocks = -(-weights.shape[-1] // block)
    target = np.zeros((*weights.shape[:2], blocks, blocks))
    for i, j in np.ndindex(blocks, blocks):
        rows, columns = (slice(n * block, (n + 1) * block) for n in (i, j))
        target[..., i, j] = weights[..., rows, columns].max(axis=(-2, -1))
    return target / target.sum(axis=-1, keepdims=True)


def decode_target_oracle(query, key, block):
    weights = softmax_oracle(query, key)
    batch, _, seq, _ = weights.shape
    target = np.zeros((batch, KV_HEADS, seq, -(-seq // block)))
    for b, h, t in np.ndindex(target.shape[:3]):
        for j in range(t // block):
            columns = slice(j * block, (j + 1) * block)
            group = weights[b, h * GROUP : (h + 1) * GROUP, t, columns]
            target[b, h, t, j] = group.max()
    return target / (target.sum(axis=-1, keepdims=True) + 1e-9)


class GateTest(parameterized.TestCase):
    @parameterized.product(d_gate=[DIM, 6], block=[4, 13])
    def test_scores(self, d_gate, block):
        """Both forms of the gate, with a short and a whole last block."""
        gate = attention.init_seer_gate(
            HEADS, KV_HEADS, DIM, d_gate=d_gate, key=jax.random.key(0)
        )
        assert (gate.query is None) == (d_gate == DIM)
        gate = jax.tree.map(lambda w: 10 * w, gate)
        query, key = operands()
        got = scores_of(gate, query, key, block=block)
        want = scores_oracle(gate, query, key, block)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def test_all_the_same_sign_in_the_last_block(self):
        """Padding by zeros would be its minimum, and lower its mean."""
        gate = attention.init_seer_gate(
            HEADS, KV_HEADS, DIM, d_gate=DIM, key=jax.random.key(0)
        )
        query, key = (jnp.abs(x) + 1 for x in operands())
        got = scores_of(gate, query, key, block=4)
        want = scores_oracle(gate, query, key, 4)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def test_positions(self):
        """A distance is all that matters, and other positions are another matter."""
        gate = attention.init_seer_gate(
            HEADS, KV_HEADS, DIM, d_gate=DIM, key=jax.random.key(0)
        )
        query, key = operands()
        at = jnp.arange(26)[None]
        plain, moved, spread = (
            scores_of(gate, query, key, block=4, positions=p)
            for p in (None, at + 7, 2 * at)
        )
        np.testing.assert_allclose(plain, moved, atol=1e-5)
        assert jnp.abs((plain - spread)[:, :, -1]).max() > 1e-2

    def test_draw(self):
        gate = attention.init_seer_gate(
            8, 2, 64, d_gate=32, key=jax.random.key(0), project_query=True
        )
        assert gate.query.shape == (8, 64, 32) and gate.key.shape == (2, 192, 32)
        for kernel in gate:
            np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)

    def test_gradients_reach_the_gate_alone(self):
        gate = attention.init_seer_gate(
            HEADS, KV_HEADS, DIM, d_gate=6, key=jax.random.key(0)
        )

        @functools.partial(jax.grad, argnums=(0, 1, 2))
        def grads(gate, query, key):
            scores = attention.seer_scores(gate, query, key, block=4, rotate=rotate)
            target = attention.seer_target(query, key, block=4)
            return attention.seer_loss(scores, target)

        of_gate, *others = jax.jit(grads)(gate, *operands())
        for leaf in of_gate:
            assert jnp.isfinite(leaf).all() and (leaf != 0).all()
        for leaf in others:
            np.testing.assert_array_equal(leaf, 0)

    def test_filler_reaches_no_gradient(self):
        """Also where it is not finite, and all that a block has."""
        gate = attention.init_seer_gate(
            HEADS, KV_HEADS, DIM, d_gate=DIM, key=jax.random.key(0)
        )
        query, key = operands()
        target, lengths = target_of(query, key, block=4), jnp.array([26, 9])

        @jax.jit
        @jax.value_and_grad
        def run(gate, query, key):
            scores = attention.seer_scores(
                gate, query, key, block=4, rotate=rotate, lengths=lengths
            )
            return attention.seer_loss(scores, target, num_rows=-(-lengths // 4))

        filler = jnp.arange(26)[:, None, None] >= lengths[:, None, None, None]
        want = run(gate, query, key)
        for value in (jnp.nan, jnp.inf):
            got = run(gate, *(jnp.where(filler, value, x) for x in (query, key)))
            jax.tree.map(np.testing.assert_array_equal, got, want)

    def test_draws_are_float32(self):
        """Also where floats are float64, and so are the scores."""
        with jax.enable_x64(True):
            sizes, key = (HEADS, KV_HEADS, DIM), jax.random.key(0)
            gate = attention.init_seer_gate(*sizes, d_gate=6, key=key)
            decode = attention.init_seer_decode_gate(*sizes, d_gate=6, key=key)
            x, options = operands(), {"block": 13, "rotate": rotate}
            scores = attention.seer_scores(gate, *x, **options)
            decode_scores = attention.seer_decode_scores(decode, *x, **options)
            cache = attention.seer_cache(decode, x[1], **options)
        for leaf in jax.tree.leaves((gate, decode, scores, decode_scores, cache[:2])):
            self.assertEqual(leaf.dtype, jnp.float32)


class TargetTest(parameterized.TestCase):
    @parameterized.product(block=[4, 13, 26])
    def test_target(self, block):
        query, key = operands()
        got = target_of(query, key, block=block)
        want = target_oracle(query, key, block)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.sum(axis=-1), 1, rtol=1e-6)
        np.testing.assert_array_equal(np.triu(got, 1), 0)

    @parameterized.product(block=[4, 13])
    def test_decode_target(self, block):
        query, key = operands()
        got = decode_target_of(query, key, block=block)
        want = decode_target_oracle(query, key, block)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got[:, :, :block], 0)

    def test_bfloat16(self):
        query, key = operands(dtype=jnp.bfloat16)
        got = target_of(query, key, block=4)
        np.testing.assert_allclose(got, target_oracle(query, key, 4), atol=1e-2)

    def test_the_map_is_never_there(self):
        """No array of the program has an entry for each pair of tokens."""
        query, key = (jnp.zeros((1, 512, heads, 4)) for heads in (2, 1))
        for fn in (attention.seer_target, attention.seer_decode_target):
            text = str(jax.make_jaxpr(functools.partial(fn, block=32))(query, key))
            assert "512,32]" in text and "512,512]" not in text


class LossTest(parameterized.TestCase):
    def operands(self):
        query, key = operands()
        target = target_of(query, key, block=3)  # 9 blocks
        rng = np.random.default_rng(1)
        scores = np.where(np.tri(9, dtype=bool), rng.normal(size=target.shape), -np.inf)
        return jnp.asarray(scores, jnp.float32), target

    def test_oracle_and_reductions(self):
        scores, target = self.operands()
        got, grads = loss_and_grad(scores, target)
        want = []
        first = 9 // 4
        for b, h, i in np.ndindex(target.shape[:3]):
            if i < first:
                continue
            s, g = np.float64(scores[b, h, i, : i + 1]), target[b, h, i, : i + 1]
            log_p = s - np.log(np.exp(s).sum())
            want.append((g * (np.log(g) - log_p)).sum())
        np.testing.assert_allclose(got, np.mean(want), rtol=1e-5)
        assert got > 0
        np.testing.assert_array_equal(grads[:, :, :first], 0)
        assert jnp.isfinite(grads).all() and jnp.any(grads[:, :, first] != 0)
        # the mean over all elements, the columns too: the released code's
        element, _ = loss_and_grad(scores, target, reduction="elementwise")
        np.testing.assert_allclose(9 * element, got, rtol=1e-5)

    @parameterized.parameters("row", "elementwise")
    def test_rows_that_count(self, reduction):
        """The mean over the rows that sequences of unlike lengths have, of each."""
        scores, target = self.operands()
        num_rows, skip = np.array([9, 5]), 0.25
        got, grads = loss_and_grad(
            scores, target, reduction=reduction, num_rows=jnp.asarray(num_rows)
        )
        of_rows = []
        for b, rows in enumerate(num_rows):
            for i in range(int(skip * rows), rows):
                alone = scores[b : b + 1, :, i : i + 1], target[b : b + 1, :, i : i + 1]
                of_rows.append(loss_and_grad(*alone, reduction=reduction, skip=0.0)[0])
        np.testing.assert_allclose(got, np.mean(of_rows), rtol=1e-5)
        np.testing.assert_array_equal(grads[1, :, 5:], 0)
        none, grads = loss_and_grad(scores, target, num_rows=jnp.zeros(2, jnp.int32))
        self.assertEqual(none, 0)
        np.testing.assert_array_equal(grads, 0)
        all_rows, _ = loss_and_grad(scores, target, num_rows=jnp.full(2, 9))
        np.testing.assert_allclose(
            all_rows, loss_and_grad(scores, target)[0], rtol=1e-6
        )

    def test_zero_where_the_gate_is_right(self):
        _, target = self.operands()
        got, grads = loss_and_grad(jnp.log(target) + 3, target)
        np.testing.assert_allclose(got, 0, atol=1e-6)
        np.testing.assert_allclose(grads, 0, atol=1e-6)

    def test_an_empty_batch(self):
        scores, target = (x[:0] for x in self.operands())
        for options in ({}, {"num_rows": jnp.zeros(0, jnp.int32)}):
            got, grads = loss_and_grad(scores, target, **options)
            self.assertEqual(got, 0)
            self.assertEqual(grads.shape, scores.shape)

    def test_rows_without_a_block(self):
        """Tokens of the first block have none before them, also where they count."""
        query, key = operands()
        target = decode_target_of(query, key, block=4)
        earlier = np.arange(7) < np.arange(26)[:, None] // 4
        scores = jnp.where(earlier, jnp.zeros(target.shape), -jnp.inf)
        got, grads = loss_and_grad(scores, target, skip=0.0)
        assert jnp.isfinite(got) and jnp.isfinite(grads).all()
        np.testing.assert_array_equal(grads[:, :, :4], 0)


def causal_scores(blocks, seed=0, heads=HEADS):
    scores = np.random.default_rng(seed).normal(size=(2, heads, blocks, blocks))
    return jnp.asarray(np.where(np.tri(blocks, dtype=bool), scores, -np.inf))


class SelectionTest(parameterized.TestCase):
    @parameterized.product(num_kept=[1, 3, 9], last=[0, 2])
    def test_topk(self, num_kept, last):
        scores = causal_scores(9)
        mask = topk(scores, num_kept=num_kept, block=4, dense_last_rows=last)
        want = np.zeros(scores.shape, bool)
        for at in np.ndindex(scores.shape[:3]):
            i = at[2]
            order = sorted(range(i), key=lambda j: -scores[*at, j])
            chosen = range(i) if i >= 9 - last else order[: num_kept - 1]
            want[*at, [*chosen, i]] = True
        np.testing.assert_array_equal(blocks_of(mask), want)
        assert mask.block_shape == (4, 4) and not mask.overflowed.any()
        assert mask.indices.shape[-1] == (9 if last else num_kept)

    def test_one_number_for_each_head(self):
        scores = causal_scores(9)
        counts = jnp.array([1, 2, 5, 9])
        select = functools.partial(topk_traced, block=4, dense_last_rows=0)
        mask = select(scores, num_kept=counts)
        np.testing.assert_array_equal(mask.num[0, :, -1], counts)
        each = [
            select(scores[:, h : h + 1], num_kept=n).num for h, n in enumerate(counts)
        ]
        np.testing.assert_array_equal(mask.num, jnp.concatenate(each, axis=1))

    @parameterized.product(tau=[0.0, 0.2, 1.0], last=[0, 1])
    def test_threshold(self, tau, last):
        scores = causal_scores(9)
        mask = threshold(scores, threshold=tau, block=4, dense_last_rows=last)
        want = np.zeros(scores.shape, bool)
        for at in np.ndindex(scores.shape[:3]):
            i = at[2]
            powers = np.exp(np.float64(scores[at][: i + 1]))
            want[*at, : i + 1] = (powers / powers.sum() > tau) | (i >= 9 - last)
            want[*at, i] = True
        np.testing.assert_array_equal(blocks_of(mask), want)

    @parameterized.parameters(
        functools.partial(topk, num_kept=2), functools.partial(threshold, threshold=0.3)
    )
    def test_the_last_rows_of_each_sequence(self, select):
        """As if it were alone; what fills it up keeps what any row does."""
        scores, lengths = causal_scores(9), jnp.array([36, 17])
        mask = blocks_of(select(scores, block=4, dense_last_rows=2, lengths=lengths))
        for b, blocks in enumerate((9, 5)):
            alone = scores[b : b + 1, :, :blocks, :blocks]
            want = blocks_of(select(alone, block=4, dense_last_rows=2))
            np.testing.assert_array_equal(mask[b, :, :blocks, :blocks], want[0])
        filler = blocks_of(select(scores, block=4, dense_last_rows=0))
        np.testing.assert_array_equal(mask[1, :, 5:], filler[1, :, 5:])

    @pytest.mark.once
    def test_no_row_is_empty(self):
        """The released code may keep none by threshold, and then divides by 0."""
        query, key = operands(seq=24)
        scores = jnp.where(np.tri(6, dtype=bool), 0.0, -jnp.inf)[None, None]
        mask = threshold(scores, threshold=0.9, block=4, dense_last_rows=0)
        out, lse = ops.block_attention(
            query, key, key, mask, causal=True, with_lse=True
        )
        assert mask.num.min() == 1
        assert jnp.isfinite(out).all() and jnp.isfinite(lse).all()

    def test_nan_is_never_kept(self):
        scores = causal_scores(4).at[:, :, 3, 0].set(jnp.nan)
        mask = topk(scores, num_kept=4, block=4, dense_last_rows=0)
        np.testing.assert_array_equal(mask.num[0, 0], [1, 2, 3, 3])

    @parameterized.parameters(0.1, 0.25, 0.5, 0.9, 1.0)
    def test_density(self, density):
        """Within a block in a row of what was asked for."""
        num_kept = attention.blocks_for_density(density, 32)
        mask = topk(
            causal_scores(32, heads=1), num_kept=num_kept, block=2, dense_last_rows=0
        )
        realised = mask.num.sum(-1) / (32 * 33 / 2)
        np.testing.assert_allclose(realised, density, atol=2 / 32)
        if density == 1:
            np.testing.assert_array_equal(mask.num[0, 0], np.arange(32) + 1)


def decode_gate(norm=True):
    gate = attention.init_seer_decode_gate(
        HEADS, KV_HEADS, DIM, d_gate=6, key=jax.random.key(0), norm=norm
    )
    if not norm:
        return gate
    scales = 1 + jax.random.uniform(jax.random.key(1), (2, 6))
    return gate._replace(query_norm=scales[0], key_norm=scales[1])


decode_scores_of = jax.jit(
    functools.partial(attention.seer_decode_scores, rotate=rotate, block=4)
)


class DecodeTest(parameterized.TestCase):
    @parameterized.parameters(True, False)
    def test_scores(self, norm):
        gate, (query, key) = decode_gate(norm), operands(seq=15)
        got = decode_scores_of(gate, query, key)

        def normed(x, scale):
            if not norm:
                return x
            return x / np.sqrt((x**2).mean() + 1e-6) * np.float64(scale)

        want = np.full((2, KV_HEADS, 15, 4), -np.inf)
        weights = [None if w is None else np.asarray(w, np.float64) for w in gate]
        for b, h, t in np.ndindex(want.shape[:3]):
            q = np.zeros(6)
            for g in range(GROUP):
                q += np.float64(query[b, t, h * GROUP + g]) @ weights[0][h, g]
            q = rope_oracle(normed(q, weights[2]), t)
            for j in range(t // 4):
                block = np.float64(key[b, 4 * j : 4 * j + 4, h])
                k = normed(features_oracle(block) @ weights[1][h], weights[3])
                want[b, h, t, j] = q @ rope_oracle(k, 4 * j) / np.sqrt(6)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    def test_cache_repeats_the_training_form(self):
        gate, (query, key) = decode_gate(), operands(seq=15)
        want = decode_scores_of(gate, query, key)

        @jax.jit
        def walk(query, key):
            def step(cache, token):
                q, k = (x[:, None] for x in token)
                cache = attention.append_to_seer_cache(gate, cache, k, rotate=rotate)
                scores = attention.seer_cached_scores(gate, cache, q, rotate=rotate)
                return cache, scores[:, :, 0]

            fill = functools.partial(
                attention.seer_cache, gate, key, block=4, rotate=rotate
            )
            tokens = [jnp.moveaxis(x, 1, 0) for x in (query, key)]
            cache, *filled = (fill(lengths=num) for num in (0, 3, 10))
            _, later = step(filled[1], [x[10] for x in tokens])
            cache, scores = jax.lax.scan(step, cache, tokens)
            return cache.lengths, jnp.moveaxis(scores, 0, 2), filled, later

        lengths, scores, filled, later = walk(query, key)
        np.testing.assert_array_equal(lengths, [15, 15])
        for cache, length in zip(filled, (3, 10), strict=True):  # of no block, of more
            np.testing.assert_array_equal(cache.lengths, [length, length])
        np.testing.assert_array_equal(filled[0].tail[:, :3], key[:, :3])
        np.testing.assert_allclose(later, want[:, :, 10], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-5)

    def test_threshold(self):
        scores = jnp.log(jnp.array([0.6, 0.3, 0.1, 0.0]))[None, None, None]
        lists = attention.seer_decode_threshold(
            scores, threshold=0.2, block=4, positions=jnp.array([[13]])
        )
        np.testing.assert_array_equal(lists.indices[0, 0], [0, 1, 3, 3])
        assert lists.num == 3 and lists.page_size == 4

    def test_one_number_for_each_key_head(self):
        """Known numbers bound the lists; where they are traced, there is room for all.

        Of 4 blocks the last is the token's own.
        """
        scores = jnp.array([2.0, 3.0, 1.0, -jnp.inf]) * jnp.ones((1, KV_HEADS, 1, 1))
        select = functools.partial(
            attention.seer_decode_topk, block=4, positions=jnp.array([[15]])
        )
        lists = jax.jit(lambda scores: select(scores, num_kept=[1, 3]))(scores)
        np.testing.assert_array_equal(lists.num, [[1, 3]])
        np.testing.assert_array_equal(lists.indices, [[[3, 3, 3], [0, 1, 3]]])
        traced = jax.jit(lambda num_kept: select(scores, num_kept=num_kept))
        lists = traced(jnp.array([1, 3]))
        np.testing.assert_array_equal(lists.num, [[1, 3]])
        np.testing.assert_array_equal(lists.indices, [[[3, 3, 3, 3], [0, 1, 3, 3]]])

    def test_sequences_of_unlike_lengths(self):
        """Each at its own position: scores and choice are those of the whole form."""
        lengths = jnp.array([3, 8, 11, 12])
        gate = decode_gate()
        query, key = (jnp.concatenate([x, x + 0.5]) for x in operands(seq=15))
        want = np.asarray(decode_scores_of(gate, query, key))
        filled = jnp.arange(15)[:, None, None] >= lengths[:, None, None, None]
        filled = jnp.where(filled, jnp.nan, key)  # behind a prompt: anything

        def choose(scores, positions):
            options = dict(block=4, positions=positions)
            chosen = (
                attention.seer_decode_topk(scores, num_kept=2, **options),
                attention.seer_decode_threshold(scores, threshold=0.3, **options),
            )
            return [lists.to_mask(16)[..., ::4] for lists in chosen]

        @jax.jit
        def walk(query, key, filled):
            def step(cache, _):
                at = cache.lengths[:, None, None, None]
                q, k = (jnp.take_along_axis(x, at, axis=1) for x in (query, key))
                cache = attention.append_to_seer_cache(gate, cache, k, rotate=rotate)
                scores = attention.seer_cached_scores(gate, cache, q, rotate=rotate)
                kept = choose(scores, cache.lengths[:, None] - 1)
                return cache, (scores[:, :, 0], *kept)

            cache = attention.seer_cache(
                gate, filled, block=4, rotate=rotate, lengths=lengths
            )
            return jax.lax.scan(step, cache, length=3)

        cache, found = walk(query, key, filled)
        np.testing.assert_array_equal(cache.lengths, lengths + 3)
        for row, length in enumerate(np.asarray(lengths)):
            for i, (scores, topk, above) in enumerate(zip(*found, strict=True)):
                now = want[row, :, length + i]
                np.testing.assert_allclose(scores[row], now, rtol=1e-4, atol=1e-5)
                own = (length + i) // 4
                for head, of_head in enumerate(now):
                    best = np.argsort(-of_head[:own], kind="stable")[:1]
                    wanted = np.isin(np.arange(4), [*best, own])
                    np.testing.assert_array_equal(topk[row, head], wanted)
                    shares = np.exp(of_head)
                    wanted = shares > 0.3 * shares.sum()
                    wanted[own] = True
                    np.testing.assert_array_equal(above[row, head], wanted)

    def test_lists_are_read_by_the_kernel(self):
        """A token attends to the kept blocks, its own up to itself."""
        at = np.array([13, 6])  # of the last block and of the second

        @jax.jit
        def run(gate, query, key):
            scores = attention.seer_decode_scores(
                gate, query, key, block=4, rotate=rotate
            )
            rows = at[:, None, None, None]
            scores = jnp.take_along_axis(scores, rows, axis=2)
            lists = attention.seer_decode_topk(
                scores, num_kept=2, block=4, positions=at[:, None]
            )
            query = jnp.take_along_axis(query, rows, axis=1)
            out = ops.listed_attention(query, key, key, lists, at + 1)
            return out, scores, query

        query, key = operands(seq=16)
        got, scores, query = run(decode_gate(), query, key)
        for b, h in np.ndindex(2, HEADS):
            best = int(np.argmax(scores[b, h // GROUP, 0]))
            seen = [t for t in range(at[b] + 1) if t // 4 in (best, at[b] // 4)]
            keys = np.float64(key[b, seen, h // GROUP])
            powers = np.exp(keys @ np.float64(query[b, 0, h]) / np.sqrt(DIM))
            want = powers @ keys / powers.sum()
            np.testing.assert_allclose(got[b, 0, h], want, rtol=1e-4, atol=1e-5)

    def test_group_draw(self):
        """Xavier of a key head: its query heads are projected together."""
        gate = attention.init_seer_decode_gate(
            16, 4, 64, d_gate=32, key=jax.random.key(0)
        )
        for kernel, d_in in ((gate.query, 4 * 64), (gate.key, 3 * 64)):
            reach = np.sqrt(6 / (d_in + 32))
            np.testing.assert_allclose(jnp.abs(kernel).max(), reach, rtol=1e-2)


@pytest.mark.once
def test_bad_input_is_named():
    query, key = operands(seq=8)
    gate = attention.init_seer_gate(4, 2, 8, d_gate=8, key=jax.random.key(0))
    of_others = attention.init_seer_gate(4, 2, 16, d_gate=16, key=jax.random.key(0))
    projected = attention.init_seer_gate(4, 4, 8, d_gate=6, key=jax.random.key(0))
    decoding, scores = decode_gate(), causal_scores(4)
    cache = attention.seer_cache(decoding, key, block=4, rotate=rotate)

    def gated(gate=gate, query=query, key=key, block=4, positions=None):
        return lambda: attention.seer_scores(
            gate, query, key, block=block, rotate=rotate, positions=positions
        )

    def made(heads=4, kv_heads=2, **options):
        return lambda: attention.init_seer_gate(
            heads, kv_heads, 8, key=jax.random.key(0), **options
        )

    def cached(key=key, lengths=None, block=4):
        return lambda: attention.seer_cache(
            decoding, key, block=block, rotate=rotate, lengths=lengths
        )

    def top(num_kept, **options):
        return lambda: attention.seer_topk(
            scores, num_kept=num_kept, block=4, **options
        )

    for wrong, message in [
        (gated(block=9), r"`block` must be in \[1, 8\].*got 9. Choose smaller"),
        (gated(block=0), "got 0"),
        (gated(positions=jnp.arange(8)), r"`positions` must be \(2, 8\), .*\(8,\)"),
        (gated(key=key[:, :4]), "of the same tokens; got 8 queries and 4 keys"),
        (gated(query=query[:, :, :3]), "must divide the query heads; got"),
        (gated(of_others), r"`gate.key` must .*\(4, 24, 8\).*got \(4, 48, 16\)"),
        (gated(projected), r"`gate.key` must .*\(2, 24, 6\).*got \(4, 24, 6\)"),
        (gated(projected, query=query[:, :, :2]), r"`gate.query`.*\(2, 8, 6\)"),
        (made(4, 3), "`num_kv_heads` must divide.*num_kv_heads=3"),
        (made(d_gate=7), "`d_gate` even.*d_gate=7"),
        (made(0), "num_heads=0"),
        (made(d_gate=6, project_query=False), "d_gate=6 and head_dim=8"),
        (lambda: attention.init_seer_decode_gate(4, 3, 8, key=None), "divide"),
        (lambda: attention.init_seer_decode_gate(4, 2, 0, key=None), "head_dim=0"),
        (lambda: attention.seer_target(query, key, block=9), "got 9"),
        (lambda: attention.seer_loss(scores, scores[:1]), "must have one shape"),
        (lambda: attention.seer_loss(scores, scores, skip=1), r"\[0, 1\); got 1"),
        (lambda: attention.seer_loss(scores, scores, reduction="sum"), "got 'sum'"),
        (top(5), r"`num_kept` must be in \[1, 4\].*got 5. Lower the budget"),
        (top(0), "got 0"),
        (
            lambda: attention.seer_topk(scores[0], num_kept=1, block=4),
            r"`scores` must be `\[batch, heads, blocks, blocks\]`; got shape \(4, ",
        ),
        (top(np.array([1, 2])), r"one for each of 4 heads; got shape \(2,\)"),
        (top(1, dense_last_rows=-1), "`dense_last_rows` must .*got -1"),
        (top(1, lengths=jnp.ones(3, int)), r"each of 2 sequences; got int32\[3\]"),
        (top(1, lengths=17), r"`lengths` must be in \[1, 16\]; got 17 for sequence 0"),
        (
            lambda: attention.seer_decode_topk(
                scores, num_kept=1, block=4, positions=jnp.zeros((1, 4), int)
            ),
            r"of one token, .*; got shape \(2, 4, 4, 4\)",
        ),
        (
            lambda: attention.seer_decode_threshold(
                scores[0], threshold=0.5, block=4, positions=jnp.zeros((1, 1), int)
            ),
            r"of one token, .*; got shape \(4, 4, 4\)",
        ),
        (cached(block=9), r"`block` must be in \[1, 8\], the slots .*; got 9. Choose"),
        (cached(block=0), "got 0"),
        (cached(key=key[0]), r"`key` must be \[batch, .*; got shape \(8, 2, 8\)"),
        (
            cached(key=query),
            r"\[batch, slots, 2, 8\], by `gate`; got shape \(2, 8, 4, 8\).*model",
        ),
        (
            cached(lengths=jnp.array([1, 2, 3])),
            r"one for each of 2 sequences; got int32\[3\]",
        ),
        (
            lambda: attention.append_to_seer_cache(decoding, cache, key, rotate=rotate),
            r"one position .*\(2, 1, 2, 8\); got shape \(2, 8, 2, 8\)",
        ),
        (
            lambda: attention.seer_cached_scores(decoding, cache, query, rotate=rotate),
            "one token",
        ),
        (
            lambda: attention.seer_cached_scores(
                decoding, cache, query[:, :1, :2], rotate=rotate
            ),
            r"`gate.query` must have shape \(2, 1, 8, 6\).*another model",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()


def test_front_door():
    assert sj.attention.seer_scores is attention.seer_scores


def test_a_token_of_the_first_block_keeps_its_own_alone():
    scores = jnp.full((1, 1, 1, 4), -jnp.inf)
    lists = attention.seer_decode_threshold(
        scores, threshold=0.1, block=8, positions=jnp.array([[3]])
    )
    assert (lists.num[0, 0], lists.indices[0, 0, 0]) == (1, 0)


def test_no_gradient_reaches_the_target():
    scores, target = jnp.zeros((1, 1, 2, 2)), jnp.full((1, 1, 2, 2), 0.5)
    grad = jax.grad(attention.seer_loss, argnums=1)(scores, target, skip=0.0)
    np.testing.assert_array_equal(grad, 0)

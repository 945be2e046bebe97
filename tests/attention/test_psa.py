"""Pyramid attention against attention over repeated means, and levels against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import attention, ops

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all is compilation

HEADS, KV_HEADS, DIM, GROUP = 4, 2, 8, 2
BLOCK = (8, 16)
LEVELS = (0, 1, 2, 4, 8)


def operands(queries=40, keys=40, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(2, n, h, DIM) for n, h in ((queries, HEADS), *[(keys, KV_HEADS)] * 2)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def random_map(queries=40, keys=40, heads=KV_HEADS, seed=0):
    blocks = -(-queries // BLOCK[0]), -(-keys // BLOCK[1])
    return np.random.default_rng(seed).choice(LEVELS, size=(2, heads, *blocks))


def outputs_and_grads(fn, q, k, v):
    """Output, log-sum-exp, and gradients that both reach."""

    def loss(q, k, v):
        out, lse = fn(q, k, v)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0)), (
            out,
            lse,
        )

    grads, both = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return both, grads


@functools.partial(jax.jit, static_argnames="causal")
def pyramid(q, k, v, level_map, causal=False):
    fn = functools.partial(
        attention.pyramid_attention,
        level_map=level_map,
        block_shape=BLOCK,
        causal=causal,
        with_lse=True,
    )
    return outputs_and_grads(fn, q, k, v)


@functools.partial(jax.jit, static_argnames="causal")
def dense(q, k, v, causal=False):
    fn = functools.partial(ops.block_attention, causal=causal, with_lse=True)
    return outputs_and_grads(fn, q, k, v)


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def cut_oracle(level_map, queries, keys, causal):
    """Level 1 where a block is seen in part, from single positions."""
    seen = np.tri(queries, keys, dtype=bool) if causal else np.ones((queries, keys))
    level_map = level_map.copy()
    for i, j in np.ndindex(level_map.shape[2:]):
        rows, columns = (
            slice(n * b, (n + 1) * b) for n, b in zip((i, j), BLOCK, strict=True)
        )
        part = seen[rows, columns]
        if not part.all() or part.shape[1] < BLOCK[1]:
            level_map[..., i, j] = np.minimum(level_map[..., i, j], 1)
    return level_map


def gradient_oracle(q, k, v, level_map, causal):
    """Attention over repeated means in float64, a row at a time, and its gradients.

    The loss is that of `outputs_and_grads`. `d mean = sum of its h copies`, and each
    of its tokens gets that over h.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    level_map = np.broadcast_to(level_map, (2, *level_map.shape[1:]))
    level_map = np.repeat(level_map, HEADS // level_map.shape[1], axis=1)
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    for b, t, h in np.ndindex(q.shape[:3]):
        of_row = level_map[b, h, t // BLOCK[0]]
        columns, groups = [], []
        for j in range(k.shape[1]):
            level = of_row[j // BLOCK[1]]
            if level and (not causal or j <= t):
                columns.append(j)
                first = j // level * level
                groups.append(list(range(first, first + level)))
        if not columns:
            continue
        means_k = np.array([k[b, g, h // GROUP].mean(axis=0) for g in groups])
        means_v = np.array([v[b, g, h // GROUP].mean(axis=0) for g in groups])
        s = means_k @ q[b, t, h] / np.sqrt(DIM)
        lse[b, t, h] = s.max() + np.log(np.exp(s - s.max()).sum())
        p = np.exp(s - lse[b, t, h])
        out[b, t, h] = p @ means_v
        d_out = np.cos(out[b, t, h])
        ds = p * (means_v @ d_out - d_out @ out[b, t, h]) + p  # the last by lse
        dq[b, t, h] = ds @ means_k / np.sqrt(DIM)
        for n, group in enumerate(groups):
            dk[b, group, h // GROUP] += ds[n] * q[b, t, h] / np.sqrt(DIM) / len(group)
            dv[b, group, h // GROUP] += p[n] * d_out / len(group)
    return (out, lse), (dq, dk, dv)


class PyramidAttentionTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_level_one_is_dense(self, causal):
        q, k, v = operands()
        ones = np.ones((2, KV_HEADS, 5, 3), int)
        assert_close(pyramid(q, k, v, ones, causal), dense(q, k, v, causal))

    @parameterized.parameters((False, KV_HEADS), (True, KV_HEADS), (False, HEADS))
    def test_repeated_means(self, causal, heads):
        """Values and gradients; the last block of keys is not whole."""
        q, k, v = operands()
        level_map = random_map(heads=heads)
        got = pyramid(q, k, v, level_map, causal)
        cut = cut_oracle(level_map, 40, 40, causal)
        assert set(np.unique(cut)) == set(LEVELS)
        want = gradient_oracle(q, k, v, cut, causal)
        assert np.isneginf(want[0][1]).any()  # rows that see nothing
        assert_close(got, want)

    @pytest.mark.once
    def test_zeros_and_ones_are_a_block_mask(self):
        q, k, v = operands(queries=24, keys=48)
        level_map = np.minimum(random_map(24, 48), 1)
        mask = np.repeat(np.repeat(level_map == 1, BLOCK[0], 2), BLOCK[1], 3)
        mask = np.repeat(mask, GROUP, 1)
        (out, _), _ = pyramid(q, k, v, level_map)
        want = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask))
        seen = mask.any(-1).swapaxes(1, 2)[..., None]
        np.testing.assert_allclose(out, np.where(seen, want, 0), atol=1e-5)

    @pytest.mark.once
    def test_a_pooled_key_counts_for_all_its_keys(self):
        """Keys equal in a group lose nothing by a mean, whatever the values.

        A mean of values is what equal weights give. Without `log(h)` this fails.
        """
        q, k, v = operands(keys=48)
        k = jnp.repeat(k[:, ::8], 8, axis=1)
        level_map = np.maximum(random_map(keys=48), 1)
        (got, lse), _ = pyramid(q, k, v, level_map)
        (want, want_lse), _ = dense(q, k, v)
        assert_close((got, lse), (want, want_lse))

    def test_causal_forward_and_backward_agree(self):
        """In the released code a mean on the diagonal leaks, in one of the two."""
        q, k, v = operands()
        level_map = np.full((1, 1, 5, 3), 8)

        @jax.jit
        def of_early_rows(k, v):
            out = attention.pyramid_attention(
                q, k, v, level_map, block_shape=BLOCK, causal=True
            )
            return out[:, 20]

        _, pull = jax.vjp(of_early_rows, k, v)
        for grad in pull(jnp.ones((2, HEADS, DIM))):
            np.testing.assert_array_equal(grad[:, 21:], 0)
            assert jnp.all(jnp.any(grad[:, :21] != 0, axis=(2, 3)))
        later = [x.at[:, 21:].set(7.0) for x in (k, v)]
        np.testing.assert_array_equal(of_early_rows(k, v), of_early_rows(*later))

    @parameterized.parameters(3, 16, -1)
    def test_other_numbers_drop_a_block(self, number):
        """Also one that is cut through, which is at level 1 if it is kept."""
        q, k, v = operands()
        level_map = random_map()
        others = np.where(level_map, level_map, number)
        assert_close(pyramid(q, k, v, others, True), pyramid(q, k, v, level_map, True))

    def test_tail_is_not_padded_by_the_last_token(self):
        x = jnp.arange(1.0, 6.0).reshape(1, 5, 1, 1)
        for got, want in zip(
            attention.kv_pyramid(x, block=4, levels=(1, 2, 4)),
            ([1, 2, 3, 4, 5, 0, 0, 0], [1.5, 3.5, 5, 0], [2.5, 5]),
            strict=True,
        ):
            np.testing.assert_array_equal(got[0, :, 0, 0], want)

    def test_bfloat16(self):
        q, k, v = (x.astype(jnp.bfloat16) for x in operands())
        level_map = random_map()
        out = jax.jit(
            functools.partial(attention.pyramid_attention, block_shape=BLOCK)
        )(q, k, v, level_map)
        assert out.dtype == jnp.bfloat16
        cut = cut_oracle(level_map, 40, 40, False)
        want = gradient_oracle(q, k, v, cut, False)[0][0]
        np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=3e-2)


def in_sight(rows, columns):
    """Causal, from single positions."""
    seen = np.zeros((rows, columns), bool)
    for i, j in np.ndindex(rows, columns):
        seen[i, j] = j * BLOCK[1] <= min((i + 1) * BLOCK[0], 40) - 1
    return seen


class DensityTest(parameterized.TestCase):
    @parameterized.parameters(1, KV_HEADS)
    def test_equals_a_count(self, heads):
        """Each key in sight counts by the level that it is read at."""
        length, level_map = 45, random_map(queries=45, keys=45, heads=heads)
        got = jax.jit(
            functools.partial(
                attention.pyramid_density, num_queries=length, block_shape=BLOCK
            )
        )(level_map)
        read = cut_oracle(level_map, length, length, True)
        want = np.zeros((2, length))
        for b, h, t in np.ndindex(2, heads, length):
            of_row = read[b, h, t // BLOCK[0]]
            at = [of_row[j // BLOCK[1]] for j in range(t + 1)]
            want[b, t] += sum(1 / level for level in at if level) / (t + 1)
        np.testing.assert_allclose(got, want / heads, rtol=1e-5)

    def test_levels_that_are_not_in_use_are_not_read(self):
        level_map = random_map(keys=40)
        options = dict(num_queries=40, block_shape=BLOCK)
        got = attention.pyramid_density(level_map, levels=(1, 4), **options)
        used = np.where(np.isin(level_map, (1, 4)), level_map, 0)
        want = attention.pyramid_density(used, **options)
        np.testing.assert_array_equal(got, want)


class ImportanceTest(parameterized.TestCase):
    @parameterized.product(sampled=[False, True], causal=[False, True])
    @pytest.mark.once
    def test_filler_has_no_part(self, sampled, causal):
        """Each sequence has the importances that it has where its tokens are all."""
        lengths, (q, k, _) = (19, 37), operands()
        filler = (
            jnp.arange(40)[:, None, None] >= jnp.array(lengths)[:, None, None, None]
        )
        q, k = (jnp.where(filler, jnp.nan, x) for x in (q, k))
        options = dict(block_shape=BLOCK, causal=causal)
        if sampled:
            fn = functools.partial(
                attention.sampled_importance, random_key=jax.random.key(0), **options
            )
        else:
            fn = functools.partial(
                attention.antidiagonal_importance, stride=4, **options
            )

        @jax.jit
        def run(q, k):
            alone = [
                fn(q[b : b + 1, :n], k[b : b + 1, :n]) for b, n in enumerate(lengths)
            ]
            return fn(q, k, lengths=jnp.array(lengths)), alone

        got, alone = run(q, k)
        for b, want in enumerate(alone):
            rows, columns = want.shape[2:]
            np.testing.assert_allclose(
                got[b, :, :rows, :columns], want[0], rtol=1e-4, atol=1e-6
            )
            self.assertTrue((got[b, :, :, columns:] == -np.inf).all())

    @parameterized.parameters(False, True)
    def test_antidiagonal(self, causal):
        stride, (q, k, _) = 4, operands()
        got = jax.jit(
            functools.partial(
                attention.antidiagonal_importance,
                stride=stride,
                block_shape=BLOCK,
                causal=causal,
            )
        )(q, k)
        want = np.zeros((2, HEADS, 5, 3))
        for b, h, n in np.ndindex(2, HEADS, 10):
            sums = []
            for m in range(10):
                total = 0.0
                for i in range(stride):
                    at_q, at_k = n * stride + stride - 1 - i, m * stride + i
                    total += np.float64(q[b, at_q, h]) @ np.float64(
                        k[b, at_k, h // GROUP]
                    )
                sums.append(total / (stride * np.sqrt(DIM)))
            powers = np.exp(sums) * (np.arange(10) <= (n if causal else 10))
            for m in range(10):
                cell = n * stride // BLOCK[0], m * stride // BLOCK[1]
                want[b, h, *cell] += powers[m] / powers.sum()
        if causal:
            want = np.where(in_sight(5, 3), want, -np.inf)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    @parameterized.parameters(False, True)
    def test_all_tokens_sampled(self, causal):
        """A weight is a softmax, with its denominator: the released code has none."""
        q, k, _ = operands()
        got = jax.jit(
            functools.partial(
                attention.sampled_importance,
                block_shape=BLOCK,
                fraction=1.0,
                causal=causal,
            )
        )(4 * q, k[:, :32], random_key=jax.random.key(0))
        want = np.zeros((2, HEADS, 5, 2))
        for b, h, t in np.ndindex(2, HEADS, 40):
            s = np.float64(k[b, :32, h // GROUP]) @ np.float64(4 * q[b, t, h])
            powers = np.exp(s / np.sqrt(DIM)) * (np.arange(32) <= (t if causal else 32))
            weights = (powers / powers.sum()).reshape(2, BLOCK[1]).max(axis=1)
            i = t // BLOCK[0]
            want[b, h, i] = np.maximum(want[b, h, i], weights)
        want /= want.sum(axis=-1, keepdims=True)
        if causal:
            want = np.where(in_sight(5, 2), want, -np.inf)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    def test_samples(self):
        """Of each block a quarter, the same offsets, drawn for each head."""
        q, k, _ = operands(queries=64, keys=64)
        select = jax.jit(
            functools.partial(attention.sampled_importance, block_shape=(16, 16))
        )
        found = []
        for row in range(16):  # a key of block 0 that all queries look at
            spike = jnp.zeros_like(k).at[:, row].set(1.0)
            got = select(jnp.full_like(q, 20.0), spike, random_key=jax.random.key(3))
            found.append(np.asarray(got[0, :, :, 0]) > 0.9)
        found = np.array(found)  # offset, head, block of queries
        np.testing.assert_array_equal(found.sum(axis=0), 4)
        assert (found == found[:, :, :1]).all()
        assert (found[:, 0, 0] != found[:, 1, 0]).any()


def ranks(row):
    """Place of each block of a row, the best 0; of equal ones the left."""
    order = sorted(range(len(row)), key=lambda j: (-row[j], j))
    return {j: order.index(j) for j in range(len(row))}


quota_levels = jax.jit(attention.quota_levels, static_argnames="bounds")
mass_levels = jax.jit(attention.mass_levels, static_argnames=("bounds", "min_full"))


def cap_oracle(key, block, thresholds):
    batch, length, heads, _ = key.shape
    caps = np.ones((batch, heads, -(-length // block)), int)
    for b, head, column in np.ndindex(caps.shape):
        for level, least in thresholds:
            cosines = []
            for first in range(column * block, (column + 1) * block, level):
                if first + level <= length:
                    one, other = key[b, first, head], key[b, first + level - 1, head]
                    norms = np.linalg.norm(one) * np.linalg.norm(other)
                    cosines.append(one @ other / norms if norms else 0.0)
            if cosines and np.mean(cosines) > least:
                caps[b, head, column] = level
    return caps


class SimilarityTest(parameterized.TestCase):
    @parameterized.parameters((64, 16), (50, 16), (41, 8))
    def test_matches_loops(self, length, block):
        rng = np.random.default_rng(length)
        # a walk, slow at first: its neighbours are more alike than those further on
        step = np.linspace(0.1, 1.5, length)[:, None, None]
        key = np.cumsum(rng.normal(size=(2, length, 3, 4)) * step, axis=1)
        key[0, -3:] = 0
        thresholds = ((2, 0.75), (4, 0.7), (8, 0.5))
        got = jax.jit(
            functools.partial(
                attention.similarity_cap, block=block, thresholds=thresholds
            )
        )(jnp.asarray(key, jnp.float32))
        want = cap_oracle(key, block, thresholds)
        assert len(np.unique(want)) > 2
        np.testing.assert_array_equal(got, want)

    def test_caps_levels_and_keeps_what_is_dropped(self):
        key = jnp.ones((1, 16, 1, 4)).at[:, 9::2].set(-1.0)
        cap = attention.similarity_cap(key, block=8, thresholds=((2, 0.9), (4, 0.9)))
        np.testing.assert_array_equal(cap, [[[4, 1]]])
        level_map = jnp.array([[[[8, 4], [2, 0]]]])
        capped = jnp.minimum(level_map, cap[:, :, None])
        np.testing.assert_array_equal(capped, [[[[4, 1], [2, 0]]]])


def read_share(levels):
    """The share of the keys of all blocks that is read: one in `h` at level `h`."""
    return sum((levels == h).mean(axis=(-2, -1)) / h for h in LEVELS if h)


class LevelsTest(parameterized.TestCase):
    def importance(self, hidden=True, columns=30):
        rng = np.random.default_rng(0)
        values = rng.integers(0, 20, size=(2, 6, columns)) / 20  # with ties
        visible = np.tri(6, columns, 8, dtype=bool) if hidden else True
        return np.where(visible, values, -np.inf).astype(np.float32)

    @parameterized.parameters(False, True)
    def test_quotas(self, hidden):
        importance = self.importance(hidden)
        full = np.zeros((6, 30), bool)
        full[:, 0] = full[0, 20] = True
        got = quota_levels(importance, full=full)
        want = np.zeros(importance.shape, int)
        for at in np.ndindex(importance.shape):
            row = importance[at[:2]]
            if row[at[2]] == -np.inf:
                continue
            seen = int((row > -np.inf).sum())
            bounds = ((1, seen, 10), (2, 3 * seen, 20), (4, 3 * seen, 20))
            rank = ranks(row)[at[2]]
            for level, part, of in (*bounds, (8, 7 * seen, 20)):
                if rank < -(-part // of):
                    want[at] = level
                    break
            if full[at[1:]]:
                want[at] = 1
        np.testing.assert_array_equal(got, want)

    def test_card_density(self):
        """Default quotas: .1 at level 1, .05 at 2, .20 at 8, which is .15."""
        levels = quota_levels(self.importance(hidden=False, columns=40))
        counts = [np.sum(np.asarray(levels)[0, 0] == h) for h in LEVELS]
        assert counts == [26, 4, 2, 0, 8]
        np.testing.assert_allclose(read_share(levels), 0.15, rtol=1e-6)

    @parameterized.product(min_full=[0.0, 0.06, 0.3], hidden=[False, True])
    def test_mass(self, min_full, hidden):
        importance = self.importance(hidden)
        bounds = ((1, 0.4), (2, 0.5), (4, 0.6), (8, 0.8))  # released, Wan 14B
        got = mass_levels(importance, bounds=bounds, min_full=min_full)
        want = np.zeros(importance.shape, int)
        for at in np.ndindex(importance.shape):
            row, j = np.float64(importance[at[:2]]), at[2]
            if row[j] == -np.inf:
                continue
            rank, seen = ranks(row), row > -np.inf
            upto = sum(row[i] for i in np.flatnonzero(seen) if rank[i] <= rank[j])
            for level, tau in bounds:
                if upto / row[seen].sum() <= tau + 1e-6:
                    want[at] = level
                    break
            if rank[j] < np.ceil(min_full * seen.sum() - 1e-4):
                want[at] = 1
        np.testing.assert_array_equal(got, want)

    def test_larger_bounds_never_keep_less(self):
        importance = self.importance()
        densities = [
            read_share(mass_levels(importance, bounds=((1, t), (2, t + 0.1))))
            for t in (0.0, 0.2, 0.5, 0.9)
        ]
        assert (np.diff(densities, axis=0) >= 0).all()
        assert (densities[-1] > densities[0]).all()

    def test_full_blocks(self):
        got = attention.pyramid_full_blocks(40, 40, BLOCK)
        for i, j in np.ndindex(5, 3):
            rows = range(i * BLOCK[0], (i + 1) * BLOCK[0])
            columns = range(j * BLOCK[1], (j + 1) * BLOCK[1])
            assert got[i, j] == (j == 0 or bool({*rows} & {*columns}))


@jax.jit
def errors(q, k, v):
    """Relative errors of outputs, and densities: of a pyramid, and of dropping."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4, axis=-1)
    mass = weights.reshape(1, 2, 4, 32, 16, 8).sum(axis=(3, 5))
    want = ops.block_attention(q, k, v)
    found = []
    for bounds in (((1, 1 / 16), (2, 3 / 16), (8, 1)), ((1, 4 / 16),)):
        levels = attention.quota_levels(mass, bounds=bounds)
        out = attention.pyramid_attention(q, k, v, levels, block_shape=(32, 8))
        error = jnp.linalg.norm(out - want) / jnp.linalg.norm(want)
        found.append((error, read_share(levels).mean()))
    return jnp.array(found)


@pytest.mark.once
def test_claim_in_small():
    """Smooth keys: means lose less than dropping, at less cost. Noise: they lose more.

    Queries are sharp: where they attend to all keys, means are better for noise too.
    """
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 1, 128, 2, 16)).astype(np.float32)
    noise[0] *= 4
    smooth = noise.copy()
    for t in range(1, 128):
        past, new = smooth[1:, :, t - 1], smooth[1:, :, t]
        smooth[1:, :, t] = 0.95 * past + np.sqrt(1 - 0.95**2) * new
    (pyramid_error, density), (dropped_error, dropped_density) = errors(*smooth)
    assert density < dropped_density
    assert pyramid_error < 0.5 * dropped_error
    (pyramid_error, _), (dropped_error, _) = errors(*noise)
    assert pyramid_error > dropped_error


@pytest.mark.once
def test_bad_input_is_named():
    q, k, v = operands()
    ones = np.ones((1, 1, 5, 3), int)

    def attend(level_map=ones, block_shape=BLOCK, query=q, **options):
        return lambda: attention.pyramid_attention(
            query, k, v, level_map, block_shape=block_shape, **options
        )

    scores = jnp.zeros((4, 4))
    key = jax.random.key(0)
    for error, wrong, message in [
        (TypeError, attend(ones.astype(float)), "integers; got float"),
        (ValueError, attend(ones[0]), r"heads\|kv_heads\|1, 5, 3\]; got \(1, 5, 3\)"),
        (ValueError, attend(ones[..., :2]), r"got \(1, 1, 5, 2\)"),
        (ValueError, attend(block_shape=(8, 64)), r"most \(40, 40\).*\(8, 64\)"),
        (ValueError, attend(block_shape=(64, 8)), r"got \(64, 8\)"),
        (ValueError, attend(levels=(1, 3)), "divide the 16 keys of a block; got 3"),
        (ValueError, attend(levels=(2, 4)), r"must have 1.*got \(2, 4\)"),
        (ValueError, attend(np.ones((1, 3, 5, 3), int)), "leading axes"),
        (
            ValueError,
            attend(query=q[0]),
            r"`query` and `key` must be .*; got \(40, 4, 8\)",
        ),
        (ValueError, lambda: attention.kv_pyramid(k, block=64), "got 64"),
        (ValueError, lambda: attention.kv_pyramid(k[0], block=8), "`x` must be .*40, "),
        (
            ValueError,
            lambda: attention.similarity_cap(k[0], block=8),
            r"`key` must be .*; got shape \(40, 2, 8\)",
        ),
        (
            ValueError,
            lambda: attention.similarity_cap(k, block=16, thresholds=((3, 0.5),)),
            "divide the 16 keys of a block; got 3",
        ),
        (
            ValueError,
            lambda: attention.similarity_cap(k, block=16, thresholds=((1, 0.5),)),
            "levels above 1",
        ),
        (
            ValueError,
            lambda: attention.similarity_cap(k, block=64),
            r"`block` must be in \[1, 40\]",
        ),
        (ValueError, lambda: attention.kv_pyramid(k, block=4), "the 4 keys.*got 8"),
        (
            ValueError,
            lambda: attention.antidiagonal_importance(q, k, block_shape=(128, 128)),
            r"at most \(40, 40\).*got \(128, 128\)",
        ),
        (
            ValueError,
            lambda: attention.antidiagonal_importance(
                q, k, stride=3, block_shape=BLOCK
            ),
            r"`stride` must divide.*got 3 and \(8, 16\)",
        ),
        (
            ValueError,
            lambda: attention.sampled_importance(
                q[:, :, :3], k, random_key=key, block_shape=BLOCK
            ),
            "the key heads must divide",
        ),
        (
            ValueError,
            lambda: attention.sampled_importance(
                q, k, random_key=key, block_shape=BLOCK, fraction=0
            ),
            "`fraction` must be .*got 0",
        ),
        (
            ValueError,
            lambda: attention.antidiagonal_importance(
                q, k, stride=4, block_shape=BLOCK, lengths=[3, 4, 5]
            ),
            r"`lengths` must be one integer, or one for each of 2 .*int32\[3\]",
        ),
        (
            ValueError,
            lambda: attention.pyramid_density(ones, 41, block_shape=BLOCK),
            r"heads\|kv_heads\|1, 6, 3\]; got \(1, 1, 5, 3\)",
        ),
        (
            ValueError,
            lambda: attention.quota_levels(scores, bounds=((2, 0.5), (1, 0.6))),
            r"`bounds` must be pairs.*\(\(2, 0.5\)",
        ),
        (
            ValueError,
            lambda: attention.mass_levels(scores, bounds=((1, 0.5), (2, 0.4))),
            "both ascending",
        ),
        (
            ValueError,
            lambda: attention.mass_levels(scores, min_full=2),
            "`min_full` must be .*got 2",
        ),
    ]:
        with pytest.raises(error, match=message):
            wrong()

"""block_attention against a loop over queries in NumPy, and formulas of its gradients.

The reference runs here, which is the oracle of the kernels, and what all kernels share:
the split of a mask by the rules, and the gradient. They are run with kernels in plain
jnp.
"""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax.ops import block_attention, merge_attention

# by name: the function hides the package of that name
_gradients, _reference, _rules = (
    importlib.import_module(f"sparsejax.ops.block_attention.{name}")
    for name in ("_gradients", "_reference", "_rules")
)
BLOCK = (4, 3)
BATCH, QUERIES, KEYS, HEADS, KV_HEADS, DIM = 2, 10, 13, 4, 2, 8
BLOCKS = (3, 5)
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2, jnp.float16: 3e-3}


def seen_oracle(
    kept, causal=False, window=None, prefix=None, segment_ids=None, **others
):
    """Which pairs count, `[batch, heads, queries, keys]`, one pair at a time."""
    del others
    kept = np.asarray(kept).reshape((1,) * (4 - kept.ndim) + kept.shape)
    kept = np.broadcast_to(kept, (BATCH, *kept.shape[1:]))
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
    prefix = np.broadcast_to(0 if prefix is None else prefix, (BATCH,))
    seen = np.zeros((BATCH, HEADS, QUERIES, KEYS), bool)
    for b, h, i, j in np.ndindex(seen.shape):
        of_head = h // (HEADS // kept.shape[1])
        rules = (not causal or j <= i) and (window is None or abs(i - j) < window)
        same = segment_ids is None or pair[0][b, i] == pair[1][b, j]
        block = kept[b, of_head, i // BLOCK[0], j // BLOCK[1]]
        seen[b, h, i, j] = block and same and (rules or j < prefix[b])
    return seen


def oracle(q, k, v, do, dlse, kept, *, scale=None, bias=None, **rules):
    """out, lse, dq, dk and dv in float64, a query at a time."""
    q, k, v, do, dlse = (np.asarray(a, np.float64) for a in (q, k, v, do, dlse))
    seen = seen_oracle(kept, **rules)
    scale = DIM**-0.5 if scale is None else scale
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b, h, i])
        if not len(keys):
            continue
        at = b, keys, h // (HEADS // KV_HEADS)
        scores = k[at] @ q[b, i, h] * scale
        if bias is not None:
            lead = b % bias.shape[0], h // (HEADS // bias.shape[1])
            row = i // BLOCK[0] % bias.shape[2]
            scores += np.asarray(bias)[*lead, row, keys // BLOCK[1]]
        top = scores.max()
        total = np.exp(scores - top).sum()
        p = np.exp(scores - top) / total
        out[b, i, h], lse[b, i, h] = p @ v[at], top + np.log(total)
        dp = v[at] @ do[b, i, h]
        ds = p * (dp - out[b, i, h] @ do[b, i, h] + dlse[b, i, h])
        dq[b, i, h] = ds @ k[at] * scale
        dk[at] += np.outer(ds, q[b, i, h]) * scale
        dv[at] += np.outer(p, do[b, i, h])
    return out, lse, dq, dk, dv


def operands(dtype=jnp.float32, seed=0):
    """q, k, v, and gradients of the outputs and of the log-sum-exp."""
    rng = np.random.default_rng(seed)
    of_queries, of_keys = (BATCH, QUERIES, HEADS, DIM), (BATCH, KEYS, KV_HEADS, DIM)
    shapes = of_queries, of_keys, of_keys, of_queries
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(rng.normal(size=of_queries[:3]), jnp.float32)


def blocks(*lead, density=0.6, seed=0):
    """One bool a block; in one row none is kept, in one column none."""
    kept = np.random.default_rng(seed).random((*lead, *BLOCKS)) < density
    kept[..., 1, :] = kept[..., :, 2] = False
    return kept


def segments(length, seed=0):
    ids = np.random.default_rng(seed).integers(0, 3, (BATCH, length))
    return np.sort(ids).astype(np.int32)


def with_gradients(operation, q, k, v, do, dlse, kept, **options):
    """Out, lse and the gradients of q, k and v."""
    mask = sj.BlockMask.from_blocks(kept, BLOCK)

    def fn(q, k, v):
        return operation(q, k, v, mask, with_lse=True, **options)

    results, vjp = jax.vjp(fn, q, k, v)
    return *results, *vjp((do, dlse))


def as_a_kernel(q, k, v, mask, *, with_lse, **rules):
    """The kernels' common parts, with kernels in plain jnp; rules as in `Rules`."""
    assert with_lse
    lead = (None,) * (2 - mask.overflowed.ndim)
    mask = jax.tree.map(lambda a: a[lead], mask)
    given = dict.fromkeys(("prefix", "query_segments", "key_segments")) | rules
    bias = given.pop("bias", None)
    bounds = {"lowest": None, "highest": None} | given
    rule = _rules.Rules(**bounds, num_keys=k.shape[1])
    out, lse = _plain(q, k, v, mask, rule, bias, scale=DIM**-0.5)
    return out, lse.swapaxes(1, 2)


def _seen(lists, q, k):
    whole, partial = lists.whole.to_dense(), lists.partial
    if partial is not None:
        rows, columns = partial.shape[2:]
        by_rules = _rules.elementwise(lists.rules, rows, columns)
        whole = whole | (partial.to_dense() & by_rules)
    seen = _reference.of_heads(whole, q.shape[2])
    return seen[..., : q.shape[1], : k.shape[1]]


def _scores(q, k, lists, scale):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if lists.bias is not None:
        bias = _reference.of_heads(lists.bias, q.shape[2])
        bias = jnp.repeat(jnp.repeat(bias, BLOCK[0], axis=2), BLOCK[1], axis=3)
        scores += bias[..., : q.shape[1], : k.shape[1]]
    return scores


def the_forward(q, k, v, lists, scale):
    scores = jnp.where(_seen(lists, q, k), _scores(q, k, lists, scale), -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse)[..., None])
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v), lse


def the_backward(q, k, v, do, lse, delta, lists, scale):
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    weights = jnp.exp(_scores(q, k, lists, scale) - lse[..., None])
    weights = jnp.where(_seen(lists, q, k), weights, 0)
    k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
    dp = jnp.einsum("bqhd,bkhd->bhqk", do, v)
    ds = weights * (dp - delta[..., None]) * scale

    def of_group(a):
        return a.reshape(*a.shape[:2], kv_heads, group, -1).sum(axis=3)

    dq = jnp.einsum("bhqk,bkhd->bqhd", ds, k)
    dk = jnp.einsum("bhqk,bqhd->bkhd", ds, q)
    return dq, of_group(dk), of_group(jnp.einsum("bhqk,bqhd->bkhd", weights, do))


_plain = _gradients.differentiable(_gradients.Kernels(the_forward, the_backward))


run = jax.jit(
    with_gradients, static_argnums=0, static_argnames=("causal", "window", "scale")
)
run_kernel = jax.jit(
    with_gradients, static_argnums=0, static_argnames=("lowest", "highest")
)


def assert_close(got, want, dtype=jnp.float32):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        finite = np.isfinite(b)
        a = np.asarray(a, np.float64)
        np.testing.assert_array_equal(np.isfinite(a), finite)
        np.testing.assert_array_equal(a[~finite], b[~finite])
        limit = TOLERANCE[dtype] * (1 + np.abs(b[finite]).max(initial=0))
        np.testing.assert_allclose(a[finite], b[finite], rtol=0, atol=limit)


class BlockAttentionTest(parameterized.TestCase):
    @parameterized.parameters(
        # the leading axes of the mask; options
        ((), {"scale": 0.7}),
        ((1, 2), {"causal": True}),
        ((2, 4), {"window": 4}),
        ((2, 1), {"causal": True, "window": 3, "prefix": 2}),
        ((1, 4), {"causal": True, "prefix": np.array([0, 7])}),
        ((2, 2), {"segment_ids": (segments(QUERIES), segments(KEYS, 1))}),
    )
    def test_matches_oracle(self, lead, options):
        args = *operands(), blocks(*lead)
        got = run(block_attention, *args, **options)
        assert_close(got, oracle(*args, **options))

    @parameterized.parameters((1, 1, 1, 5), (2, 2, 3, 5), (1, 4, 3, 5))
    def test_bias_of_blocks(self, *shape):
        bias = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        args = *operands(), blocks(1, 4)
        got = run(block_attention, *args, bias=bias)
        assert_close(got, oracle(*args, bias=bias))

    def test_a_bias_of_minus_infinity_drops_a_block(self):
        """Also all blocks of a row: there the kernels give 0 and not NaN."""
        args, kept = operands(), blocks(1, 4)
        bias = np.where(kept, 0, -np.inf).astype(np.float32)
        got = run(block_attention, *args, np.ones(BLOCKS, bool), bias=bias)
        assert_close(got, oracle(*args, kept))

    def test_segments_may_be_a_list(self):
        """Of one sequence; two arrays in a list are those of queries and keys."""
        _, k, v, *_ = operands()
        k, v, ids = k[:1], v[:1], segments(KEYS)[:1]
        got, want = jax.jit(
            lambda: [
                block_attention(k, k, v, segment_ids=given)
                for given in (ids.tolist(), ids)
            ]
        )()
        np.testing.assert_array_equal(got, want)

    def test_no_gradient_for_the_bias(self):
        q, k, v, *_ = operands()

        def loss(bias):
            return block_attention(q, k, v, mask_of(blocks()), bias=bias).sum()

        grad = jax.jit(jax.grad(loss))(jnp.ones((1, 1, *BLOCKS)))
        np.testing.assert_array_equal(grad, 0)

    @parameterized.parameters(jnp.bfloat16, jnp.float16)
    def test_half_precision(self, dtype):
        args = *operands(dtype), blocks(1, 2)
        got = run(block_attention, *args, causal=True)
        out, lse, *grads = got
        self.assertEqual(lse.dtype, jnp.float32)
        self.assertTrue(all(a.dtype == dtype for a in (out, *grads)))
        assert_close(got, oracle(*args, causal=True), dtype)

    def test_where_no_key_is_seen(self):
        args = *operands(), np.zeros(BLOCKS, bool)
        out, lse, *grads = run(block_attention, *args, causal=True)
        np.testing.assert_array_equal(lse, -np.inf)
        for array in (out, *grads):
            np.testing.assert_array_equal(array, 0)

    def test_what_no_pair_needs_is_not_read(self):
        """NaN in it reaches neither values nor gradients, as with a kernel."""
        q, k, v, *rest = operands()
        kept = blocks(2, 2)
        by_block = kept[:, :, :, np.arange(KEYS) // BLOCK[1]]
        keys = by_block.any(axis=2).swapaxes(1, 2)[..., None]
        by_block = kept[:, :, np.arange(QUERIES) // BLOCK[0]]
        queries = by_block.any(axis=3).repeat(HEADS // KV_HEADS, axis=1)
        queries = queries.swapaxes(1, 2)[..., None]
        assert not keys.all() and not queries.all()
        used = (queries, q), (keys, k), (keys, v)
        poisoned = [jnp.where(needed, a, jnp.nan) for needed, a in used]
        got = run(block_attention, *poisoned, *rest, kept)
        assert_close(got, oracle(q, k, v, *rest, kept))

    def test_what_a_rule_hides_is_read_with_its_block(self):
        """A kernel reads whole blocks, those of which a rule hides some pairs too."""
        q, k, v, *rest = operands()
        ids = np.zeros((BATCH, QUERIES), np.int32), np.zeros((BATCH, KEYS), np.int32)
        ids[1][:, 8:] = 1  # no query has it: a part of a block of three, and two blocks
        args = *rest, np.ones(BLOCKS, bool)
        hidden = jnp.arange(KEYS)[:, None, None] >= 9
        poisoned = (jnp.where(hidden, jnp.nan, a) for a in (k, v))
        got = run(block_attention, q, *poisoned, *args, segment_ids=ids)
        assert_close(got, oracle(q, k, v, *args, segment_ids=ids))
        out, *_ = run(
            block_attention, q, k, v.at[0, 8].set(jnp.inf), *args, segment_ids=ids
        )
        np.testing.assert_array_equal(np.isnan(out[0]), True)
        self.assertTrue(np.isfinite(out[1]).all())

    def test_is_dot_product_attention(self):
        q, _, _, *_ = operands()
        k, v = q[:, :, :2] + 1, q[:, ::-1, 2:]  # as many keys as queries

        ids = segments(QUERIES)

        @jax.jit
        def both(q, k, v):
            theirs = functools.partial(jax.nn.dot_product_attention, q, k, v)
            ours = functools.partial(block_attention, q, k, v)
            return [
                (ours(), theirs()),
                (ours(causal=True), theirs(is_causal=True)),
                (ours(window=4), theirs(local_window_size=3)),
                (
                    ours(causal=True, window=4, scale=0.2),
                    theirs(is_causal=True, local_window_size=(3, 0), scale=0.2),
                ),
                (
                    ours(segment_ids=ids),
                    theirs(mask=ids[:, None, :, None] == ids[:, None, None, :]),
                ),
            ]

        for got, want in both(q, k, v):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    def test_ten_masks_with_one_trace(self):
        args = operands()
        fn = chex.assert_max_traces(
            lambda *args: block_attention(*args, causal=True, with_lse=True), n=1
        )
        fn = jax.jit(fn)
        for seed in range(10):
            kept = blocks(2, 4, seed=seed, density=seed / 9)
            got = fn(*args[:3], mask_of(kept))
            assert_close(got, oracle(*args, kept, causal=True)[:2])


mask_of = jax.jit(lambda kept: sj.BlockMask.from_blocks(kept, BLOCK))


class SharedByKernelsTest(parameterized.TestCase):
    @parameterized.parameters(
        ((2, 4), {}, {}),
        (
            (1, 2),
            {"highest": 0, "lowest": -3, "prefix": np.array([2, 7], np.int32)},
            {"causal": True, "window": 4, "prefix": np.array([2, 7])},
        ),
        (
            (2, 1),
            {
                "highest": 0,
                "query_segments": segments(QUERIES),
                "key_segments": segments(KEYS, 1),
                "bias": np.linspace(-2, 2, 15, dtype=np.float32).reshape(1, 1, 3, 5),
            },
            {
                "causal": True,
                "segment_ids": (segments(QUERIES), segments(KEYS, 1)),
                "bias": np.linspace(-2, 2, 15).reshape(1, 1, 3, 5),
            },
        ),
    )
    def test_matches_oracle(self, lead, rules, options):
        args = *operands(), blocks(*lead, density=0.8)
        got = run_kernel(as_a_kernel, *args, **rules)
        assert_close(got, oracle(*args, **options))

    @parameterized.parameters(block_attention, as_a_kernel)
    def test_where_no_key_is_seen_lse_has_no_gradient(self, operation):
        """Of a loss that leaves it out, which is NaN there: 0 * 2 * -inf."""
        q, k, v, do, dlse = operands()
        ids = segments(QUERIES), segments(KEYS, 1)
        ids[0][0, 5:] = -1  # no key has it
        rules = {"segment_ids": ids}
        if operation is as_a_kernel:
            rules = {"query_segments": ids[0], "key_segments": ids[1]}
        kept = np.ones((1, 1, *BLOCKS), bool)
        lse = oracle(q, k, v, do, dlse, kept, segment_ids=ids)[1]
        seen = np.isfinite(lse)
        self.assertFalse(seen[:, 5:].all())
        self.assertTrue(seen[:, :5].any())

        @jax.jit
        def grads(q, k, v):
            def z_loss(q, k, v):
                mask = sj.BlockMask.from_blocks(kept, BLOCK)
                _, lse = operation(q, k, v, mask, with_lse=True, **rules)
                return jnp.where(jnp.isfinite(lse), lse**2, 0).sum()

            return jax.grad(z_loss, (0, 1, 2))(q, k, v)

        dlse = np.where(seen, 2 * lse, 0)
        want = oracle(q, k, v, 0 * do, dlse, kept, segment_ids=ids)[2:]
        assert_close(grads(q, k, v), want)

    def test_a_policy_of_checkpoint_keeps_the_results(self):
        q, k, v, *_ = operands()
        mask = mask_of(blocks())

        def loss(q):
            return as_a_kernel(q, k, v, mask, with_lse=True)[0].sum()

        policies = jax.checkpoint_policies
        kept = policies.save_only_these_names("block_attention")
        for policy, forwards in ((kept, 1), (policies.nothing_saveable, 2)):
            again = jax.checkpoint(loss, policy=policy)
            traced = jax.jit(jax.grad(again)).trace(q)
            self.assertEqual(str(traced.jaxpr).count("name=the_forward"), forwards)

    def test_split(self):
        """Over whole blocks, of which the last may be padding."""
        rng = np.random.default_rng(0)
        rows, columns = (size * side for size, side in zip(BLOCKS, BLOCK, strict=True))
        for _ in range(20):
            rule = random_rules(rng, rows, columns)
            kept = rng.random((1, 2, *BLOCKS)) < 0.8
            whole, partial = _rules.split(mask_of(kept), rule)
            whole = np.broadcast_to(whole.to_blocks(), (BATCH, 2, *BLOCKS))
            if partial is None:
                partial = np.zeros_like(whole)
            else:
                partial = np.broadcast_to(partial.to_blocks(), whole.shape)
            seen = visible_oracle(rule, rows, columns)
            tiled = seen.reshape(BATCH, 1, BLOCKS[0], BLOCK[0], BLOCKS[1], BLOCK[1])
            some, every = kept & tiled.any((3, 5)), kept & tiled.all((3, 5))
            np.testing.assert_array_equal(whole & ~every, False)
            np.testing.assert_array_equal(some & ~(whole | partial), False)
            np.testing.assert_array_equal(whole & partial, False)
            if one_kind(rule):  # several are taken one by one
                np.testing.assert_array_equal(whole, every)
                np.testing.assert_array_equal(partial, some & ~every)


def random_rules(rng, rows, columns):
    """Each rule is there by chance; segments are sorted."""

    def perhaps(value):
        return value if rng.random() < 0.5 else None

    lowest = perhaps(-int(rng.integers(0, 9)))
    highest = perhaps(int(rng.integers(0, 6)))
    prefix = jnp.asarray(rng.integers(0, columns + 1, BATCH), jnp.int32)
    of_queries = of_keys = None
    if rng.random() < 0.5:
        ids = np.arange(max(rows, columns)) // rng.integers(1, 9)
        of_queries, of_keys = (
            jnp.asarray(np.tile(ids[:n], (BATCH, 1)), jnp.int32)
            for n in (rows, columns)
        )
    num_keys = columns - int(rng.integers(0, BLOCK[1]))
    return _rules.Rules(perhaps(prefix), of_queries, of_keys, lowest, highest, num_keys)


def one_kind(rule):
    """Whether bounds, prefix and segments do not meet."""
    bounds = rule.lowest is not None or rule.highest is not None
    return bounds + (rule.prefix is not None) + (rule.query_segments is not None) < 2


def visible_oracle(rule, rows, columns):
    rule = jax.tree.map(np.asarray, rule)
    seen = np.zeros((BATCH, rows, columns), bool)
    for b, i, j in np.ndindex(seen.shape):
        reach = (rule.lowest is None or j - i >= rule.lowest) and (
            rule.highest is None or j - i <= rule.highest
        )
        if rule.prefix is not None:
            reach = reach or j < rule.prefix[b]
        if rule.query_segments is not None:
            reach = reach and rule.query_segments[b, i] == rule.key_segments[b, j]
        seen[b, i, j] = reach and j < rule.num_keys
    return seen


class MergeTest(parameterized.TestCase):
    def test_disjoint_masks_give_their_union(self):
        args = operands()
        both = blocks(1, 2, density=0.9)
        first = both & (np.random.default_rng(3).random(both.shape) < 0.5)
        first[..., 0, :] = False  # sees keys in the second only

        def merged(q, k, v, mask, *, with_lse):
            del mask
            parts = [
                block_attention(q, k, v, mask_of(kept), with_lse=with_lse, causal=True)
                for kept in (first, both & ~first)
            ]
            return merge_attention(*parts[0], *parts[1])

        got = jax.jit(with_gradients, static_argnums=0)(merged, *args, both)
        assert_close(got, oracle(*args, both, causal=True))

    def test_dtype_of_the_first(self):
        out, lse = jnp.ones((1, 2, 1, 4), jnp.bfloat16), jnp.zeros((1, 2, 1))
        merged, total = merge_attention(out, lse, 3 * out, lse)
        self.assertEqual(merged.dtype, jnp.bfloat16)
        np.testing.assert_array_equal(merged.astype(jnp.float32), 2)
        np.testing.assert_allclose(total, np.log(2), rtol=1e-6)

    @parameterized.parameters(
        ({"out_b": (1, 2, 1, 3)}, r"one shape.*; got \(1, 2, 1, 4\), \(1, 2, 1, 3\)"),
        ({"lse_a": (1, 1, 2)}, r"that without head_dim; got .*\(1, 1, 2\) and"),
    )
    def test_shapes_that_do_not_fit_raise(self, changed, message):
        shapes = dict(out_a=(1, 2, 1, 4), lse_a=(1, 2, 1), out_b=(1, 2, 1, 4))
        shapes |= dict(lse_b=(1, 2, 1)) | changed
        with self.assertRaisesRegex(ValueError, message):
            merge_attention(*map(jnp.ones, shapes.values()))


class ShardingTest(parameterized.TestCase):
    @parameterized.parameters(block_attention, as_a_kernel)
    def test_over_batch_and_heads(self, operation):
        """Each device has its own heads, of queries and of keys, and their mask."""
        rng = np.random.default_rng(0)
        q, do = rng.normal(size=(2, 2, QUERIES, 8, DIM)).astype(np.float32)
        k, v = rng.normal(size=(2, 2, KEYS, 4, DIM)).astype(np.float32)
        dlse = rng.normal(size=q.shape[:3]).astype(np.float32)
        kept = rng.random((2, 4, *BLOCKS)) < 0.6
        reference = operation is block_attention
        rules = {"causal": True} if reference else {"highest": 0}

        def local(q, k, v, do, dlse, kept, prefix):
            return with_gradients(
                operation, q, k, v, do, dlse, kept, prefix=prefix, **rules
            )

        heads, mask = P("data", None, "heads"), P("data", "heads")
        mapped = jax.shard_map(
            local,
            mesh=jax.make_mesh(
                (2, 4), ("data", "heads"), axis_types=(AxisType.Auto,) * 2
            ),
            in_specs=(*[heads] * 5, mask, P("data")),
            out_specs=(heads,) * 5,
        )
        args = q, k, v, do, dlse, kept, np.array([0, 5], np.int32)
        for got, want in zip(
            jax.jit(mapped)(*args), jax.jit(local)(*args), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"q": "int32[2,10,4,8]"}, TypeError, r"floating and of one dtype; .* for `q`"),
        ({"v": "bfloat16[2,13,2,8]"}, TypeError, r"one dtype; got bfloat16.* for `v`"),
        ({"k": "float32[2,13,8]"}, ValueError, r"`k` must be \[batch, seq, heads, h"),
        ({"v": "float32[2,12,2,8]"}, ValueError, "`k` and `v` must have one shape"),
        ({"q": "float32[3,10,4,8]"}, ValueError, "agree on batch and head_dim"),
        ({"q": "float32[2,10,4,6]"}, ValueError, "agree on batch and head_dim"),
        ({"q": "float32[2,10,3,8]"}, ValueError, "must divide .*; got 2 and 3"),
        ({"k": "float32[2,0,2,8]"}, ValueError, r"`k` must .* 1; got .*\(2, 0, 2, 8\)"),
        ({"bias": "float32[1,3,3,5]"}, ValueError, r"`bias` must .*\(1, 3, 3, 5\)"),
        ({"bias": "float32[3,5]"}, ValueError, r"`bias` must have .*shape \(3, 5\)"),
        ({"segment_ids": "int32[2,10]"}, ValueError, r"of the keys .*\(2, 13\); got"),
        ({"segment_ids": "float32[2,10]"}, ValueError, "of the queries must be integ"),
        ({"segment_ids": "int32[3,2,10]"}, ValueError, r"\(2, 10\); got int32\[3"),
        ({"prefix": "float32[]"}, ValueError, "one integer, or one for each of 2 seq"),
        (
            {"prefix": "int32[3]"},
            ValueError,
            r"each of 2 sequences; got int32\[3\]",
        ),
    )
    def test_arrays(self, changed, error, message):
        given = {
            "q": "float32[2,10,4,8]",
            "k": "float32[2,13,2,8]",
            "v": "float32[2,13,2,8]",
        }
        arrays = {}
        for name, text in (given | changed).items():
            dtype, shape = text.removesuffix("]").split("[")
            arrays[name] = np.ones([int(n) for n in shape.split(",") if n], dtype)
        q, k, v = (arrays.pop(name) for name in "qkv")
        with self.assertRaisesRegex(error, message):
            block_attention(q, k, v, mask_of(blocks()), **arrays)

    @parameterized.parameters(
        ({"window": 0}, "`window` must be at least 1; got 0"),
        ({"scale": 0.0}, "`scale` must be positive and finite; got 0.0"),
        ({"prefix": -1}, r"`prefix` must be in \[0, 13\]; got -1 for sequence 0"),
        ({"scale": np.inf}, "`scale` must be positive and finite; got inf"),
        ({"implementation": "triton"}, "None or one of .*got 'triton'"),
    )
    def test_options(self, options, message):
        q, k, v, *_ = operands()
        with self.assertRaisesRegex(ValueError, message):
            block_attention(q, k, v, **options)

    def test_masks(self):
        q, k, v, *_ = operands()
        for lead, message in (
            ((3, 1), r"\[1 or 2, 1, 2 or 4\].* shape \(3, 1, 12, 15\)"),
            ((1, 3), r"leading axes .* shape \(1, 3, 12, 15\)"),
            ((1, 1, 1), r"at most two leading axes.*\(1, 1, 1, 12, 15\)"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                block_attention(q, k, v, mask_of(blocks(*lead)))
        with self.assertRaisesRegex(ValueError, r"so \(12, 15\); got \(12, 12\). Pad"):
            block_attention(q, k, v, mask_of(blocks()[:, :4]))
        with self.assertRaisesRegex(TypeError, "must be a BlockMask; got ndarray. Bui"):
            block_attention(q, k, v, blocks())

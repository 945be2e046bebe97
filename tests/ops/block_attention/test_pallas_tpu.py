"""The TPU kernels of block_attention: values in interpret mode, lowering, limits."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import sparsejax as sj
from sparsejax.ops import block_attention
from sparsejax.ops.block_attention import _pallas_tpu, _pallas_tpu_walk
from tests.ops.interpret import interpreted

TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 1e-2}


def segments(batch, length):
    ids = np.random.default_rng(1).integers(0, 3, (batch, length))
    return jnp.asarray(np.sort(ids), jnp.int32)


def operands(batch, queries, keys, heads, kv_heads, dim, dtype):
    """q, k, v, and gradients of the outputs and of the log-sum-exp."""
    rng = np.random.default_rng(0)
    q, do = rng.normal(size=(2, batch, queries, heads, dim))
    k, v = rng.normal(size=(2, batch, keys, kv_heads, dim))
    dlse = rng.normal(size=q.shape[:3])
    return *(jnp.asarray(a, dtype) for a in (q, k, v, do)), jnp.asarray(dlse)


def with_gradients(implementation, kept, q, k, v, do, dlse, block_shape, **options):
    mask = sj.BlockMask.from_blocks(kept, block_shape)

    def fn(*qkv):
        return block_attention(
            *qkv, mask, with_lse=True, implementation=implementation, **options
        )

    results, vjp = jax.vjp(fn, q, k, v)
    return *results, *vjp((do.astype(q.dtype), dlse.astype(jnp.float32)))


@pytest.mark.usefixtures("compile_fast")
class InterpretTest(parameterized.TestCase):
    @parameterized.parameters(
        # a mask for each of two query heads that share a key head; no rule cuts
        ((1, 256, 384, 2, 1, 64, jnp.float32), (128, 128), (1, 2), {}),
        # ragged; a mask for each batch, a bias for each query head, every rule
        (
            (2, 200, 250, 2, 1, 64, jnp.bfloat16),
            (128, 128),
            (2, 1),
            dict(causal=True, window=90, prefix=20, segment_ids=True, bias=True),
        ),
        # a mask for each key head, longer blocks one way than the other
        ((1, 256, 512, 4, 2, 128, jnp.float32), (128, 256), (1, 2), dict(causal=True)),
    )
    def test_matches_reference(self, sizes, block_shape, lead, options):
        *sizes, dtype = sizes
        batch, queries, keys, heads, *_ = sizes
        args = operands(*sizes, dtype)
        blocks = [
            -(-n // side) for n, side in zip((queries, keys), block_shape, strict=True)
        ]
        options = dict(options)
        if options.pop("segment_ids", False):
            options["segment_ids"] = segments(batch, queries), segments(batch, keys)
        if options.pop("bias", False):
            bias = np.linspace(-2, 2, heads * np.prod(blocks))
            options["bias"] = jnp.asarray(bias.reshape(1, heads, *blocks))
        fn = functools.partial(with_gradients, block_shape=block_shape, **options)
        kernel = jax.jit(functools.partial(fn, "pallas_tpu"))
        reference = jax.jit(functools.partial(fn, "reference"))
        rng = np.random.default_rng(3)
        some = rng.random((*lead, *blocks)) < 0.6
        some[..., 0, :] = some[..., :, -1] = False
        some.reshape(-1, *blocks)[-1, :, :-1] = True  # takes more steps than the others
        masks = (some,) if options else (some, np.zeros_like(some))
        for kept in masks:  # one program
            wide = [a.astype(jnp.float32) for a in args]
            want = reference(kept, *wide)
            with interpreted():
                got = jax.block_until_ready(
                    kernel(kept, *poisoned(args, kept, block_shape[1]))
                )
            self.assertEqual([a.dtype for a in got], [dtype, jnp.float32, *[dtype] * 3])
            for a, b in zip(got, want, strict=True):
                a, b = np.asarray(a, np.float32), np.asarray(b)
                finite = np.isfinite(b)
                np.testing.assert_array_equal(a[~finite], b[~finite])
                limit = TOLERANCE[dtype] * (1 + np.abs(b[finite]).max(initial=0))
                np.testing.assert_allclose(a[finite], b[finite], rtol=0, atol=limit)


def poisoned(args, kept, width):
    """NaN in keys and values of blocks that no list names."""
    q, k, v, do, dlse = args
    used = np.repeat(kept.any((0, 1, 2)), width)[: k.shape[1], None, None]
    return q, *(jnp.where(used, a, jnp.nan) for a in (k, v)), do, dlse


def shapes(
    batch=2,
    seq=1024,
    heads=4,
    kv_heads=2,
    dim=128,
    dtype="bfloat16",
    lead=(1, 2),
    block_shape=(128, 128),
    capacity=None,
):
    """Shapes of a mask, q, k and segments; nothing is computed."""
    blocks = [-(-seq // side) for side in block_shape]

    def build(kept):
        return sj.BlockMask.from_blocks(kept, block_shape, capacity=capacity)

    kept = jax.ShapeDtypeStruct((*lead, *blocks), jnp.bool_)
    return (
        jax.eval_shape(build, kept),
        jax.ShapeDtypeStruct((batch, seq, heads, dim), dtype),
        jax.ShapeDtypeStruct((batch, seq, kv_heads, dim), dtype),
        jax.ShapeDtypeStruct((batch, seq), jnp.int32),
    )


class PartsTest(parameterized.TestCase):
    """Lists of all heads that do not fit into scalar memory together."""

    @pytest.mark.usefixtures("compile_fast")
    def test_heads_one_by_one_match_the_reference(self):
        """Own lists of each query head, of all batches alike but for the rules."""
        args = operands(2, 200, 250, 4, 2, 64, jnp.float32)
        ids = segments(2, 200), segments(2, 250)
        options = dict(causal=True, window=90, prefix=20, segment_ids=ids)
        fn = functools.partial(with_gradients, block_shape=(128, 128), **options)
        kept = np.random.default_rng(3).random((1, 4, 2, 2)) < 0.6
        want = jax.jit(functools.partial(fn, "reference"))(kept, *args)
        kernel = jax.jit(functools.partial(fn, "pallas_tpu"))
        # of a head 7 steps by row or fewer, by column 2 times as many
        with mock.patch.object(_pallas_tpu_walk, "MAX_WORDS", 20), interpreted():
            self.assertIn("scan", str(kernel.trace(kept, *args).jaxpr))
            got = jax.block_until_ready(kernel(kept, *args))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    @parameterized.parameters(
        (11, (2, 4)),  # the most words that fit, of which a batch has 4 and a head 1
        (4, (1, 4)),
        (3, (1, 2)),
        (1, (1, 1)),
    )
    def test_as_many_as_fit(self, most, want):
        with mock.patch.object(_pallas_tpu_walk, "MAX_WORDS", most):
            self.assertEqual(_pallas_tpu_walk._fitting(4, 4, 4), want)

    @parameterized.parameters(((2, 2), 1), ((1, 2), 4), ((2, 2), 2), ((1, 1), 4))
    def test_parts_hold_what_is_theirs(self, part, lead):
        """Each result is made of the operands and lists of its own batch and head."""
        batch, heads, kv_heads = 4, 4, 2
        rng = np.random.default_rng(0)
        code, bias = rng.integers(0, 9, (2, batch, lead, 3))
        prefix = jnp.arange(batch)
        operands = {
            "q": rng.normal(size=(batch, heads, 5)),
            "k": rng.normal(size=(batch, kv_heads, 5)),
            "query_segments": rng.normal(size=(batch, 1, 5)),
        }

        def run(steps, operands, results):
            self.assertEqual(results["out"].shape, operands["q"].shape)
            q, k = operands["q"], operands["k"]
            group = q.shape[1] // k.shape[1]
            lists = (steps.code + 2 * steps.bias).sum(-1) * steps.count
            lists = jnp.repeat(lists, q.shape[1] // lists.shape[1], axis=1)
            own = lists[..., None] + steps.prefix[:, None, None]
            own += operands["query_segments"]
            return [q * jnp.repeat(k, group, axis=1) + own]

        steps = _pallas_tpu_walk.Steps(code, bias, code[..., 0], prefix)
        steps, operands = jax.tree.map(jnp.asarray, (steps, operands))
        results = {"out": jax.ShapeDtypeStruct(operands["q"].shape, jnp.float32)}
        want = run(steps, operands, results)
        got = _pallas_tpu_walk._in_parts(run, steps, operands, results, part)
        np.testing.assert_allclose(got, want, rtol=1e-6)


class LoweringTest(parameterized.TestCase):
    """Programs for a TPU, exported from a CPU."""

    @parameterized.parameters(
        (dict(lead=(1, 1)), {}),
        (dict(lead=(1, 4), dim=64, seq=1000), dict(causal=True, prefix=3)),
        (
            dict(lead=(2, 2), block_shape=(256, 512), dtype="float32"),
            dict(window=300, segment_ids=True, bias=True),
        ),
        (dict(heads=8, block_shape=(512, 512), dim=256), dict(causal=True)),
    )
    def test_exports(self, sizes, options):
        mask, q, k, ids = shapes(**sizes)

        def fn(mask, q, k, v, ids):
            rules = dict(options)
            if rules.pop("segment_ids", False):
                rules["segment_ids"] = ids
            if rules.pop("bias", False):
                rules["bias"] = jnp.ones(mask.blocks_shape)

            def loss(*qkv):
                out, lse = block_attention(
                    *qkv, mask, implementation="pallas_tpu", with_lse=True, **rules
                )
                return out.astype(jnp.float32).sum() + lse.sum()

            return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

        exported = jax.export.export(jax.jit(fn), platforms=["tpu"])(mask, q, k, k, ids)
        # the outputs; dq; dk with dv
        self.assertEqual(exported.mlir_module().count("@tpu_custom_call"), 3)

    def test_long_sequences_of_several_heads(self):
        """4 batches of 8 heads; 256 lists of 26, and a step more for an empty one."""
        self.assertGreater(4 * 8 * 256 * 27, _pallas_tpu.MAX_WORDS)
        mask, q, k, _ = shapes(4, 32768, 32, 8, lead=(4, 8), capacity=26)
        fn = functools.partial(block_attention, implementation="pallas_tpu")
        exported = jax.export.export(jax.jit(fn), platforms=["tpu"])(q, k, k, mask)
        self.assertEqual(exported.mlir_module().count("@tpu_custom_call"), 1)


class UnsupportedTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(dtype="float16"), "must be bfloat16 or float32; got float16"),
        (dict(dim=80), "`head_dim` must be a multiple of 64; got 80"),
        (dict(block_shape=(64, 128)), r"multiples of 128; got \(64, 128\)"),
        (dict(block_shape=(128, 192)), r"multiples of 128; got \(128, 192\)"),
        (dict(block_shape=(1024, 1024)), r"fit into VMEM .*\(1024, 1024\) with head_d"),
        (dict(batch=0), r"must be queries and keys; got \(0, 1024, 4, 128\)"),
        (
            dict(seq=128 * 448, lead=(1, 2)),
            "196608 words of scalar memory .*; got 200705",
        ),
        (
            dict(seq=128 * 8193, lead=(1, 1), capacity=(1, 1)),
            r"at most 16384 block rows, .*8193 rows and 8193 \* 2",
        ),
    )
    def test_reasons(self, sizes, reason):
        fn = functools.partial(block_attention, implementation="pallas_tpu")
        mask, q, k, _ = shapes(**sizes)
        with self.assertRaisesRegex(
            NotImplementedError, f"implementation='pallas_tpu': .*{reason}"
        ):
            jax.eval_shape(fn, q, k, k, mask)

    def test_capacity_is_what_counts(self):
        fn = functools.partial(block_attention, implementation="pallas_tpu")
        mask, q, k, _ = shapes(seq=128 * 448, lead=(1, 2), capacity=99)
        self.assertEqual(jax.eval_shape(fn, q, k, k, mask).shape, q.shape)

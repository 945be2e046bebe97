"""The Hopper kernels of block_attention: values in interpret mode, lowering, limits."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax.formats import BlockMask
from sparsejax.ops import block_attention
from tests.ops.interpret import gpu_interpreted, needs_gpu_interpreter

# by name: the function hides the package of that name
_mosaic_gpu, _backward, _gradients, _reference, _rules, _walk = (
    importlib.import_module(f"sparsejax.ops.block_attention.{name}")
    for name in (
        "_mosaic_gpu",
        "_mosaic_gpu_backward",
        "_gradients",
        "_reference",
        "_rules",
        "_walk",
    )
)
kernel = functools.partial(block_attention, implementation="mosaic_gpu")
BLOCK = (128, 128)
SCALE = 0.11


def operands(batch, queries, keys, heads, kv_heads, dim, mask_shape, *, seed=0):
    """q, k, v, the gradient of the outputs, and a mask with an empty row and column."""
    rng = np.random.default_rng(seed)
    q, do = rng.normal(size=(2, batch, queries, heads, dim))
    k, v = rng.normal(size=(2, batch, keys, kv_heads, dim))
    kept = rng.random(mask_shape) < 0.7
    if kept.shape[-1] > 2:
        kept[..., 1, :] = kept[..., :, 2] = False
    mask = jax.jit(BlockMask.from_blocks, static_argnums=1)(kept, BLOCK)
    return *(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v, do)), mask


def poisoned(array, unused):
    """NaN in the blocks of the sequence that no list names."""
    spread = jnp.repeat(jnp.asarray(unused), 128)[: array.shape[1]]
    return jnp.where(spread[None, :, None, None], jnp.nan, array)


def assert_close(got, want, tolerance=6e-3):
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    assert np.isfinite(got).all()
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < tolerance, error


@pytest.mark.slow
@needs_gpu_interpreter
class InterpretTest(parameterized.TestCase):
    @parameterized.named_parameters(
        # two query heads share a key head, each with a mask of its own; no rule
        ("group", (1, 256, 384, 2, 1, 64, (1, 2, 2, 3)), {}, False, 64),
        # all rules and a bias; ragged queries and keys; two batches, a mask for each
        (
            "rules",
            (2, 200, 250, 1, 1, 64, (2, 1, 2, 2)),
            {"lowest": -90, "highest": 0, "prefix": 20, "segments": True},
            True,
            128,
        ),
    )
    def test_matches_reference(self, sizes, rules, with_bias, columns):
        q, k, v, do, mask = operands(*sizes)
        batch, queries, keys = sizes[:3]
        prefix, segments = rules.get("prefix"), (None, None)
        if "segments" in rules:
            rng = np.random.default_rng(1)
            segments = [
                jnp.asarray(np.sort(rng.integers(0, 3, (batch, n))), jnp.int32)
                for n in (queries, keys)
            ]
        rule = _rules.Rules(
            None if prefix is None else jnp.full(batch, prefix, jnp.int32),
            *segments,
            rules.get("lowest"),
            rules.get("highest"),
            keys,
        )
        bias = jnp.linspace(-2, 2, 4).reshape(1, 1, 2, 2) if with_bias else None

        @jax.jit
        def reference(q, k, v, do):
            call = functools.partial(_reference.block_attention, scale=SCALE)
            (out, lse), vjp = jax.vjp(
                lambda q, k, v: call(q, k, v, mask, rule, bias), q, k, v
            )
            seen = jnp.isfinite(lse)
            dlse = jnp.where(seen, jnp.cos(jnp.arange(lse.size)).reshape(lse.shape), 0)
            delta = jnp.sum(out * do, axis=-1).swapaxes(1, 2) - dlse
            return out, lse, seen, delta, vjp((do, dlse))

        wide = [a.astype(jnp.float32) for a in (q, k, v, do)]
        want, want_lse, seen, delta, want_grads = reference(*wide)
        self.assertFalse(seen.all())
        if sizes[-1][-1] > 2:  # the column that no query sees
            k, v = (poisoned(a, [False, False, True]) for a in (k, v))

        # what `_gradients` does, with tiles that the interpreter can run
        @jax.jit
        def make_lists():
            longer = _rules.lengthened(rule, mask)
            return _gradients.Lists(*_rules.split(mask, longer), longer, bias)

        lists = make_lists()
        tiles = _walk.Tiles(columns, stages=2, in_registers=False)
        forward = functools.partial(_mosaic_gpu.forward, scale=SCALE, tiles=tiles)
        tiles = _walk.Tiles(64, stages=2, in_registers=False)
        backward = functools.partial(_backward.backward, scale=SCALE, tiles=tiles)
        with gpu_interpreted():
            out, lse = jax.jit(forward)(q, k, v, lists)
            inverse = jnp.where(seen, want_lse, jnp.inf)
            grads = jax.jit(backward)(q, k, v, do, inverse, delta, lists)
        assert_close(out, want)
        np.testing.assert_array_equal(np.isfinite(lse), seen)
        np.testing.assert_allclose(lse[seen], want_lse[seen], atol=1e-5)
        for got, want_grad in zip(grads, want_grads, strict=True):
            assert_close(got, want_grad)

    def test_what_no_pair_needs(self):
        """Keys of a block that segments hide are NaN; queries that see no key."""
        sizes = 1, 128, 256, 1, 1, 64, (1, 1, 1, 2)
        q, k, v, do, _ = operands(*sizes)
        mask = BlockMask.from_blocks(jnp.ones(sizes[-1], bool), BLOCK)
        k, v = (poisoned(a, [False, True]) for a in (k, v))
        ids = [jnp.arange(128)[None] // 100, jnp.arange(256)[None] // 128 * 2]
        rules = _rules.Rules(None, *ids, None, None, 256)
        tiles = _walk.Tiles(64, stages=2, in_registers=False)
        kernels = _gradients.Kernels(
            functools.partial(_mosaic_gpu.forward, tiles=tiles),
            functools.partial(_backward.backward, tiles=tiles),
        )

        def grads(attention, *qkv):
            def loss(*qkv):
                out, lse = attention(*qkv, mask, rules, None, scale=SCALE)
                z = jnp.where(jnp.isfinite(lse), lse**2, 0)  # its gradient is 0 * inf
                return jnp.vdot(out, do.astype(out.dtype)).astype(jnp.float32) + z.sum()

            return jax.grad(loss, (0, 1, 2))(*qkv)

        with gpu_interpreted():
            call = functools.partial(grads, _gradients.differentiable(kernels))
            got = jax.jit(call)(q, k, v)
        wide = (a.astype(jnp.float32) for a in (q, k, v))
        call = functools.partial(grads, _reference.block_attention)
        for a, b in zip(got, jax.jit(call)(*wide), strict=True):
            assert_close(a, b, tolerance=1e-2)


class LoweringTest(parameterized.TestCase):
    @parameterized.parameters(
        (64, (1, 1), {}),
        (128, (1, 4), {"causal": True, "prefix": 3}),
        (128, (2, 2), {"window": 300, "segments": True, "bias": True}),
    )
    def test_for_cuda(self, dim, lead, options):
        seq = 1024
        q = jax.ShapeDtypeStruct((2, seq, 4, dim), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((2, seq, 2, dim), jnp.bfloat16)
        kept = jax.ShapeDtypeStruct((*lead, seq // 128, seq // 128), jnp.bool_)
        segments = jax.ShapeDtypeStruct((2, seq), jnp.int32)

        def fn(q, k, v, kept, segments):
            mask = BlockMask.from_blocks(kept, BLOCK)
            rules = dict(options)
            if rules.pop("segments", False):
                rules["segment_ids"] = segments
            if rules.pop("bias", False):
                rules["bias"] = kept.astype(jnp.float32)

            def loss(q, k, v):
                out, lse = kernel(q, k, v, mask, with_lse=True, **rules)
                return out.astype(jnp.float32).sum() + lse.sum()

            return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

        exported = jax.export.export(jax.jit(fn), platforms=["cuda"])(
            q, k, k, kept, segments
        )
        # the outputs; dq; dk with dv
        self.assertEqual(exported.mlir_module().count("@mosaic_gpu"), 3)


class LimitsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"dtype": jnp.float32}, "must be bfloat16 or float16"),
        ({"dim": 80}, "`head_dim` must be one of \\(64, 128\\); got 80"),
        ({"block": (64, 128)}, "must be multiples of 128; got \\(64, 128\\)"),
        ({"batch": 0}, "there must be queries and keys"),
    )
    def test_says_why(self, change, reason):
        case = {"dtype": jnp.bfloat16, "dim": 64, "block": BLOCK, "batch": 1} | change
        q = jnp.zeros((case["batch"], 128, 1, case["dim"]), case["dtype"])
        blocks = [128 // side for side in case["block"]]
        mask = BlockMask.from_blocks(jnp.ones(blocks, bool), case["block"])
        with self.assertRaisesRegex(NotImplementedError, reason):
            kernel(q, q, q, mask)


@pytest.mark.gpu
class DeviceTest(parameterized.TestCase):
    @parameterized.parameters(
        (64, (1, 1024, 1024, 4, 4, (1, 1)), {}),
        (128, (2, 1024, 640, 4, 2, (1, 2)), {}),
        (128, (2, 700, 900, 4, 2, (2, 4)), {}),
        (64, (2, 700, 900, 4, 2, (2, 4)), {"causal": True}),
        (128, (1, 1024, 1024, 4, 4, (1, 1)), {"causal": True}),
        (
            64,
            (2, 1024, 640, 4, 2, (1, 2)),
            {"causal": True, "window": 200, "prefix": 100},
        ),
        (128, (2, 700, 900, 4, 2, (2, 4)), {"segment_ids": True, "bias": True}),
        (
            128,
            (1, 1024, 1024, 4, 4, (1, 1)),
            {"causal": True, "segment_ids": True, "bias": True},
        ),
    )
    def test_matches_reference(self, dim, sizes, options):
        batch, queries, keys, heads, kv_heads, lead = sizes
        blocks = (-(-queries // 128), -(-keys // 128))
        q, k, v, do, mask = operands(
            batch, queries, keys, heads, kv_heads, dim, (*lead, *blocks)
        )
        options = dict(options)
        if options.pop("segment_ids", False):
            rng = np.random.default_rng(1)
            options["segment_ids"] = [
                jnp.asarray(np.sort(rng.integers(0, 3, (batch, n))), jnp.int32)
                for n in (queries, keys)
            ]
        if options.pop("bias", False):
            options["bias"] = jax.random.normal(jax.random.key(3), (*lead, *blocks))

        def all_of(implementation, *qkv):
            def call(*qkv):
                return block_attention(
                    *qkv, mask, implementation=implementation, with_lse=True, **options
                )

            (out, lse), vjp = jax.vjp(call, *qkv)
            dlse = jnp.where(jnp.isfinite(lse), 0.1, 0.0)
            return out, lse, *vjp((do.astype(out.dtype), dlse))

        got = jax.jit(functools.partial(all_of, "mosaic_gpu"))(q, k, v)
        wide = [a.astype(jnp.float32) for a in (q, k, v)]
        with jax.default_matmul_precision("highest"):
            want = jax.jit(functools.partial(all_of, "reference"))(*wide)
        seen = np.isfinite(want[1])
        np.testing.assert_array_equal(np.isfinite(got[1]), seen)
        np.testing.assert_allclose(got[1][seen], want[1][seen], atol=1e-2)
        for a, b in zip(got[:1] + got[2:], want[:1] + want[2:], strict=True):
            assert_close(a, b, tolerance=1e-2)

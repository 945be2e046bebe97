"""The block attention layer: equal to the dense one where all is kept, and trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

import sparsejax as sj
from sparsejax import attention, models, nn
from tests.nn import attending
from tests.nn.attending import SEQ, inputs, value_and_grads

BLOCK = (4, 4)
topk = functools.partial(attention.topk_blocks, num_kept=2, block_shape=BLOCK)
statistical = functools.partial(
    attention.statistical_topk_blocks, k=1.5, block_shape=BLOCK
)
block_sparse = functools.partial(
    attention.block_sparse, num_kept=3, block_shape=BLOCK, per_head=False
)
lines = dict(window=4, sink=1, local=2, block_shape=BLOCK, per_head=False)
by_lines = functools.partial(
    attention.vertical_slash, num_vertical=1, num_slash=2, **lines
)
by_shares = functools.partial(attention.flex_prefill, alpha=0.1, min_budget=2, **lines)

make = functools.partial(attending.make, nn.BlockAttention)


class BlockAttentionTest(parameterized.TestCase):
    @pytest.mark.once
    def test_all_blocks_equal_dense_attention(self):
        every = functools.partial(topk, num_kept=100)
        got = value_and_grads(make(select=every))
        want = value_and_grads(attending.make(nn.Attention))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    @parameterized.parameters(topk, statistical, block_sparse, by_lines, by_shares)
    def test_equals_attention_under_the_mask(self, select):
        layer = make(select=select)
        ((_, (y, density)), grads) = value_and_grads(layer)

        @nnx.jit
        def by_parts(layer):
            x, positions = inputs()
            query, key, value = layer.project(x, positions)
            kept = select(query, key, causal=True).to_dense()[..., :SEQ, :SEQ]
            kept = jnp.repeat(kept, 2, axis=1) & jnp.tri(SEQ, dtype=bool)
            dense = jax.nn.dot_product_attention(query, key, value, mask=kept)
            share = kept.sum(-1).mean(1) / (1 + jnp.arange(SEQ))
            return layer.combine(dense), share

        want, share = by_parts(layer)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(density, share, rtol=1e-5)
        self.assertLess(density[:, 20:].mean(), 0.6)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            self.assertTrue(jnp.isfinite(grad).all() and grad.any(), path)

    def test_a_mask_for_all(self):
        kept = jnp.eye(8, dtype=bool)

        def own(query, key, *, causal):
            return sj.BlockMask.from_blocks(kept[None, None], BLOCK)

        _, (y, density) = value_and_grads(make(select=own))[0]
        own_block = 1 + np.arange(SEQ) % 4
        want = np.broadcast_to(own_block / (1 + np.arange(SEQ)), (2, SEQ))
        np.testing.assert_allclose(density, want, rtol=1e-5)
        self.assertTrue(jnp.isfinite(y).all())

    @pytest.mark.once
    def test_valid_keys_are_all_attended(self):
        block, dense = make(select=topk), attending.make(nn.Attention)
        x, positions = inputs()
        valid = attention.causal_mask(positions, positions)
        parts = dense.project(x, positions)
        for got, want in zip(
            block.attend(*parts, valid), dense.attend(*parts, valid), strict=True
        ):
            np.testing.assert_array_equal(got, want)

    @pytest.mark.once
    def test_filler_has_no_part(self):
        """A selector learns of `lengths` where there are any."""
        layer, lengths = make(select=topk), (11, SEQ)

        @nnx.jit
        def run(layer):
            parts = layer.project(*inputs())
            filled = layer.attend(*parts, lengths=jnp.array(lengths))
            alone = [
                layer.attend(*(x[b : b + 1, :n] for x in parts))
                for b, n in enumerate(lengths)
            ]
            return filled, alone

        filled, alone = run(layer)
        for b, length in enumerate(lengths):
            for got, want in zip(filled, alone[b], strict=True):
                np.testing.assert_allclose(got[b, :length], want[0], atol=1e-5)

    @parameterized.parameters(
        ({"num_kv_heads": 3}, "divide `num_heads`.*num_kv_heads=3 and num_heads=4"),
        ({"num_kv_heads": 0}, "both at least 1; got num_kv_heads=0"),
        ({"num_heads": 0}, "both at least 1; got .*num_heads=0"),
        ({"head_dim": 7}, "`head_dim` must be even.*got 7"),
        ({"head_dim": 0}, "at least 2; got 0"),
        ({"num_heads": 3}, "`num_heads` must divide `d_model`.*got num_heads=3"),
        ({"num_heads": 16}, "at least 2; got 1, with d_model=16 and num_heads=16"),
    )
    def test_bad_sizes_are_named(self, options, message):
        sizes = {"d_model": 16, "num_heads": 4} | options
        for kind in (nn.Attention, functools.partial(nn.BlockAttention, select=topk)):
            with self.assertRaisesRegex(ValueError, message):
                kind(**sizes, rngs=nnx.Rngs(0))

    @parameterized.parameters(
        functools.partial(nn.BlockAttention, select=topk),
        functools.partial(
            nn.PyramidAttention,
            block_shape=BLOCK,
            bounds=[(2, 1.0)],
            importance=functools.partial(attention.antidiagonal_importance, stride=2),
        ),
        functools.partial(
            nn.SeerAttention,
            block=4,
            select=functools.partial(attention.seer_topk, num_kept=2),
        ),
        functools.partial(nn.SparkAttention, k=2, split=4),
    )
    def test_a_named_implementation_is_the_operations(self, kind):
        """One that cannot take such heads says so."""
        layer = attending.make(kind, implementation="mosaic_gpu")
        with self.assertRaisesRegex(NotImplementedError, "'mosaic_gpu'"):
            jax.eval_shape(lambda: layer(*inputs()))

    @pytest.mark.once
    def test_trains_in_a_decoder(self):
        config = models.DecoderConfig(
            vocab_size=5,
            d_model=16,
            num_layers=1,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            d_ff=16,
            attention=functools.partial(nn.BlockAttention, select=topk),
        )
        tokens = jnp.asarray(np.tile([1, 3, 0, 4, 2], (2, 6)))
        graph, params = nnx.split(models.Decoder(config, rngs=nnx.Rngs(0)))

        def loss(params):
            logits, density = nnx.merge(graph, params)(tokens, with_density=True)
            picked = jnp.take_along_axis(
                jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
            )
            return -picked.mean(), density["attention"]

        @jax.jit
        def train(params):
            def step(params, _):
                (value, density), grads = jax.value_and_grad(loss, has_aux=True)(params)
                params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
                return params, (value, density)

            return jax.lax.scan(step, params, length=20)[1]

        losses, density = train(params)
        self.assertLess(losses[-1], 0.5 * losses[0])
        self.assertEqual(density.shape, (20, 1, 2, SEQ))
        np.testing.assert_array_equal(density[..., :8], 1)  # two blocks
        self.assertLess(density[..., -1].max(), 0.3)

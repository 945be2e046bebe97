"""The pyramid attention layer: dense at level 1, else its function, and trained."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from sparsejax import attention, decode, models, nn
from tests.nn import attending
from tests.nn.attending import SEQ, inputs, value_and_grads

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all is compilation

BLOCK = (4, 4)
COARSE = ((1, 0.1), (2, 0.5), (4, 0.8))
by_squares = functools.partial(attention.antidiagonal_importance, stride=2)
by_mass = functools.partial(attention.mass_levels, min_full=0.0)


def by_samples(query, key, **options):
    return attention.sampled_importance(
        query, key, random_key=jax.random.key(0), fraction=0.5, **options
    )


def by_key_head(query, key, *, block_shape, causal):
    """Pooled products, one map for the query heads that share a key head."""
    scores = attention.block_scores(query, key, block_shape=block_shape)
    blocks = jnp.arange(scores.shape[-1])
    return jnp.where(blocks <= blocks[:, None], jnp.exp(scores), -jnp.inf)


make = functools.partial(
    attending.make,
    nn.PyramidAttention,
    block_shape=BLOCK,
    bounds=COARSE,
    importance=by_squares,
)


def decoder(**options):
    config = models.DecoderConfig(
        vocab_size=5,
        d_model=16,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        d_ff=16,
        attention=functools.partial(
            nn.PyramidAttention,
            block_shape=BLOCK,
            bounds=COARSE,
            importance=by_squares,
            **options,
        ),
    )
    return models.Decoder(config, rngs=nnx.Rngs(0))


def density_oracle(level_map):
    """A key at a time; a block that is not wholly before its queries is at level 1."""
    heads = level_map.shape[1]
    want = np.zeros((len(level_map), SEQ))
    for b, h, t in np.ndindex(len(level_map), heads, SEQ):
        row, total = t // BLOCK[0], 0.0
        for j in range(t + 1):
            level = level_map[b, h, row, j // BLOCK[1]]
            cut = (j // BLOCK[1] + 1) * BLOCK[1] > row * BLOCK[0]
            total += 0 if level == 0 else 1 if cut else 1 / level
        want[b, t] += total / (t + 1) / heads
    return want


class PyramidAttentionTest(parameterized.TestCase):
    def test_level_1_only_equals_dense_attention(self):
        got = value_and_grads(make(bounds=((1, 1.0),)))
        want = value_and_grads(attending.make(nn.Attention))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    @parameterized.parameters(
        {},
        {"importance": by_samples, "bounds": ((2, 0.5), (4, 1.0))},
        {"importance": by_key_head, "assign": by_mass},
        {"thresholds": ((2, 0.5), (4, 0.1))},
    )
    def test_equals_the_function(self, **options):
        """Values, gradients of every kernel, and the density by a loop."""
        layer = make(**options)
        (_, (y, density)), grads = value_and_grads(layer)

        @nnx.jit
        def by_parts(layer):
            x, positions = inputs()
            level_map = layer.level_map(*layer.project(x, positions)[:2])

            def loss(layer):
                out = attention.pyramid_attention(
                    *layer.project(x, positions),
                    level_map,
                    block_shape=BLOCK,
                    levels=(1, 2, 4),
                    causal=True,
                )
                y = layer.combine(out)
                return jnp.sum(jnp.sin(y)), y

            grads, y = nnx.grad(loss, has_aux=True)(layer)
            return level_map, y, grads

        level_map, want, want_grads = by_parts(layer)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(grads, want_grads, rtol=1e-3, atol=1e-4)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            self.assertTrue(jnp.isfinite(grad).all() and grad.any(), path)
        level_map = np.asarray(level_map)
        np.testing.assert_allclose(density, density_oracle(level_map), rtol=1e-5)
        self.assertGreater(len(np.unique(level_map)), 2)
        self.assertLess(density[:, 20:].mean(), 0.85)
        own = np.arange(level_map.shape[-1])
        np.testing.assert_array_equal(level_map[..., own, own], 1)
        np.testing.assert_array_equal(level_map[..., 0], 1)

    def test_what_is_not_alike_is_read_finely(self):
        layer = make(bounds=((4, 1.0),), thresholds=((2, -2.0), (4, 2.0)))
        self.assertEqual(layer.levels, (1, 2, 4))

        @nnx.jit
        def level_map_of(layer):
            return layer.level_map(*layer.project(*inputs())[:2])

        level_map = np.asarray(level_map_of(layer))
        np.testing.assert_array_equal(np.unique(level_map), [0, 1, 2])

    def test_valid_keys_are_all_attended(self):
        pyramid, dense = make(), attending.make(nn.Attention)
        x, positions = inputs()
        valid = attention.causal_mask(positions, positions)
        parts = dense.project(x, positions)
        for got, want in zip(
            pyramid.attend(*parts, valid), dense.attend(*parts, valid), strict=True
        ):
            np.testing.assert_array_equal(got, want)

    @pytest.mark.once
    def test_filler_has_no_part(self):
        layer = make(thresholds=((2, 0.2), (4, 0.1)))

        @nnx.jit
        def run(layer):
            parts = layer.project(*inputs())
            filled = layer.attend(*parts, lengths=jnp.array([11, SEQ]))
            return filled, layer.attend(*(x[:1, :11] for x in parts))

        for got, want in zip(*run(layer), strict=True):
            np.testing.assert_allclose(got[0, :11], want[0], atol=1e-5)

    def test_layers_share_a_scan(self):
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(key):
            return nn.PyramidAttention(
                16,
                4,
                head_dim=8,
                block_shape=BLOCK,
                bounds=[list(pair) for pair in COARSE],
                importance=by_squares,
                rngs=nnx.Rngs(key),
            )

        stacked = create(jax.random.split(jax.random.key(0), 2))
        x, positions = inputs()

        @nnx.jit
        def scanned(stacked, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
            def apply(x, layer):
                y, density = layer(x, positions, with_density=True)
                return x + y, density

            return apply(x, stacked)

        y, density = scanned(stacked, x)
        self.assertTrue(jnp.isfinite(y).all())
        self.assertEqual(density.shape, (2, 2, SEQ))
        self.assertLess(density[..., 20:].max(), 1)

    @pytest.mark.once
    def test_trains_in_a_decoder(self):
        tokens = jnp.asarray(np.tile([1, 3, 0, 4, 2], (2, 6)))
        graph, params = nnx.split(decoder())

        def loss(params):
            logits, density = nnx.merge(graph, params)(tokens, with_density=True)
            picked = jnp.take_along_axis(
                jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
            )
            return -picked.mean(), density["attention"]

        @chex.assert_max_traces(n=1)
        def train(params):
            def step(params, _):
                (value, density), grads = jax.value_and_grad(loss, has_aux=True)(params)
                params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
                return params, (value, density)

            return jax.lax.scan(step, params, length=10)

        run = jax.jit(train)
        params, (losses, density) = run(params)
        _, (more, _) = run(params)
        self.assertLess(more[-1], 0.5 * losses[0])
        self.assertEqual(density.shape, (10, 1, 2, SEQ))
        np.testing.assert_array_equal(density[..., :8], 1)  # two blocks
        self.assertLess(density[..., -1].max(), 0.8)

    def test_decodes_to_all_tokens(self):
        """Only the prompt is read by the pyramid, and `select_keys` applies."""
        model = decoder()
        tokens = jnp.asarray([[1, 3, 0, 4, 2, 1, 3, 0, 4, 2]])
        out = [
            decode.generate(
                decode.prepare(model, select_keys=keys), tokens, num_tokens=5
            ).tokens
            for keys in (None, decode.Quest(64, page_size=4))
        ]
        np.testing.assert_array_equal(*out)
        first = nnx.jit(lambda model: model(tokens)[:, -1].argmax(-1))(model)
        np.testing.assert_array_equal(out[0][:, 0], first)

    @parameterized.parameters(
        ({"num_kv_heads": 3}, "divide `num_heads`.*num_kv_heads=3 and num_heads=4"),
        ({"head_dim": 7}, "`head_dim` must be even.*got 7"),
        ({"block_shape": (4, 32)}, r"at most \(30, 30\).*got \(4, 32\)"),
        ({"block_shape": (4, 6)}, "divide the 6 keys of a block; got 4"),
        ({"bounds": ((1, 0.5), (2, 0.4))}, "`bounds` must be pairs.*both ascending"),
        ({"thresholds": ((3, 0.5),)}, "divide the 4 keys of a block; got 3"),
        (
            {"importance": attention.antidiagonal_importance},
            r"`stride` must divide both sides of a block; got 16 and \(4, 4\)",
        ),
    )
    def test_bad_settings_are_named(self, options, message):
        sizes = {"num_kv_heads": 2, "head_dim": 8} | {
            "block_shape": BLOCK,
            "bounds": COARSE,
            "importance": by_squares,
        }

        def call():
            layer = nn.PyramidAttention(16, 4, **sizes | options, rngs=nnx.Rngs(0))
            return layer(*inputs())

        with self.assertRaisesRegex(ValueError, message):
            jax.eval_shape(call)


def test_the_cap_of_a_key_head_is_that_of_its_query_heads():
    layer = make(bounds=((4, 1.0),), thresholds=((4, 0.99),))
    shape = (1, SEQ, layer.num_heads, layer.head_dim)
    x = jax.random.normal(jax.random.key(0), shape)
    key = x[:, :, : layer.num_kv_heads].at[:, :, 0].set(1)  # alike in head 0
    level_map = layer.level_map(x, key)
    np.testing.assert_array_equal(level_map.max(axis=(0, 2, 3)), [4, 4, 1, 1])

"""The decoder equals a NumPy loop, is causal, and takes other kinds of layers."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from sparsejax import models, nn
from sparsejax.typing import plain_path

SMALL = models.DecoderConfig(
    vocab_size=11,
    d_model=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_ff=20,
)
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def make(config, seed=0):
    return models.Decoder(config, rngs=nnx.Rngs(seed))


def weights_of(model):
    """The weights as float64, by dotted name."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    return {".".join(plain_path(p)): np.asarray(x, np.float64) for p, x in leaves}


def rms_norm_oracle(x, scale, eps):
    return x / np.sqrt((x**2).mean() + eps) * scale


def rope_oracle(x, position, base):
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = position * base ** (-i / half)
        y[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        y[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return y


def decoder_oracle(w, config, tokens):
    """Logits of one sequence, a token and a head at a time."""
    c, group = config, config.num_heads // config.num_kv_heads
    x = [w["embed.embedding"][token] for token in tokens]
    for layer in range(c.num_layers):
        block = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in w.items()
            if name.startswith(f"blocks.{layer}.")
        }
        normed = [
            rms_norm_oracle(v, block["attention_norm.scale"], c.norm_eps) for v in x
        ]
        heads = {
            part: [
                (v @ block[f"attention.{part}.kernel"]).reshape(-1, c.head_dim)
                for v in normed
            ]
            for part in ("query", "key", "value")
        }
        for part in ("query", "key"):
            heads[part] = [
                np.stack([rope_oracle(head, t, c.rope_base) for head in token])
                for t, token in enumerate(heads[part])
            ]
        for t in range(len(tokens)):
            out = []
            for head in range(c.num_heads):
                logits = np.array(
                    [
                        heads["query"][t][head] @ heads["key"][s][head // group]
                        for s in range(t + 1)
                    ]
                ) / np.sqrt(c.head_dim)
                p = np.exp(logits - logits.max())
                p /= p.sum()
                out.append(
                    sum(p[s] * heads["value"][s][head // group] for s in range(t + 1))
                )
            x[t] = x[t] + np.concatenate(out) @ block["attention.out.kernel"]
        for t in range(len(tokens)):
            v = rms_norm_oracle(x[t], block["ffn_norm.scale"], c.norm_eps)
            gate = v @ block["ffn.gate.kernel"]
            hidden = gate / (1 + np.exp(-gate)) * (v @ block["ffn.up.kernel"])
            x[t] = x[t] + hidden @ block["ffn.down.kernel"]
    head = w["embed.embedding"].T if c.tie_embeddings else w["head.kernel"]
    return np.stack([rms_norm_oracle(v, w["norm.scale"], c.norm_eps) @ head for v in x])


class DecoderTest(parameterized.TestCase):
    @parameterized.product(num_kv_heads=[1, 2, 4], tie_embeddings=[True, False])
    def test_equals_the_oracle(self, num_kv_heads, tie_embeddings):
        config = dataclasses.replace(
            SMALL, num_kv_heads=num_kv_heads, tie_embeddings=tie_embeddings
        )
        model = make(config)
        got = nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS)
        for row, tokens in zip(got, TOKENS, strict=True):
            want = decoder_oracle(weights_of(model), config, tokens)
            np.testing.assert_allclose(row, want, rtol=1e-4, atol=1e-5)

    @parameterized.parameters((0, 3), (2, 0))
    @pytest.mark.once
    def test_of_no_tokens_there_are_no_logits(self, *shape):
        logits = make(SMALL)(np.zeros(shape, np.int32))
        self.assertEqual(logits.shape, (*shape, 11))

    def test_the_past_does_not_see_the_future(self):
        model = make(SMALL)
        changed = TOKENS.copy()
        changed[:, 3] = (changed[:, 3] + 1) % 11
        before, after = model(TOKENS), model(changed)
        np.testing.assert_array_equal(before[:, :3], after[:, :3])
        self.assertTrue((before[:, 3:] != after[:, 3:]).any())

    @pytest.mark.once
    def test_only_distances_count(self):
        model = make(SMALL)
        positions = np.broadcast_to(np.arange(5), TOKENS.shape)
        np.testing.assert_array_equal(model(TOKENS), model(TOKENS, positions))
        shifted = model(TOKENS, positions + 100)
        np.testing.assert_allclose(shifted, model(TOKENS), rtol=1e-4, atol=1e-4)
        stretched = model(TOKENS, positions * 2)
        self.assertGreater(jnp.abs(stretched - model(TOKENS)).max(), 1e-3)

    @parameterized.product(dtype=[jnp.float32, jnp.bfloat16, jnp.float16])
    def test_gradients_are_finite_and_reach_every_leaf(self, dtype):
        config = dataclasses.replace(SMALL, dtype=dtype, param_dtype=dtype)
        graph, params = nnx.split(make(config), nnx.Param)

        def loss(params):
            logits = nnx.merge(graph, params)(TOKENS)
            assert logits.dtype == jnp.float32
            return jax.nn.logsumexp(logits, axis=-1).sum() - logits[..., 0].sum()

        grads = jax.jit(jax.grad(loss))(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            self.assertTrue(jnp.isfinite(grad).all(), path)
            self.assertTrue(grad.any(), path)

    @parameterized.product(
        dtype=[jnp.bfloat16, jnp.float16], param_dtype=[jnp.bfloat16, jnp.float32]
    )
    @pytest.mark.once
    def test_frequent_tokens_lose_no_gradient(self, dtype, param_dtype):
        """4096 ones are 256 when added up in bfloat16, 2048 in float16."""
        config = dataclasses.replace(SMALL, dtype=dtype, param_dtype=param_dtype)
        graph, params = nnx.split(make(config).embed, nnx.Param)
        tokens = np.repeat([[3], [5]], [4096, 1], axis=0)

        def loss(params):
            rows = nnx.merge(graph, params)(tokens)
            assert rows.dtype == dtype
            return rows.sum(dtype=jnp.float32)

        grad = jax.grad(loss)(params)["embedding"][...]
        want = np.zeros((11, SMALL.d_model))
        want[3], want[5] = 4096, 1
        np.testing.assert_array_equal(grad, want)

    @parameterized.parameters(True, False)
    def test_products_of_16_bit_logits_are_of_16_bits(self, tie_embeddings):
        config = dataclasses.replace(
            SMALL, dtype=jnp.bfloat16, tie_embeddings=tie_embeddings
        )
        model = make(config)
        graph, params = nnx.split(model, nnx.Param)
        x = jnp.ones((2, SMALL.d_model), jnp.bfloat16)

        def loss(params, x):
            return jax.nn.logsumexp(nnx.merge(graph, params).logits(x), axis=-1).sum()

        jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x))
        products = [line for line in jaxpr.splitlines() if "dot_general" in line]
        self.assertLen(products, 3)  # forward, and two of the gradient
        kinds = [line.split("=")[0].split(":")[-1].split("[")[0] for line in products]
        self.assertSequenceEqual(kinds, ["f32", "bf16", "bf16"])

    def test_logits_have_a_forward_derivative_in_each_dtype(self):
        """It tells what the gradient does."""
        for dtype in (jnp.float32, jnp.bfloat16):
            model = make(dataclasses.replace(SMALL, dtype=dtype))
            x = jax.random.normal(jax.random.key(0), (2, SMALL.d_model), dtype)
            dx = jax.random.normal(jax.random.key(1), x.shape, dtype)
            of = lambda x, model=model: model.logits(x).std()  # noqa: E731
            _, forward = jax.jvp(of, (x,), (dx,))
            backward = jnp.sum(jax.grad(of)(x).astype(jnp.float32) * dx)
            np.testing.assert_allclose(forward, backward, rtol=0.05, atol=0.02)

    def test_leaves_have_the_names_that_the_methods_know(self):
        config = dataclasses.replace(SMALL, tie_embeddings=False)
        for name, value in weights_of(make(config)).items():
            kind = name.split(".")[-1]
            self.assertEqual(
                {"kernel": 2, "embedding": 2, "scale": 1}[kind], value.ndim
            )

    @parameterized.parameters((jnp.bfloat16, 0.1), (jnp.float16, 0.02))
    def test_16_bits_are_close_to_float32(self, dtype, atol):
        model = make(SMALL)
        low = make(dataclasses.replace(SMALL, dtype=dtype))
        run = nnx.jit(lambda model, tokens: model(tokens))
        np.testing.assert_allclose(run(low, TOKENS), run(model, TOKENS), atol=atol)

    def test_other_layers_come_by_configuration(self):
        class Silent(nnx.Module):
            def __init__(self, *sizes, num_kv_heads, **_):
                self.sizes, self.num_kv_heads = sizes, num_kv_heads

            def __call__(self, x, positions=None):
                return jnp.zeros_like(x)

        config = dataclasses.replace(
            SMALL,
            attention=Silent,
            ffn=functools.partial(nn.GatedFFN, activation=jax.nn.relu),
        )
        model = make(config)
        self.assertEqual(model.blocks[0].attention.sizes, (12, 4))
        self.assertEqual(model.blocks[0].attention.num_kv_heads, 2)
        # Without attention each token is on its own.
        alone = model(TOKENS[:, 2:3])
        np.testing.assert_allclose(model(TOKENS)[:, 2:3], alone, rtol=1e-5, atol=1e-5)

    @pytest.mark.once
    def test_block_sparse_layers_begin_as_dense_ones(self):
        config = dataclasses.replace(
            SMALL, ffn=functools.partial(nn.BlockSparseFFN, block_shape=(4, 4))
        )
        run = nnx.jit(lambda model: model(TOKENS, with_density=True))
        (got, density), (want, _) = run(make(config)), run(make(SMALL))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(density["ffn"], np.ones((2, *TOKENS.shape)))

    def test_dense_spark_and_gemma_3n_layers(self):
        """A tuple has one factory a layer; densities come out by layer and token."""
        spark = functools.partial(nn.SparkFFN, k=5, split=6)
        gemma = functools.partial(nn.SparkFFN, k=5, split=None)
        config = dataclasses.replace(
            SMALL,
            num_layers=3,
            d_ff=60,
            attention=functools.partial(nn.SparkAttention, k=2, split=2),
            ffn=(spark, gemma, nn.GatedFFN),
        )
        model = make(config)
        tokens = np.tile(TOKENS, (4, 4))
        run = nnx.jit(lambda model: model(tokens, with_density=True))
        logits, density = run(model)
        plain = nnx.jit(lambda model: model(tokens))(model)
        np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-6)
        self.assertEqual(set(density), {"attention", "ffn"})
        for name, values in density.items():
            self.assertEqual(values.shape, (3, *tokens.shape), name)
        mean = density["ffn"].mean(axis=(1, 2))
        np.testing.assert_allclose(mean, [5 / 60, 5 / 60, 1], atol=0.03)
        attended = density["attention"].mean(axis=(0, 1))
        np.testing.assert_array_equal(attended[:2], [1, 1])  # two are in sight
        self.assertLess(attended[-1], 0.3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rope_base", 0.0, "`rope_base` must be positive and finite; got 0.0"),
        ("norm_eps", float("nan"), "`norm_eps` must be positive and finite; got nan"),
        ("num_layers", 0, "`num_layers` must be at least 1; got 0"),
        ("num_kv_heads", 3, "num_kv_heads=3 and num_heads=4"),
        ("head_dim", 5, "`head_dim` must be even"),
        ("ffn", (nn.GatedFFN,), "`ffn` must have one factory for each of the 2 layers"),
    ],
)
def test_bad_configurations_raise(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_ff", 20.0, "`d_ff` must be an integer; got 20.0"),
        ("ffn", [nn.GatedFFN] * 2, r"`ffn` must be a factory.* or a tuple.*got \[<cl"),
        ("attention", (nn.Attention, None), "`attention` must be a factory"),
    ],
)
def test_configurations_of_another_kind_raise(field, value, message):
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize("tokens", [TOKENS[0], TOKENS[None]], ids=["1d", "3d"])
@pytest.mark.parametrize(
    "attention", [nn.Attention, functools.partial(nn.SparkAttention, k=2, split=2)]
)
def test_tokens_of_other_axes_raise(attention, tokens):
    model = make(dataclasses.replace(SMALL, attention=attention))
    with pytest.raises(ValueError, match=r"`tokens` must be \[batch, seq\]; got shape"):
        model(tokens)

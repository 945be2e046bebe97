"""Decoding with a cache, sparse or dense, equals the whole forward at every token."""

import dataclasses
import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sparsejax import decode, models, nn, ops
from sparsejax.decode import _layers

CONFIG = models.DecoderConfig(
    vocab_size=31,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=192,
)
SPARK = {
    "ffn": functools.partial(nn.SparkFFN, k=15, split=16),
    "attention": functools.partial(nn.SparkAttention, k=4, split=4),
}
KINDS = {
    "dense": {},
    "spark": SPARK,
    "spark_window": SPARK
    | {"attention": functools.partial(nn.SparkAttention, k=3, split=4, window=11)},
    "gemma": {
        "ffn": (functools.partial(nn.SparkFFN, k=10, split=None), nn.GatedFFN),
        "attention": functools.partial(nn.Attention, window=9),
    },
}


@functools.cache
def made(kind):
    config = dataclasses.replace(CONFIG, **KINDS[kind])

    @nnx.jit
    def create():
        model = models.Decoder(config, rngs=nnx.Rngs(0))
        # larger weights, so that tokens differ more
        nnx.update(model, jax.tree.map(lambda x: 1.5 * x, nnx.state(model, nnx.Param)))
        return model

    return nnx.split(create())


def make(kind):
    return nnx.merge(*made(kind))


def prompts(batch=3, seq=20):
    return jax.random.randint(jax.random.key(5), (batch, seq), 0, 31)


prefill = jax.jit(decode.prefill, static_argnames="num_slots")
whole = nnx.jit(lambda model, tokens: model(tokens))


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


class StepTest(parameterized.TestCase):
    @parameterized.product(kind=list(KINDS), sparse=[True, False])
    def test_logits_equal_the_whole_forward(self, kind, sparse):
        """Each token is appended by itself; prompts of different lengths."""
        model = make(kind)
        tokens, lengths = prompts(), jnp.array([1, 7, 12])
        want = np.asarray(whole(model, tokens))
        ready = decode.prepare(model, sparse=sparse)
        logits, cache = prefill(ready, tokens[:, :12], lengths, num_slots=20)
        step = jax.jit(
            chex.assert_max_traces(decode.decode_step, n=1), donate_argnums=2
        )
        rows = np.arange(3)
        for i in range(8):
            at = np.asarray(lengths) + i
            assert_close(logits, want[rows, at - 1])
            logits, cache, _ = step(ready, tokens[rows, at], cache)
        np.testing.assert_array_equal(cache.lengths, lengths + 8)

    @parameterized.parameters("dense", "spark")
    def test_prompts_are_filled_up_with_anything(self, kind):
        """Also with what is no token, whose embedding is NaN."""
        ready, lengths = decode.prepare(make(kind)), jnp.array([1, 7, 12])
        beyond = jnp.arange(12) >= lengths[:, None]
        want = prefill(ready, prompts(seq=12), lengths, num_slots=20)
        for fill in (31, -1, jnp.iinfo(jnp.int32).max):
            tokens = jnp.where(beyond, fill, prompts(seq=12))
            logits, cache = prefill(ready, tokens, lengths, num_slots=20)
            np.testing.assert_array_equal(logits, want[0])
            chex.assert_tree_all_finite(cache)

    @pytest.mark.once
    def test_overflow_is_counted_and_changes_nothing(self):
        model = make("spark")
        # a quarter of the neurons has the same gate: all of it survives, not k
        kernel = model.blocks[1].ffn.gate.kernel
        kernel[...] = jnp.where(jnp.arange(192) < 48, kernel[...][:, :1], 0)
        tokens = prompts()
        want = np.asarray(whole(model, tokens))[:, -1]
        got = []
        for sparse, factor in ((True, 1.0), (True, np.inf), (False, 1.0)):
            ready = decode.prepare(model, sparse=sparse, capacity_factor=factor)
            _, cache = prefill(ready, tokens[:, :19], jnp.full(3, 19), num_slots=20)
            logits, _, overflows = jax.jit(decode.decode_step)(
                ready, tokens[:, 19], cache
            )
            assert_close(logits, want)
            got.append(overflows.ffn.tolist())
        self.assertEqual(got[0][1], 1)
        self.assertEqual(got[1:], [[0, 0], [0, 0]])

    def test_with_a_kernel_there_is_room_for_all(self):
        """Nothing overflows then; here dense products take the kernel's place."""
        ffn = make("spark").blocks[0].ffn
        kernel = ffn.gate.kernel
        kernel[...] = jnp.where(jnp.arange(192) < 48, kernel[...][:, :1], 0)
        up = ffn.up.kernel[...].T
        x = jax.random.normal(jax.random.key(0), (2, 32))
        _, overflowed = _layers.active_ffn(ffn, up, x, factor=1.0)
        self.assertEqual(int(overflowed), 1)
        with mock.patch.object(ops, "has_gated_ffn_kernel", return_value=True):
            got, overflowed = _layers.active_ffn(ffn, up, x, factor=1.0)
        self.assertEqual(int(overflowed), 0)
        np.testing.assert_allclose(got, ffn(x), rtol=1e-4, atol=1e-5)

    def test_a_kernel_finds_the_neurons_that_the_layer_uses(self):
        """By a threshold, or by the gate if its activation is none for a kernel."""

        def has_kernel(*operands, activation=None):
            return activation is not jnp.sin

        options = {"k": 15, "split": 16, "rngs": nnx.Rngs(0)}
        x = jax.random.normal(jax.random.key(0), (2, 32))
        for ffn, by_threshold in (
            (nn.SparkFFN(32, 192, **options), True),
            (nn.SparkFFN(32, 192, activation=jnp.sin, **options), False),
        ):
            with (
                mock.patch.object(ops, "has_gated_ffn_kernel", has_kernel),
                mock.patch.object(ops, "gated_ffn", wraps=ops.gated_ffn) as gated,
            ):
                got, _ = _layers.active_ffn(ffn, ffn.up.kernel[...].T, x, factor=1.0)
            self.assertEqual("threshold" in gated.call_args.kwargs, by_threshold)
            np.testing.assert_allclose(got, ffn(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.once
    def test_a_batch_that_uses_most_neurons_is_computed_densely(self):
        ffn = make("spark").blocks[0].ffn
        x = jax.random.normal(jax.random.key(0), (8, 32))
        nothing = jnp.full((192, 16), jnp.nan)
        got, overflowed = _layers.active_ffn(ffn, nothing, x, factor=1.0)
        self.assertEqual(int(overflowed), 0)
        np.testing.assert_allclose(got, ffn(x), rtol=1e-4, atol=1e-5)

    def test_reads_few_neurons(self):
        """Rows of neurons that are not active may hold anything."""
        model = make("spark")
        x = jax.random.normal(jax.random.key(0), (1, 32))
        ffn = model.blocks[0].ffn
        idle = np.asarray(ffn.gate_values(x) == 0)[0]
        self.assertGreater(idle.mean(), 0.85)
        want = ffn(x)
        ready = decode.prepare(model, capacity_factor=2)
        up = jnp.where(idle[:, None], jnp.nan, ready.up[0])
        got, overflowed = _layers.active_ffn(ffn, up, x, factor=2.0)
        self.assertEqual(int(overflowed), 0)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    @pytest.mark.once
    @parameterized.parameters(
        (1024, "cpu", True), (1024, "cuda", False), (2**19, "cuda", True)
    )
    def test_a_gpu_reads_a_short_cache_whole(self, slots, platform, gathers):
        """By the platform that the program is lowered for; also inside of a map."""
        layer = make("spark").blocks[0].attention
        cached = jax.ShapeDtypeStruct((2, slots, 2, 8), jnp.float32)
        query = jax.ShapeDtypeStruct((2, 1, 4, 8), jnp.float32)
        valid = jax.ShapeDtypeStruct((2, 1, 1, slots), jnp.bool_)

        def attend(*operands):
            y, overflow = _layers.gathered_attention(layer, *operands, factor=2.0)
            return y, overflow[None]

        rows = P("rows")
        mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(attend, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows)
        exported = jax.export.export(jax.jit(mapped), platforms=[platform])
        text = exported(query, cached, cached, valid).mlir_module()
        self.assertEqual("stablehlo.gather" in text, gathers)


def greedy_oracle(model, tokens, lengths, num_tokens):
    """The whole forward again for each token."""
    out = []
    for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True):
        text = list(row[:length])
        for _ in range(num_tokens):
            padded = np.zeros((1, 32), int)
            padded[0, : len(text)] = text
            text.append(int(whole(model, padded)[0, len(text) - 1].argmax()))
        out.append(text[length:])
    return np.array(out)


class GenerateTest(parameterized.TestCase):
    @parameterized.product(kind=["dense", "spark"])
    def test_greedy_token_for_token(self, kind):
        model = make(kind)
        lengths = jnp.array([20, 3, 9])
        want = greedy_oracle(model, prompts(), lengths, 10)
        for sparse in (True, False):
            ready = decode.prepare(model, sparse=sparse)
            got = decode.generate(ready, prompts(), lengths, num_tokens=10)
            np.testing.assert_array_equal(got.tokens, want)
            self.assertEqual(got.overflows.ffn.shape, (2,))

    def test_sampling(self):
        ready = decode.prepare(make("spark"))
        first = prompts(batch=1)
        many = jnp.tile(first, (400, 1))
        draw = functools.partial(decode.generate, prompts=many, num_tokens=1)
        key = jax.random.key(0)
        tokens = np.asarray(draw(ready, temperature=2.0, key=key).tokens)[:, 0]
        again = np.asarray(draw(ready, temperature=2.0, key=key).tokens)[:, 0]
        np.testing.assert_array_equal(tokens, again)
        logits = np.asarray(whole(make("spark"), first))[0, -1].astype(np.float64)
        p = np.exp((logits - logits.max()) / 2)
        p /= p.sum()
        freq = np.bincount(tokens, minlength=31) / 400
        self.assertLess(np.abs(freq - p).max(), 4 * np.sqrt(p * (1 - p) / 400).max())
        best = np.argsort(-logits)[:3]
        few = np.asarray(draw(ready, temperature=5.0, top_k=3, key=key).tokens)[:, 0]
        self.assertEqual(set(few), set(best))
        tied = make("spark")
        tied.norm.scale[...] = jnp.zeros(32)  # all logits are 0
        tied = draw(decode.prepare(tied), temperature=5.0, top_k=3, key=key).tokens
        self.assertEqual(set(np.unique(tied)), {0, 1, 2})
        cold = np.asarray(draw(ready, temperature=1e-4, key=key).tokens)
        np.testing.assert_array_equal(cold, np.full((400, 1), best[0]))

    @pytest.mark.once
    def test_a_stop_token_is_repeated(self):
        ready = decode.prepare(make("dense"))
        free = np.asarray(decode.generate(ready, prompts(), num_tokens=12).tokens)
        stop = int(free[0, 4])
        got = np.asarray(
            decode.generate(ready, prompts(), num_tokens=12, stop_token=stop).tokens
        )
        for row, want in zip(got, free, strict=True):
            end = list(want).index(stop) + 1 if stop in want else 12
            np.testing.assert_array_equal(row[:end], want[:end])
            np.testing.assert_array_equal(row[end:], np.full(12 - end, stop))

    def test_several_stop_tokens(self):
        """The one that comes first is repeated."""
        ready = decode.prepare(make("dense"))
        free = np.asarray(decode.generate(ready, prompts(), num_tokens=12).tokens)
        stops = [int(free[0, 4]), int(free[1, 2])]
        for given in (stops, tuple(stops), np.array(stops), jnp.array(stops)):
            got = decode.generate(ready, prompts(), num_tokens=12, stop_token=given)
            for row, want in zip(np.asarray(got.tokens), free, strict=True):
                end = next((i for i, t in enumerate(want) if t in stops), 11) + 1
                np.testing.assert_array_equal(row[:end], want[:end])
                np.testing.assert_array_equal(row[end:], want[end - 1])

    @parameterized.product(temperature=[1e-30, 1e-39, 1e-60], top_k=[None, 3])
    def test_of_a_tiny_temperature_the_likeliest_are_left(self, temperature, top_k):
        ready = decode.prepare(make("dense"))
        want = decode.generate(ready, prompts(), num_tokens=4).tokens
        options = {"temperature": temperature, "top_k": top_k}
        got = decode.generate(
            ready, prompts(), num_tokens=4, key=jax.random.key(0), **options
        )
        np.testing.assert_array_equal(got.tokens, want)

    @parameterized.parameters("ffn", "attention")
    def test_what_a_subclass_computes_is_decoded(self, which):
        class Tripled(nn.SparkFFN):
            def hidden(self, *args, **options):
                return 3 * super().hidden(*args, **options)

        class Turned(nn.SparkAttention):
            def attend(self, query, key, value, *args, **options):
                y, density = super().attend(query, key, value, *args, **options)
                return -y, density

        class OwnFFN(nnx.Module):
            """Takes a sequence, as the decoder gives it."""

            def __init__(self, d_model, d_ff, *, rngs, **options):
                del d_ff, options
                self.kernel = nnx.Param(rngs.params.normal((d_model, d_model)))

            def __call__(self, x):
                _, _, d_model = x.shape
                return x @ self.kernel[...] / d_model

        changed = {
            "ffn": (functools.partial(Tripled, k=15, split=16), OwnFFN),
            "attention": functools.partial(Turned, k=4, split=4),
        }[which]
        config = dataclasses.replace(CONFIG, **SPARK | {which: changed})
        model = models.Decoder(config, rngs=nnx.Rngs(0))
        tokens, lengths = prompts(seq=8), jnp.full(3, 6)
        want = np.asarray(whole(model, tokens))
        ready, step = decode.prepare(model), jax.jit(decode.decode_step)
        logits, cache = prefill(ready, tokens[:, :6], lengths, num_slots=8)
        for at in (6, 7):
            assert_close(logits, want[:, at - 1])
            logits, cache, _ = step(ready, tokens[:, at], cache)

    def test_projections_are_joined_in_a_copy(self):
        model = make("spark")
        before = nnx.to_pure_dict(nnx.state(model))
        ready = decode.prepare(model)
        chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
        x = jax.random.normal(jax.random.key(0), (2, 5, model.config.d_model))
        for own, block in zip(model.blocks, ready.decoder().blocks, strict=True):
            joined = block.attention
            self.assertTrue(joined.is_joined)
            self.assertFalse(own.attention.is_joined)
            self.assertFalse(hasattr(joined, "query"))
            want = own.attention.unrotated(x)
            chex.assert_trees_all_close(joined.unrotated(x), want, rtol=1e-5, atol=1e-5)
            joined.join()  # once more changes nothing
            chex.assert_trees_all_close(joined.unrotated(x), want, rtol=1e-5, atol=1e-5)

    def test_bfloat16_over_float32_weights(self):
        config = dataclasses.replace(CONFIG, **SPARK, num_layers=1, dtype=jnp.bfloat16)
        model = nnx.jit(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))()
        ready = decode.prepare(model)
        dtypes = jax.tree.map(lambda x: x.dtype, (ready.state, ready.up))
        self.assertEqual(
            set(jax.tree.leaves(dtypes)), {jnp.dtype("float32"), jnp.dtype("bfloat16")}
        )
        lengths = jnp.full(3, 20)
        got, _ = prefill(ready, prompts(), lengths, num_slots=20)
        want = np.asarray(whole(model, prompts())[:, -1])
        np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())
        out = decode.generate(ready, prompts(), num_tokens=4)
        self.assertEqual(out.tokens.dtype, jnp.int32)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "`num_tokens` must be at least 1; got 0"),
        ({"num_tokens": 2.0}, "`num_tokens` must be a Python int; got 2.0"),
        ({"top_k": 3.0}, "`top_k` must be a Python int; got 3.0"),
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"temperature": 1.0}, "`key` is needed to draw tokens"),
        ({"top_k": 32}, r"`top_k` must be in \[1, 31\]; got 32"),
        ({"top_k": 5}, r"`top_k` is for drawing .*pass `temperature=1.0`"),
        ({"key": jax.random.key(0)}, r"`key` is for drawing .*leave `key` out"),
        ({"prompts": prompts() + 8}, r"in \[0, 31\); got \d+ at \[\d, \d+\]"),
        ({"prompts": prompts() - 31}, r"in \[0, 31\); got -\d+ at \[0, 0\]"),
        ({"lengths": jnp.array([1, 2])}, "`lengths` must be one integer, or .* of 3 "),
        (
            {"lengths": jnp.array([1, 0, 3])},
            r"in \[1, 20\]; got 0 for sequence 1",
        ),
        ({"lengths": jnp.array([1, 21, 3])}, r"must be in \[1, 20\]"),
        ({"prompts": jnp.zeros((3, 0), int)}, r"`prompts` must be \[batch, seq\]"),
        ({"stop_token": 31}, r"`stop_token` must be a token, in \[0, 31\), .* got 31"),
        ({"stop_token": [2, -1]}, r"`stop_token` must .* got -1"),
        ({"stop_token": 1.5}, r"`stop_token` must .* got 1.5"),
    ],
)
def test_bad_input_raises(options, message):
    ready = decode.prepare(make("spark"))
    error = TypeError if "Python int" in message else ValueError
    with pytest.raises(error, match=message):
        decode.generate(ready, **{"prompts": prompts(), "num_tokens": 2} | options)


@pytest.mark.once
def test_what_fills_up_a_prompt_may_be_anything():
    """And a temperature of 0 that is given may have what is for others."""
    ready, lengths = decode.prepare(make("dense")), jnp.array([20, 3, 7])
    filled = jnp.where(jnp.arange(20) < lengths[:, None], prompts(), 999)
    options = {"temperature": 0.0, "top_k": 3, "key": jax.random.key(0)}
    got = decode.generate(ready, filled, lengths, num_tokens=3, **options)
    want = decode.generate(ready, prompts(), lengths, num_tokens=3)
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.once
def test_too_little_room_raises():
    with pytest.raises(ValueError, match="`capacity_factor` must be at least 1; got 0"):
        decode.prepare(make("spark"), capacity_factor=0.5)
    ready = decode.prepare(make("spark"))
    with pytest.raises(ValueError, match="`num_slots` must be at least 20, those"):
        decode.prefill(ready, prompts(), jnp.full(3, 20), num_slots=19)


@pytest.mark.once
def test_what_is_no_model_and_no_token_raises():
    with pytest.raises(TypeError, match=r"an `sj\.models\.Decoder`; got Linear"):
        decode.prepare(nnx.Linear(8, 16, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"`sj\.decode\.prepare`; got a Decoder"):
        decode.generate(make("spark"), prompts(), num_tokens=2)
    ready, floats = decode.prepare(make("spark")), prompts().astype(float)
    with pytest.raises(TypeError, match=r"`prompts` must be integers; got float32"):
        decode.generate(ready, floats, num_tokens=2)


@pytest.mark.once
def test_attention_that_cannot_decode_is_named():
    class Short(nn.Attention):
        def attend(self, query, key, value, valid=None):
            return super().attend(query, key, value, valid)

    class Other(nnx.Module):
        def __init__(self, *args, **options):
            pass

    class Scaled(nn.Attention):
        def mix(self, x, positions, **options):
            return super().mix(2 * x, positions, **options)

    class Grand(Scaled):
        pass

    class Doubled:
        def __call__(self, x, *args, **options):
            return super().__call__(2 * x, *args, **options)

    class Mixed(Doubled, nn.SparkAttention):
        pass

    class Declared(Scaled):
        decodes = True

    for attention, message in [
        (Scaled, r"a Scaled in blocks\.0, which overrides .*`decodes = True`"),
        (
            functools.partial(Mixed, **SPARK["attention"].keywords),
            r"a Mixed in blocks\.0, which overrides",
        ),
        (Grand, r"a Grand in blocks\.0, which overrides"),
        (Short, r"`attend` must take `lengths`.* Short in blocks\.0 does not"),
        (
            (nn.Attention, Other),
            r"a subclass of `sj\.nn\.Attention`.*Other in blocks\.1",
        ),
    ]:
        config = dataclasses.replace(CONFIG, attention=attention)
        with pytest.raises(TypeError, match=message):
            decode.prepare(models.Decoder(config, rngs=nnx.Rngs(0)))
    config = dataclasses.replace(CONFIG, attention=Declared)
    decode.prepare(models.Decoder(config, rngs=nnx.Rngs(0)))


def biased(d_in, d_out):
    layer = nnx.Linear(d_in, d_out, rngs=nnx.Rngs(1))
    layer.bias[...] = jnp.ones(d_out)
    return layer


def replaced(part):
    """A model in which another layer stands at that place."""
    config = dataclasses.replace(CONFIG, **SPARK, tie_embeddings=False)
    owner = model = models.Decoder(config, rngs=nnx.Rngs(0))
    if part in ("up", "down"):
        owner = model.blocks[0].ffn
    elif part in ("query", "value"):
        owner = model.blocks[0].attention
    old = getattr(owner, part)
    new = biased(old.in_features, old.out_features)
    if part == "value":
        lora = {"lora_rank": 2, "use_bias": False, "rngs": nnx.Rngs(1)}
        new = nnx.LoRALinear(old.in_features, old.out_features, **lora)
        new.lora.lora_b[...] = jnp.ones((2, old.out_features))
    setattr(owner, part, new)
    return model


@pytest.mark.parametrize("part", ["query", "value", "up", "down", "head"])
@pytest.mark.once
def test_layers_that_a_user_put_there_are_computed(part):
    model, tokens = replaced(part), prompts()[:, :8]
    lengths, ready = jnp.full(len(tokens), 7), decode.prepare(model)
    _, cache = decode.prefill(ready, tokens[:, :7], lengths, num_slots=8)
    logits, _, _ = decode.decode_step(ready, tokens[:, 7], cache)
    np.testing.assert_allclose(logits, model(tokens)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.once
def test_weights_that_a_layer_does_not_cast_stay():
    """Integers, and those of a layer that computes in another dtype."""

    class Other(nn.GatedFFN):
        def __init__(self, *args, dtype, **options):
            super().__init__(*args, dtype=jnp.float32, **options)
            self.kernel = nnx.Variable(jnp.arange(3))

        def __call__(self, x, **options):
            return super().__call__(x, **options).astype(x.dtype)

    config = dataclasses.replace(CONFIG, ffn=Other, dtype=jnp.bfloat16)
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    block = decode.prepare(model).decoder().blocks[0]
    assert block.ffn.kernel.dtype == jnp.int32
    assert block.ffn.down.kernel.dtype == jnp.float32
    assert block.attention.out.kernel.dtype == jnp.bfloat16


def test_each_step_draws_anew():
    options = {"temperature": 1e6, "key": jax.random.key(0)}  # nearly uniform
    ready = decode.prepare(make("dense"))
    tokens = decode.generate(ready, prompts(), num_tokens=8, **options).tokens
    assert min(len(np.unique(row)) for row in tokens) > 2


def test_a_layer_that_projects_in_its_own_way_is_decoded():
    class Own(nn.Attention):
        def unrotated(self, x):
            heads = (*x.shape[:2], -1, self.head_dim)
            parts = self.query(x), self.key(x), self.value(x)
            query, key, value = (part.reshape(heads) for part in parts)
            return 2 * query, key, value

    config = dataclasses.replace(CONFIG, attention=Own)
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    tokens, lengths = prompts()[:, :8], jnp.full(3, 7)
    ready = decode.prepare(model)
    _, cache = decode.prefill(ready, tokens[:, :7], lengths, num_slots=8)
    logits, _, _ = decode.decode_step(ready, tokens[:, 7], cache)
    np.testing.assert_allclose(logits, model(tokens)[:, -1], rtol=1e-4, atol=1e-4)

"""The SeerAttention layer: dense without a selection, gated with one, and trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

import sparsejax as sj
from sparsejax import attention, models, nn, ops
from tests.nn import attending
from tests.nn.attending import SEQ, inputs, value_and_grads

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all is compilation

BLOCK = 4
topk = functools.partial(attention.seer_topk, num_kept=3, dense_last_rows=1)
threshold = functools.partial(
    attention.seer_threshold, threshold=0.2, dense_last_rows=0
)


make = functools.partial(attending.make, nn.SeerAttention, block=BLOCK)


class SeerAttentionTest(parameterized.TestCase):
    @parameterized.parameters(
        None,
        functools.partial(attention.seer_topk, num_kept=8, dense_last_rows=0),
        functools.partial(attention.seer_threshold, threshold=0.0),
    )
    def test_all_blocks_equal_dense_attention(self, select):
        value, grads = value_and_grads(make(select=select))
        want, want_grads = value_and_grads(attending.make(nn.Attention))
        of_gate = nnx.pop(grads, nn.GateParam)
        for a, b in zip(
            jax.tree.leaves((value, grads)),
            jax.tree.leaves((want, want_grads)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        for leaf in jax.tree.leaves(of_gate):
            np.testing.assert_array_equal(leaf, 0)

    @parameterized.product(select=[topk, threshold], d_gate=[8, 6])
    def test_equals_attention_under_the_mask(self, select, d_gate):
        layer = make(select=select, d_gate=d_gate)
        layer.gate_key[...] *= 50

        @nnx.jit
        def both(layer):
            x, positions = inputs()
            y, density = layer(x, positions, with_density=True)
            query, key, _ = layer.unrotated(x)
            scores = attention.seer_scores(
                layer.gate(),
                query,
                key,
                block=BLOCK,
                rotate=functools.partial(nn.apply_rope, base=10_000.0),
            )
            kept = select(scores, block=BLOCK).to_dense()[..., :SEQ, :SEQ]
            kept &= jnp.tri(SEQ, dtype=bool)
            query, key, value = layer.project(x, positions)
            dense = jax.nn.dot_product_attention(query, key, value, mask=kept)
            share = kept.sum(-1).mean(1) / (1 + jnp.arange(SEQ))
            return (y, density), (layer.combine(dense), share)

        got, want = both(layer)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert got[1][:, 16:20].max() < 1

    def test_loss_is_the_pure_functions(self):
        layer = make(distill=True)

        @nnx.jit
        def both(layer):
            x, positions = inputs()
            layer(x, positions)
            query, key, _ = layer.project(x, positions)
            want = attention.seer_loss(
                layer.scores(x, positions),
                attention.seer_target(query, key, block=BLOCK),
            )
            return nn.pop_gate_losses(layer), want

        (got,), want = both(layer)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        with pytest.raises(ValueError, match="no layer of `model` left a gate loss"):
            nn.pop_gate_losses(layer)

    def test_losses_of_scanned_layers(self):
        class Stack(nnx.Module):
            def __init__(self, rngs):
                @nnx.vmap(in_axes=0)
                def build(rngs):
                    return nn.SeerAttention(32, 2, block=BLOCK, distill=True, rngs=rngs)

                self.layers = build(rngs.split(3))
                self.last = nn.SeerAttention(
                    32, 2, block=BLOCK, distill=True, rngs=rngs
                )

            def __call__(self, x, positions):
                @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
                def run(layer, x):
                    return x + layer(x, positions)

                return self.last(run(self.layers, x), positions)

        x = jax.random.normal(jax.random.key(0), (1, 16, 32))
        model = Stack(nnx.Rngs(0))
        model(x, jnp.arange(16)[None])
        losses = nn.pop_gate_losses(model)
        self.assertEqual(losses.shape, (4,))
        self.assertTrue((losses > 0).all())

    def test_filler_has_no_part(self):
        """Outputs, gradients and the gate's loss, with the last rows kept dense."""
        lengths = jnp.array([SEQ, 16])
        layer = make(select=topk, distill=True)

        def run(layer, x, lengths):
            y = layer(x, jnp.arange(x.shape[1])[None], lengths=lengths)
            return y, nn.pop_gate_losses(layer)

        x, _ = inputs()
        other = x.at[1, 16:].set(7.0)
        (y, loss), (y_other, loss_other) = (
            nnx.jit(run)(layer, a, lengths) for a in (x, other)
        )
        np.testing.assert_array_equal(y[0], y_other[0])
        np.testing.assert_array_equal(y[1, :16], y_other[1, :16])
        np.testing.assert_array_equal(loss, loss_other)
        alone, of_alone = nnx.jit(run)(layer, x[1:, :16], None)
        np.testing.assert_allclose(y[1:, :16], alone, rtol=1e-5, atol=1e-6)
        _, of_first = nnx.jit(run)(layer, x[:1, : SEQ // BLOCK * BLOCK], None)
        rows = np.array([SEQ // BLOCK, 16 // BLOCK])
        rows -= (0.25 * rows).astype(int)
        want = np.average([of_first[0], of_alone[0]], weights=rows)
        np.testing.assert_allclose(loss[0], want, rtol=1e-5)

    def test_bad_input_is_named(self):
        def called(**options):
            return nnx.eval_shape(lambda: make(**options)(*inputs()))

        assert called(block=31).shape == (2, SEQ, 16)  # no gate is needed
        for options, message in [
            ({"block": 31, "select": topk}, r"`block` must be in \[1, 30\].*got 31"),
            ({"block": 0}, "`block` must be at least 1; got 0"),
            ({"d_gate": 3}, r"`d_gate` even.*d_gate=3"),
            (
                {"select": functools.partial(topk, num_kept=9)},
                r"in \[1, 8\].*got 9. Lower the budget",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                called(**options)


def decoder(**options):
    config = models.DecoderConfig(
        vocab_size=8,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=16,
        attention=functools.partial(nn.SeerAttention, block=BLOCK, **options),
    )
    return nnx.split(models.Decoder(config, rngs=nnx.Rngs(0)), nn.GateParam, nnx.Param)


def tokens():
    """Each sequence repeats its own half, so that attention has somewhere to go."""
    half = np.random.default_rng(0).integers(8, size=(4, 16))
    return jnp.asarray(np.concatenate([half, half], axis=1))


def language_loss(logits):
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_p, tokens()[:, 1:, None], axis=-1).mean()


def recalled_masses(model):
    """Share of the first layer's attention in the blocks that are selected, by what."""
    block, ids = model.blocks[0], tokens()
    layer, x = block.attention, block.attention_norm(model.embed(ids))
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    query, key, value = layer.project(x, positions)
    attend = functools.partial(ops.block_attention, causal=True, with_lse=True)
    _, every = attend(query, key, value)

    def mass(scores):
        in_sight = jnp.tri(scores.shape[-1], dtype=bool)
        scores = jnp.where(in_sight, scores, -jnp.inf)
        found = []
        for num_kept in (2, 3, 4):
            mask = topk(scores, num_kept=num_kept, block=BLOCK, dense_last_rows=0)
            _, kept = attend(query, key, value, mask)
            found.append(jnp.exp(kept - every)[:, 16:].mean())
        return jnp.array(found)

    scores = layer.scores(x, positions)
    pooled = attention.block_scores(
        query, key, block_shape=(BLOCK, BLOCK), per_head=True
    )
    noise = jax.random.uniform(jax.random.key(0), scores.shape)
    return mass(scores), mass(pooled), mass(noise)


def adam(params, grads, moments, step, rate):
    m, v = (
        jax.tree.map(lambda a, g, b=b, p=p: b * a + (1 - b) * g**p, old, grads)
        for old, b, p in zip(moments, (0.9, 0.99), (1, 2), strict=True)
    )

    def move(w, m, v):
        m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.99 ** (step + 1))
        return w - rate * m / (jnp.sqrt(v) + 1e-8)

    return jax.tree.map(move, params, m, v), (m, v)


def test_distilled_into_a_frozen_model():
    """The gate learns from its gradients alone, which do not reach the model."""
    graph, gate, rest = decoder(distill=True)
    rest = jax.tree.map(lambda w: 3 * w, rest)  # sharper attention

    def loss(gate, rest):
        model = nnx.merge(graph, gate, rest)
        model(tokens())
        return nn.pop_gate_losses(model).sum()

    @jax.jit
    def train(gate, rest):
        of_rest = jax.grad(loss, argnums=1)(gate, rest)

        def step(carry, at):
            gate, moments = carry
            value, grads = jax.value_and_grad(loss)(gate, rest)
            return adam(gate, grads, moments, at, 1e-2), value

        zeros = jax.tree.map(jnp.zeros_like, gate)
        (trained, _), losses = jax.lax.scan(
            step, (gate, (zeros, zeros)), jnp.arange(60)
        )
        masses = [recalled_masses(nnx.merge(graph, g, rest)) for g in (gate, trained)]
        return of_rest, losses, masses, trained

    of_rest, losses, (before, after), trained = train(gate, rest)
    for leaf in jax.tree.leaves(of_rest):
        np.testing.assert_array_equal(leaf, 0)
    for old, new in zip(jax.tree.leaves(gate), jax.tree.leaves(trained), strict=True):
        assert jnp.all(old != new)
    assert losses[-1] < 0.6 * losses[0]
    recalled, *others = after
    for other in (before[0], *others):
        assert jnp.all(recalled > other + 0.02)


@pytest.mark.once
def test_trained_from_scratch():
    """One step of both losses: the model learns its task, the gate the model."""
    graph, gate, rest = decoder(distill=True, select=topk)

    def loss(params):
        model = nnx.merge(graph, *params)
        logits, densities = model(tokens(), with_density=True)
        own, of_gate = language_loss(logits), nn.pop_gate_losses(model).sum()
        return own + of_gate, (own, of_gate, densities["attention"])

    def language_alone(params):
        return language_loss(nnx.merge(graph, *params)(tokens()))

    @jax.jit
    def train(params):
        (of_gate, of_rest) = jax.grad(language_alone)(params)
        both = jax.grad(loss, has_aux=True)(params)[0]

        def step(carry, at):
            params, moments = carry
            grads, found = jax.grad(loss, has_aux=True)(params)
            return adam(params, grads, moments, at, 1e-2), found

        zeros = jax.tree.map(jnp.zeros_like, params)
        _, found = jax.lax.scan(step, (params, (zeros, zeros)), jnp.arange(40))
        return of_gate, of_rest, both, found

    of_gate, of_rest, both, (own, gates, densities) = train((gate, rest))
    for leaf in jax.tree.leaves(of_gate):
        np.testing.assert_array_equal(leaf, 0)
    for a, b in zip(jax.tree.leaves(of_rest), jax.tree.leaves(both[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert own[-1] < 0.7 * own[0]
    assert jnp.isfinite(gates).all()
    assert densities[..., 27].max() < 0.5  # the last row before the dense one
    np.testing.assert_array_equal(densities[..., 28:], 1)


def test_weight_methods_leave_the_gate_dense():
    _, gate, rest = decoder()
    names = {
        sj.typing.plain_path(path)[-1]
        for path, _ in jax.tree_util.tree_leaves_with_path(gate)
    }
    assert names == {"gate_key"}
    assert len(jax.tree.leaves(rest)) == 2 * (4 + 3 + 2) + 2


def test_all_weights_have_the_dtype_that_is_asked_for():
    how = dict(num_kv_heads=2, block=4, param_dtype=jnp.bfloat16)
    layer = nn.SeerAttention(16, 4, **how, rngs=nnx.Rngs(0))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}

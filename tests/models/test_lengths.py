"""What fills up a batch has no part in what the decoder says of its sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from sparsejax import attention, models, nn

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all is compilation

LENGTHS = (13, 21, 26)
KINDS = {
    "dense": nn.Attention,
    "blocks": functools.partial(
        nn.BlockAttention,
        select=functools.partial(
            attention.topk_blocks, block_shape=(4, 4), num_kept=2, pool=jnp.max
        ),
    ),
    "pyramid": functools.partial(
        nn.PyramidAttention,
        block_shape=(4, 4),
        bounds=((2, 0.4), (4, 0.7)),
        importance=functools.partial(attention.antidiagonal_importance, stride=4),
    ),
    "seer": functools.partial(
        nn.SeerAttention,
        block=4,
        select=functools.partial(attention.seer_topk, num_kept=2, dense_last_rows=0),
    ),
    "spark": functools.partial(nn.SparkAttention, k=3, split=2),
}


def make(kind):
    config = models.DecoderConfig(
        vocab_size=31,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        d_ff=16,
        attention=KINDS[kind],
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    # larger weights, so that attention and gates are sharp
    nnx.update(model, jax.tree.map(lambda x: 2 * x, nnx.state(model)))
    return model


class LengthsTest(parameterized.TestCase):
    @parameterized.product(kind=list(KINDS), with_density=[False, True])
    def test_alone_or_in_a_batch(self, kind, with_density):
        @nnx.jit
        def run(model, tokens, lengths=None):
            out = model(tokens, lengths=lengths, with_density=with_density)
            return out[0] if with_density else out

        model, rng = make(kind), np.random.default_rng(0)
        real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
        batch = rng.integers(31, size=(2, 3, max(LENGTHS)))  # filled up in two ways
        batch = np.where(real, batch[0], batch)
        got, other = (run(model, x, jnp.array(LENGTHS)) for x in batch)
        np.testing.assert_array_equal(got[real], other[real])
        for row, length in enumerate(LENGTHS):
            want = run(model, batch[0, row : row + 1, :length])[0]
            np.testing.assert_allclose(
                got[row, :length], want, rtol=1e-4, atol=1e-4, err_msg=str(length)
            )

    @parameterized.parameters("blocks", "seer")
    def test_without_lengths_filler_has_a_part(self, kind):
        """So that the test above can fail."""
        model, rng = make(kind), np.random.default_rng(0)
        real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
        batch = rng.integers(31, size=(2, 3, max(LENGTHS)))
        batch = np.where(real, batch[0], batch)
        got, other = map(nnx.jit(lambda model, x: model(x)), (model, model), batch)
        self.assertGreater(np.abs(got - other)[real].max(), 1e-3)

    def test_a_layer_of_a_users_own_need_not_know_them(self):
        class Mean(nnx.Module):
            def __init__(self, *args, **kwargs):
                del args, kwargs

            def __call__(self, x, positions, *, with_density=False):
                y = jnp.cumsum(x, axis=1) / (positions[..., None] + 1)
                return (y, jnp.ones(x.shape[:2])) if with_density else y

        config = models.DecoderConfig(
            vocab_size=7,
            d_model=8,
            num_layers=1,
            num_heads=2,
            d_ff=8,
            attention=Mean,
        )
        model = models.Decoder(config, rngs=nnx.Rngs(0))
        self.assertEqual(model(jnp.zeros((1, 4), jnp.int32)).shape, (1, 4, 7))

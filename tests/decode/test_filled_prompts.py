"""What a prompt gives does not depend on what fills it up, nor on how far."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from sparsejax import attention, decode, models, nn

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all is compilation

LENGTHS = (13, 21, 26)


def of_blocks(select, **options):
    select = functools.partial(select, block_shape=(4, 4), **options)
    return functools.partial(nn.BlockAttention, select=select)


LINES = dict(window=8, sink=1, local=2)
KINDS = {
    "topk": of_blocks(attention.topk_blocks, num_kept=2),
    "statistical": of_blocks(attention.statistical_topk_blocks, k=1.5),
    "block_sparse": of_blocks(attention.block_sparse, num_kept=4),
    "vertical_slash": of_blocks(
        attention.vertical_slash, num_vertical=2, num_slash=2, **LINES
    ),
    "flex_prefill": of_blocks(attention.flex_prefill, alpha=0.2, min_budget=2, **LINES),
    "pyramid": functools.partial(
        nn.PyramidAttention,
        block_shape=(4, 4),
        bounds=((2, 0.4), (4, 0.7)),
        importance=functools.partial(attention.antidiagonal_importance, stride=4),
    ),
    "spark": functools.partial(nn.SparkAttention, k=3, split=2),
}


@functools.cache
def make(kind):
    config = models.DecoderConfig(
        vocab_size=31,
        d_model=16,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        d_ff=16,
        attention=KINDS[kind],
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    # larger weights, so that attention is sharp
    nnx.update(model, jax.tree.map(lambda x: 2 * x, nnx.state(model, nnx.Param)))
    return decode.prepare(model)


prefill = jax.jit(decode.prefill, static_argnames="capacity")


class FilledPromptsTest(parameterized.TestCase):
    @parameterized.product(kind=list(KINDS))
    def test_alone_or_in_a_batch(self, kind):
        model, rng = make(kind), np.random.default_rng(0)
        lengths = jnp.array(LENGTHS)
        batch = rng.integers(31, size=(2, 3, max(LENGTHS)))  # filled up in two ways
        filled = np.arange(max(LENGTHS)) >= np.array(LENGTHS)[:, None]
        batch = np.where(filled, batch, batch[0])
        got, other = (prefill(model, x, lengths, capacity=28)[0] for x in batch)
        np.testing.assert_array_equal(got, other)
        for row, length in enumerate(LENGTHS):
            alone = batch[0, row : row + 1, :length]
            want, _ = prefill(model, alone, jnp.array([length]), capacity=28)
            np.testing.assert_allclose(got[row], want[0], rtol=1e-4, atol=1e-4)

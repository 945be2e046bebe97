"""What fills up a batch has no part in what the decoder says of its sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from sparsejax import attention, nn
from tests import filled

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all is compilation

KINDS = {
    "dense": nn.Attention,
    "blocks": filled.of_blocks(attention.topk_blocks, num_kept=2, pool=jnp.max),
    "pyramid": filled.KINDS["pyramid"],
    "spark": filled.KINDS["spark"],
    "seer": functools.partial(
        nn.SeerAttention,
        block=4,
        select=functools.partial(attention.seer_topk, num_kept=2, dense_last_rows=0),
    ),
}


def make(kind):
    model = filled.make(KINDS[kind], num_layers=2)
    if kind == "seer":  # a gate begins near 0
        gates = nnx.state(model, nn.GateParam)
        nnx.update(model, jax.tree.map(lambda x: 2 * x, gates))
    return model


@functools.cache  # a program for each length, for both cases of a kind
def alone(kind):
    """The logits of each sequence by itself."""
    model, (batch, _) = make(kind), filled.two_ways()
    run = nnx.jit(lambda model, tokens: model(tokens))
    return [
        run(model, batch[0, row : row + 1, :length])[0]
        for row, length in enumerate(filled.LENGTHS)
    ]


class LengthsTest(parameterized.TestCase):
    @parameterized.product(kind=list(KINDS), with_density=[False, True])
    def test_alone_or_in_a_batch(self, kind, with_density):
        @nnx.jit
        def run(model, tokens, lengths):
            out = model(tokens, lengths=lengths, with_density=with_density)
            return out[0] if with_density else out

        model, (batch, real) = make(kind), filled.two_ways()
        got, other = (run(model, x, jnp.array(filled.LENGTHS)) for x in batch)
        np.testing.assert_array_equal(got[real], other[real])
        for row, length in enumerate(filled.LENGTHS):
            want = alone(kind)[row]
            np.testing.assert_allclose(
                got[row, :length], want, rtol=1e-4, atol=1e-4, err_msg=str(length)
            )

    @parameterized.parameters("blocks", "seer")
    def test_without_lengths_filler_has_a_part(self, kind):
        """So that the test above can fail."""
        model, (batch, real) = make(kind), filled.two_ways()
        got, other = map(nnx.jit(lambda model, x: model(x)), (model, model), batch)
        self.assertGreater(np.abs(got - other)[real].max(), 1e-3)

    def test_a_layer_of_a_users_own_need_not_know_them(self):
        class Mean(nnx.Module):
            def __init__(self, *args, **kwargs):
                del args, kwargs

            def __call__(self, x, positions, *, with_density=False):
                y = jnp.cumsum(x, axis=1) / (positions[..., None] + 1)
                return (y, jnp.ones(x.shape[:2])) if with_density else y

        model = filled.make(Mean)
        self.assertEqual(model(jnp.zeros((1, 4), jnp.int32)).shape, (1, 4, 31))

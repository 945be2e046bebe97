"""What a prompt gives does not depend on what fills it up, nor on how far."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax import decode
from tests.filled import KINDS, LENGTHS, make, two_ways

pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all is compilation

prefill = jax.jit(decode.prefill, static_argnames="num_slots")


class FilledPromptsTest(parameterized.TestCase):
    @parameterized.product(kind=list(KINDS))
    def test_alone_or_in_a_batch(self, kind):
        model, lengths = decode.prepare(make(KINDS[kind])), jnp.array(LENGTHS)
        batch, _ = two_ways()
        got, other = (prefill(model, x, lengths, num_slots=28)[0] for x in batch)
        np.testing.assert_array_equal(got, other)
        for row, length in enumerate(LENGTHS):
            alone = batch[0, row : row + 1, :length]
            want, _ = prefill(model, alone, jnp.array([length]), num_slots=28)
            np.testing.assert_allclose(got[row], want[0], rtol=1e-4, atol=1e-4)

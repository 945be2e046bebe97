"""Rotary positions: distances alone count, lengths stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sparsejax import nn


class RopeTest(parameterized.TestCase):
    @parameterized.product(shift=[1, 7, 1000])
    def test_dot_products_depend_on_the_distance_alone(self, shift):
        q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 1, 8))
        positions = jnp.array([[0, 1, 2, 5, 9, 20]])

        def products(positions):
            rotate = functools.partial(nn.apply_rope, base=100.0)
            return jnp.einsum(
                "bqhd,bkhd->bqk", rotate(q, positions), rotate(k, positions)
            )

        np.testing.assert_allclose(
            products(positions), products(positions + shift), atol=1e-3
        )

    def test_keeps_lengths_and_position_zero(self):
        x = jax.random.normal(jax.random.key(0), (1, 4, 2, 6))
        y = nn.apply_rope(x, jnp.array([[0, 3, 50, 999]]), base=1e4)
        np.testing.assert_allclose(
            jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
        )
        np.testing.assert_array_equal(y[:, 0], x[:, 0])

    def test_keeps_bfloat16(self):
        x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
        positions = jnp.array([[0, 1]])
        self.assertEqual(nn.apply_rope(x, positions, base=1e4).dtype, jnp.bfloat16)

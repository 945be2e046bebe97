"""pack and unpack: one bit a weight, and back."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax import masks

# compiled once a shape
pack = jax.jit(masks.pack)
unpack = jax.jit(masks.unpack, static_argnums=1)


@given(data=st.data())
def test_round_trip(data):
    shapes = [
        (1,),
        (8,),
        (9,),
        (0,),
        (3, 16),
        (2, 3, 5),
        (3, 0),
        (0, 3),
        (1, 2, 1, 3, 7),
    ]
    mask = data.draw(hnp.arrays(bool, st.sampled_from(shapes)))
    packed = np.asarray(pack(mask))
    assert packed.dtype == np.uint8
    assert packed.shape == (*mask.shape[:-1], -(-mask.shape[-1] // 8))
    np.testing.assert_array_equal(unpack(packed, mask.shape[-1]), mask)
    # the slow definition: bit j of byte i is entry 8 i + j, the rest is 0
    for index in np.ndindex(packed.shape):
        row, first = mask[index[:-1]], 8 * index[-1]
        want = sum(int(bit) << j for j, bit in enumerate(row[first : first + 8]))
        assert packed[index] == want


class PackingTest(parameterized.TestCase):
    def test_eager(self):
        mask = np.arange(60).reshape(3, 20) % 3 == 0
        np.testing.assert_array_equal(masks.unpack(masks.pack(mask), 20), mask)

    def test_under_jit_and_vmap(self):
        mask = jax.random.bernoulli(jax.random.key(0), 0.5, (4, 3, 21))
        packed = jax.jit(jax.vmap(masks.pack))(mask)
        self.assertEqual(packed.shape, (4, 3, 3))
        got = jax.jit(jax.vmap(lambda p: masks.unpack(p, 21)))(packed)
        self.assertEqual(got.dtype, jnp.bool_)
        np.testing.assert_array_equal(got, mask)

    @parameterized.parameters(
        ((), P(), False),
        ((8, 20), P(), True),
        ((8, 20), P("x"), True),
        ((8, 32), P(None, "x"), False),  # four weights a device: half a byte
        ((8, 64), P(None, "x"), True),
    )
    def test_is_packable_where_no_byte_is_cut(self, shape, spec, want):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, spec)
        mask = jax.device_put(jnp.ones(shape, jnp.bool_), sharding)
        self.assertEqual(masks.is_packable(mask), want)
        if want:
            packed = masks.pack(mask)
            self.assertEqual(packed.sharding, sharding)
            np.testing.assert_array_equal(masks.unpack(packed, shape[-1]), mask)

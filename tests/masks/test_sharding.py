"""Masks of sharded scores: equal to the unsharded ones, and nothing is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax import masks
from sparsejax.patterns import NM, Block, Channel, Unstructured, governed
from tests.masks.hlo import operations

# All devices hold a part; only counts and bounds travel between them.
MOVES = ["all-gather", "all-to-all", "collective-permute"]
SHAPE = (32, 64)
SPECS = [P("x", "y"), P(None, "y"), P(("x", "y"), None)]


def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


class ShardingTest(parameterized.TestCase):
    def check(self, fn, *arrays, spec):
        sharding = NamedSharding(mesh(), spec)
        sharded = [jax.device_put(array, sharding) for array in arrays]
        jitted = jax.jit(fn, out_shardings=sharding)
        self.assertNoCommonElements(operations(jitted, *sharded), MOVES)
        got = jitted(*sharded)
        self.assertEqual(got.sharding, sharding)
        np.testing.assert_array_equal(got, jax.jit(fn)(*arrays))

    @parameterized.product(
        pattern=[Unstructured(), NM(2, 4), NM(1, 4, axis=-1), Block((4, 8)), Channel()],
        spec=SPECS,
    )
    def test_select(self, pattern, spec):
        leaf = governed(jnp.ones(SHAPE), pattern=pattern)[0]
        scores = jax.random.randint(jax.random.key(0), SHAPE, 0, 30).astype(jnp.float32)
        self.check(lambda s: masks.select(s, leaf, 0.7), scores, spec=spec)

    @parameterized.product(pattern=[Unstructured(), NM(2, 4)])
    def test_drop_and_grow(self, pattern):
        leaf = governed(jnp.ones(SHAPE), pattern=pattern)[0]
        keys = jax.random.split(jax.random.key(0), 2)
        drop, grow = (jax.random.normal(key, SHAPE) for key in keys)

        def fn(drop, grow):
            mask = masks.select(drop, leaf, 0.5)
            return masks.drop_and_grow(
                mask,
                leaf,
                drop_scores=drop,
                grow_scores=grow,
                sparsity=0.5,
                drop_fraction=0.3,
            )

        self.check(fn, drop, grow, spec=P("x", "y"))

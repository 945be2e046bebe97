"""A sharded axis gives what an unsharded one gives; nothing is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from tests.masks.hlo import operations

MOVES = ["all-gather", "all-to-all", "collective-permute"]
SHAPE = (8, 64)


def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def operands():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    where = jax.random.normal(jax.random.key(1), SHAPE) > -0.5
    return x, where, jax.random.normal(jax.random.key(2), SHAPE)


def value_and_gradient(x, where, g, *, masked, **kwargs):
    options = dict(where=where if masked else None, **kwargs)

    def loss(x):
        out = sj.statistical_topk(x, 6, **options)
        return jnp.sum(g * out), (out, sj.statistical_threshold(x, 6, **options))

    (_, aux), grad = jax.value_and_grad(loss, has_aux=True)(x)
    return *aux, grad


class ShardingTest(parameterized.TestCase):
    @parameterized.parameters(
        (P("data", "model"), True), (P(None, ("data", "model")), False)
    )
    def test_under_jit(self, spec, masked):
        fn = jax.jit(lambda *args: value_and_gradient(*args, masked=masked))
        want = fn(*operands())
        sharded = jax.device_put(operands(), NamedSharding(mesh(), spec))
        self.assertNoCommonElements(operations(fn, *sharded), MOVES)
        for a, b in zip(fn(*sharded), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)

    @parameterized.parameters(P("data", "model"), P("data", None))
    def test_on_a_mesh_of_explicit_axes(self, *spec):
        explicit = jax.make_mesh(
            (2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2
        )
        x = operands()[0]
        with jax.set_mesh(explicit):
            sharding = NamedSharding(explicit, P(*spec))
            for fn in (
                lambda x: sj.statistical_topk(x, 6),
                lambda x: sj.block_statistical_topk(x, 16, 4)[0],
            ):
                got = jax.jit(fn)(jax.device_put(x, sharding))
                self.assertEqual(got.sharding.spec, P(*spec))
                np.testing.assert_allclose(got, fn(x), atol=1e-6)

    @parameterized.parameters(("model", False), (("data", "model"), True))
    def test_under_shard_map(self, axis, masked):
        rows = "data" if axis == "model" else None
        spec = P(rows, axis)

        def local(x, where, g):
            options = dict(where=where if masked else None, axis_name=axis)
            out = sj.statistical_topk(x, 6, **options)
            return out, sj.statistical_threshold(x, 6, **options)

        def fn(x, where, g):
            mapped = jax.shard_map(
                local, mesh=mesh(), in_specs=spec, out_specs=(spec, P(rows, None))
            )

            def loss(x):
                out, theta = mapped(x, where, g)
                return jnp.sum(g * out), (out, theta)

            (_, aux), grad = jax.value_and_grad(loss, has_aux=True)(x)
            return *aux, grad

        want = jax.jit(lambda *args: value_and_gradient(*args, masked=masked))(
            *operands()
        )
        for a, b in zip(jax.jit(fn)(*operands()), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)

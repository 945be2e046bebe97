"""What of an array lies on one device, where axes of the mesh are manual."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax._devices import shape_on_a_device


def test_shape_on_a_device_along_manual_and_explicit_axes():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    seen = []

    def see(x):
        seen.append((x.shape, shape_on_a_device(x)))
        return x

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 8, 3)), NamedSharding(mesh, P("a", "b")))
        for names, spec in (({"a"}, P("a")), ({"a", "b"}, P("a", "b"))):
            jax.jit(
                jax.shard_map(see, in_specs=spec, out_specs=spec, axis_names=names)
            )(x)
    assert seen == [((4, 8, 3), (4, 2, 3)), ((4, 2, 3), (4, 2, 3))]

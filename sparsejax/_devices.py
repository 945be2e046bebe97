"""What of an array lies on one device.

Every room may import this module; it imports none of them.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType


def shape_on_a_device(leaf: Any) -> tuple[int, ...]:
    """The shape of the part of a leaf that one device holds.

    Known of concrete arrays, of `ShapeDtypeStruct`s with a sharding and, under jit, of
    explicit meshes; else the whole shape. Inside `shard_map` and `pmap` an array is
    already what lies on one device along the manual axes.

    Args:
      leaf: an array or a `ShapeDtypeStruct`.

    Returns:
      As many sizes as the leaf has axes.

    Example:
      >>> shape_on_a_device(jnp.ones((4, 2)))
      (4, 2)
    """
    if isinstance(leaf, Tracer):
        leaf = jax.typeof(leaf)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.shape(leaf)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Manual not in mesh.axis_types:
        return sharding.shard_shape(leaf.shape)
    # the spec names the other axes alone, and jax has no `shard_shape` for these
    cuts = (() if part is None else part for part in sharding.spec)
    names = ((cut,) if isinstance(cut, str) else cut for cut in cuts)
    parts = (math.prod(mesh.shape[name] for name in own) for own in names)
    return tuple(
        size // part
        for size, part in itertools.zip_longest(leaf.shape, parts, fillvalue=1)
    )

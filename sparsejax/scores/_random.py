"""Random scores: the baseline that every other score must beat."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from sparsejax.typing import Params, ScoreTree, plain_path


def random(params: Params, *, key: jax.Array) -> ScoreTree:
    """Scores each weight by an independent uniform draw.

    The key of a leaf is folded from its path, so its scores do not depend on which
    other leaves there are, nor on whether the tree is a dict or an `nnx.State`.

    Args:
      params: floating arrays of any shape; only paths, shapes and shardings are read.
      key: a key from `jax.random.key`.

    Returns:
      float32 in [0, 1) of the same shapes, and shardings where these are known: of
      concrete arrays and of explicit meshes. None stays None.

    Example:
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> random(params, key=jax.random.key(0))["kernel"].shape
      (4, 2)
    """

    def draw(path, leaf):
        name = "/".join(plain_path(path)).encode()
        leaf_key = jax.random.fold_in(key, zlib.crc32(name))
        return _uniform(leaf_key, leaf)

    return jax.tree_util.tree_map_with_path(draw, params)


def _uniform(key: jax.Array, leaf: Any) -> jax.Array:
    """Uniform draws, made where the leaf lies: values do not depend on the sharding."""
    draw = functools.partial(
        jax.random.uniform, shape=jnp.shape(leaf), dtype=jnp.float32
    )
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
        return draw(key, out_sharding=sharding if any(sharding.spec) else None)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.jit(draw, out_shardings=sharding)(key)
    return draw(key)

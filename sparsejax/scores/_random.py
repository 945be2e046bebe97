"""Random scores: the baseline that every other score must beat."""

import zlib

import jax
import jax.numpy as jnp

from sparsejax.typing import Params, ScoreTree, plain_path


def random(params: Params, *, key: jax.Array) -> ScoreTree:
    """Scores each weight by an independent uniform draw.

    The key of a leaf is folded from its path, so its scores do not depend on which
    other leaves there are, nor on whether the tree is a dict or an `nnx.State`.

    Args:
      params: floating arrays of any shape; only paths and shapes are read.
      key: a key from `jax.random.key`.

    Returns:
      float32 in [0, 1) of the same shapes; None stays None.

    Example:
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> random(params, key=jax.random.key(0))["kernel"].shape
      (4, 2)
    """

    def draw(path, leaf):
        name = "/".join(plain_path(path)).encode()
        leaf_key = jax.random.fold_in(key, zlib.crc32(name))
        return jax.random.uniform(leaf_key, jnp.shape(leaf), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, params)

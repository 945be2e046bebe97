"""The exact top-k of each row, for a reference and for small models."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax import _straight_through, ops
from sparsejax._ints import check_int
from sparsejax.activations import _arguments


def topk_activation(
    x: Float[Array, "*shape"],
    k: int,
    *,
    axis: int = -1,
    straight_through: bool = False,
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """Keeps the `k` highest entries of each row and zeroes the others.

    Exactly `k` are kept, also under ties: of equal entries those with the lower index
    win. NaN ranks below every number. Values are not clipped: a negative entry among
    the k highest stays, and a ReLU after it is the caller's. The values of a sharded
    `axis` are gathered; on a mesh of explicit axes JAX asks you to reshard them first.

    Args:
      x: any floating dtype.
      k: how many to keep, a Python int of at least 1; all from the length of `axis` on.
      axis: the axis that a row lies along.
      straight_through: if True, the gradient passes to all entries as if nothing were
        zeroed; if False, to survivors only.

    Returns:
      The values, `x` where kept and 0 elsewhere, and the mask, True = kept.

    Raises:
      TypeError: if `x` is not floating, or `k` or `axis` is not a Python int.
      ValueError: if `k` is less than 1, or `x` has no such axis.

    Example:
      >>> topk_activation(jnp.array([0.5, 2.0, -1.0, 2.0]), 1)[0]
      Array([0., 2., 0., 0.], dtype=float32)

    References:
      Li et al., 2023, https://arxiv.org/abs/2210.06313 (the Top-k Transformer);
      straight-through: Wang et al., 2024 (Q-Sparse), https://arxiv.org/abs/2407.10969,
      which ranks by magnitude and rescales; this ranks by value and does not.
    """
    x = _arguments.check_values(x, axis)
    k = check_int("k", k, least=1)
    if k >= x.shape[axis]:
        return x, jnp.ones(x.shape, jnp.bool_)
    rows = jax.lax.stop_gradient(jnp.moveaxis(x, axis, -1))
    mask = jnp.moveaxis(ops.keep_highest(rows, k), -1, axis)
    values = jnp.where(mask, x, 0)
    if straight_through:
        values = _straight_through.straight_through(x, values)
    return values, mask

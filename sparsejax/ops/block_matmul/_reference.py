"""The definition: a dense product with the blocks that are not kept set to zero."""

import jax
import jax.numpy as jnp

from sparsejax.formats import BlockMask, BlockSparse
from sparsejax.ops._activations import Activation


def block_matmul(
    x: jax.Array,
    w: jax.Array,
    block_mask: BlockMask,
    bias: jax.Array | None = None,
    full_dw: jax.Array | bool = False,
    *,
    activation: Activation | None = None,
) -> jax.Array:
    """As the public function, on rows; its autodiff is the oracle of the kernels.

    Of `x` nothing is read at a block row of which no block is kept, nor of the gradient
    of y at such a block column, unless `full_dw`: the values there may be NaN, as with
    a kernel. Where a block row keeps some blocks, the others multiply `x` by 0, which a
    kernel does not.

    Args:
      x: `[num_rows, d_in]`.
      w: `[d_in, d_out]`, or the values of a `BlockSparse`, `[capacity, height, width]`.
      block_mask: of `w`.
      bias: `[d_out]`.
      full_dw: the gradient of `w` is dense; a scalar, may be traced.
      activation: applied in float32.

    Returns:
      `[num_rows, d_out]` of `x.dtype`.
    """
    if w.ndim == 3:
        w = BlockSparse(w, block_mask).to_dense()
    else:
        kept = block_mask.to_dense()
        w = _select(w, kept, kept | full_dw)
    of_row, of_column = (
        jnp.repeat(block_mask.to_blocks().any(axis=1 - axis), side) | full_dw
        for axis, side in enumerate(block_mask.block_shape)
    )
    x = jnp.where(of_row, x, 0)  # 0 * NaN
    y = jnp.dot(x, w, preferred_element_type=jnp.float32)
    y = jnp.where(of_column, y, 0)  # as the sums are, and in the backward dy
    return epilogue(y, bias, activation).astype(x.dtype)


def epilogue(
    y: jax.Array, bias: jax.Array | None, activation: Activation | None
) -> jax.Array:
    """What follows the float32 sums: the bias, then the activation."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y if activation is None else activation(y)


@jax.custom_jvp
def _select(w, kept, with_gradient):
    """The kept entries of `w`; where `with_gradient`, the gradient passes."""
    del with_gradient
    return jnp.where(kept, w, 0)


@_select.defjvp
def _select_jvp(primals, tangents):
    with_gradient = primals[2]
    return _select(*primals), jnp.where(with_gradient, tangents[0], 0)

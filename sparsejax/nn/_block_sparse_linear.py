"""A linear layer that skips the blocks of its kernel that are not kept."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparsejax import formats, ops


class Topology(nnx.Variable):
    """What the optimizer decides about a block-sparse layer; `set_block_masks` writes.

    Not a Param, so an optimizer and a gradient with `wrt=nnx.Param` pass it by.
    """


class BlockSparseLinear(nnx.Module):
    """`x @ kernel` with the kept blocks of the kernel, see `sj.ops.block_matmul`.

    Holds a kernel `[d_in, d_out]`, a bias if asked, and two variables of the kind
    `sj.nn.Topology`: `block_mask`, a `sj.BlockMask` that keeps all at first, and
    `full_dw`, whether the gradient of the kernel is dense. A mask with shorter lists
    (`capacity`) may be set by `block_mask.set_value`; `set_block_masks` keeps their
    lengths.

    The kernel is LeCun normal with fan-in `d_in`, bit for bit that of a dense layer of
    the same seed: how sparse it will be is the optimizer's business, and runs under
    masks stay comparable. With a share `p` of the blocks kept the outputs begin with
    `p` of the variance; for training from scratch at a high sparsity without a norm
    after the layer, divide the kernel by `sqrt(p)`.

    Args:
      d_in: width of the input.
      d_out: width of the output.
      block_shape: `(height, width)` of a block; divides `(d_in, d_out)`.
      use_bias: add a bias `[d_out]`, zeros at first.
      implementation: of `sj.ops.block_matmul`.
      dtype: of the computation; sums are float32.
      param_dtype: of kernel and bias.
      rngs: draws the kernel.

    Raises:
      TypeError: if `block_shape` holds no two whole numbers.
      ValueError: if blocks do not divide the kernel.

    Example:
      >>> from flax import nnx
      >>> layer = sj.nn.BlockSparseLinear(8, 16, block_shape=(4, 4), rngs=nnx.Rngs(0))
      >>> kept = jnp.eye(2, 4, dtype=bool)
      >>> layer.block_mask.set_value(sj.BlockMask.from_blocks(kept, (4, 4)))
      >>> print((layer(jnp.ones((1, 8))) != 0).astype(int))
      [[1 1 1 1 1 1 1 1 0 0 0 0 0 0 0 0]]

    References:
      Evci et al., 2022, https://arxiv.org/abs/2010.03533, section 3.1: the fan-in of a
      sparse layer.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        block_shape: tuple[int, int] = (128, 128),
        use_bias: bool = False,
        implementation: ops.Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        height, width = formats.check_block_shape(block_shape)
        if d_in % height or d_out % width:
            raise ValueError(
                f"`block_shape` must divide the kernel; got blocks of {block_shape} "
                f"for d_in={d_in} and d_out={d_out}."
            )
        self.implementation: ops.Implementation | None = implementation
        self.dtype = dtype
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out), param_dtype))
        self.bias = nnx.Param(jnp.zeros(d_out, param_dtype)) if use_bias else None
        kept = jnp.ones((d_in // height, d_out // width), jnp.bool_)
        self.block_mask = Topology(formats.BlockMask.from_blocks(kept, block_shape))
        self.full_dw = Topology(jnp.zeros([], jnp.bool_))

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Applies the layer; the result has the layer's `dtype`."""
        return ops.block_matmul(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            self.block_mask.get_value(),
            bias=None if self.bias is None else self.bias[...],
            full_dw=self.full_dw[...],
            implementation=self.implementation,
        )

"""The gated feed-forward layer with block-sparse kernels."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparsejax import ops
from sparsejax.nn._block_sparse_linear import BlockSparseLinear
from sparsejax.nn._gated_ffn import GatedFFN


class BlockSparseFFN(GatedFFN):
    """A `GatedFFN` whose `gate`, `up` and `down` are `BlockSparseLinear`s.

    All blocks are kept, and it equals the `GatedFFN` of the same seed, until
    `sj.nn.set_block_masks` writes the masks of the optimizer.

    Args:
      d_model: width of input and output.
      d_ff: number of neurons.
      block_shape: `(height, width)` of a block, of all three kernels; both divide
        `d_model` and `d_ff`.
      activation: of the gate; `jax.nn.silu` gives SwiGLU.
      implementation: of `sj.ops.block_matmul`.
      dtype: of the computation.
      param_dtype: of the kernels.
      rngs: draws the kernels.

    Raises:
      TypeError: if `block_shape` holds no two whole numbers.
      ValueError: if blocks do not divide a kernel.

    Example:
      >>> import functools
      >>> from flax import nnx
      >>> ffn = functools.partial(sj.nn.BlockSparseFFN, block_shape=(16, 16))
      >>> config = sj.models.DecoderConfig(num_layers=1, ffn=ffn)
      >>> model = sj.models.Decoder(config, rngs=nnx.Rngs(0))
      >>> int(model.blocks[0].ffn.gate.block_mask.get_value().num.sum())
      192

    References:
      Shazeer, 2020, https://arxiv.org/abs/2002.05202, equation 6.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        block_shape: tuple[int, int] = (128, 128),
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        implementation: ops.Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            d_model,
            d_ff,
            activation=activation,
            linear=functools.partial(
                BlockSparseLinear,
                block_shape=block_shape,
                implementation=implementation,
            ),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

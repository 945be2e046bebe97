"""The gated feed-forward layer (SwiGLU and its relatives)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class GatedFFN(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, three kernels `[d_in, d_out]` without bias.

    Args:
      d_model: width of input and output.
      d_ff: number of neurons.
      activation: of the gate; `jax.nn.silu` gives SwiGLU.
      dtype: of the computation.
      param_dtype: of the kernels.
      rngs: draws the kernels.

    References:
      Shazeer, 2020, https://arxiv.org/abs/2002.05202, equation 6.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def linear(d_in: int, d_out: int) -> nnx.Linear:
            return nnx.Linear(
                d_in,
                d_out,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.activation = activation
        self.gate = linear(d_model, d_ff)
        self.up = linear(d_model, d_ff)
        self.down = linear(d_ff, d_model)

    def __call__(
        self, x: Float[Array, "*batch d_model"]
    ) -> Float[Array, "*batch d_model"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))

"""The gated feed-forward layer (SwiGLU and its relatives)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparsejax.nn._linear import check_input, linear


class GatedFFN(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, three kernels `[d_in, d_out]` without bias.

    Args:
      d_model: width of input and output.
      d_ff: number of neurons.
      activation: of the gate; `jax.nn.silu` gives SwiGLU.
      linear: makes a layer: `linear(d_in, d_out, dtype=, param_dtype=, rngs=)`.
      dtype: of the computation.
      param_dtype: of the kernels.
      rngs: draws the kernels.

    Example:
      >>> from flax import nnx
      >>> ffn = sj.nn.GatedFFN(8, 32, rngs=nnx.Rngs(0))
      >>> y, density = ffn(jnp.ones((2, 8)), with_density=True)
      >>> y.shape, density
      ((2, 8), Array([1., 1.], dtype=float32))

    References:
      Shazeer, 2020, https://arxiv.org/abs/2002.05202, equation 6.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        linear: Callable[..., Callable[[jax.Array], jax.Array]] = linear,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(
            linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.d_model = d_model
        self.activation = activation
        self.gate = make(d_model, d_ff)
        self.up = make(d_model, d_ff)
        self.down = make(d_ff, d_model)

    def hidden(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_ff"]:
        """Computes the activations of the neurons, the input of `down`."""
        check_input(self, x, axes="[*batch, d_model]")
        return self.activation(self.gate(x)) * self.up(x)

    def __call__(
        self, x: Float[Array, "*batch d_model"], *, with_density: bool = False
    ) -> Any:
        """Applies the layer.

        Args:
          x: activations, any leading axes.
          with_density: return `(y, density)`.

        Returns:
          y `[*batch, d_model]`; density float32 `[*batch]`, for each token the share of
          neurons whose activation is not 0.
        """
        return apply_down(self.down, self.hidden(x), with_density)


def apply_down(
    down: Callable[[jax.Array], jax.Array], hidden: jax.Array, with_density: bool
) -> Any:
    """The last product of a feed-forward layer, with the density if asked for."""
    y = down(hidden)
    if not with_density:
        return y
    return y, jnp.mean(hidden != 0, axis=-1, dtype=jnp.float32)

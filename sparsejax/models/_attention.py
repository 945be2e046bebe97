"""Causal grouped-query attention with rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparsejax.models._rope import apply_rope


class Attention(nnx.Module):
    """Causal attention in which `num_heads / num_kv_heads` queries share a key head.

    Four kernels `[d_in, d_out]` without bias: `query`, `key`, `value`, `out`. Softmax
    is taken in float32.

    Args:
      d_model: width of input and output.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`. All of them by default.
      head_dim: width of a head; even. `d_model / num_heads` by default.
      rope_base: see `apply_rope`.
      dtype: of the computation.
      param_dtype: of the kernels.
      rngs: draws the kernels.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = 10_000.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or d_model // num_heads
        self.rope_base = rope_base

        def linear(d_in: int, d_out: int) -> nnx.Linear:
            return nnx.Linear(
                d_in,
                d_out,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.query = linear(d_model, self.num_heads * self.head_dim)
        self.key = linear(d_model, self.num_kv_heads * self.head_dim)
        self.value = linear(d_model, self.num_kv_heads * self.head_dim)
        self.out = linear(self.num_heads * self.head_dim, d_model)

    def __call__(
        self, x: Float[Array, "batch seq d_model"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq d_model"]:
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], -1, self.head_dim)

        q = apply_rope(heads(self.query(x)), positions, base=self.rope_base)
        k = apply_rope(heads(self.key(x)), positions, base=self.rope_base)
        y = jax.nn.dot_product_attention(q, k, heads(self.value(x)), is_causal=True)
        return self.out(y.reshape(*y.shape[:-2], -1))

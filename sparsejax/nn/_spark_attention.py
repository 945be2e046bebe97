"""Spark attention: part of each head decides which keys are needed at all."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparsejax import activations, attention, ops
from sparsejax._ints import check_int
from sparsejax.nn._attention import Attention, filled
from sparsejax.nn._rope import apply_rope


class SparkAttention(Attention):
    """Causal attention to about `k` keys a query, see `sj.attention.spark_attention`.

    The kernels are those of `Attention`. The rotation turns both parts of a head, each
    by itself with the frequencies of its own width. In training all scores are
    computed; `sj.decode` reads the rest of the selected keys only.

    Args:
      d_model: width of input and output.
      num_heads: query heads.
      k: expected number of attended keys, at least 1. Where fewer are in sight, all.
      split: width of the predictor's part of a head; even, in `[2, head_dim - 2]`.
      num_kv_heads: key and value heads; divides `num_heads`. All of them by default.
      head_dim: width of a head; even. `d_model / num_heads` by default.
      window: see only the last `window` tokens, oneself included; all by default.
      rope_base: see `apply_rope`.
      implementation: of `sj.ops.spark_weights`.
      dtype: of the computation.
      param_dtype: of the kernels.
      rngs: draws the kernels.

    Raises:
      TypeError: If `k` is not a number, or `split` not an int.
      ValueError: If `k` or `split` is out of its range, or as `Attention`.

    Example:
      >>> from flax import nnx
      >>> layer = sj.nn.SparkAttention(64, 2, k=16, split=16, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (1, 200, 64))
      >>> y, density = layer(x, jnp.arange(200)[None], with_density=True)
      >>> float(density[0, 9]), bool(density[0, 199] < 0.15)
      (1.0, True)

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3. The frequencies of
      the parts are not stated there.
    """

    decodes = True
    selects_keys = True

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        k: float,
        split: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_base: float = 10_000.0,
        implementation: ops.Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.k = activations.check_k(k)
        self.implementation: ops.Implementation | None = implementation
        self.split = check_int("split", split)
        super().__init__(
            d_model,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            window=window,
            rope_base=rope_base,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if not 0 < split < self.head_dim or split % 2:
            raise ValueError(
                "`split` must be even and in [2, head_dim - 2]; got "
                f"split={split} and head_dim={self.head_dim}."
            )

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Gives each part of queries or keys its positions."""
        parts = jnp.split(x, [self.split], axis=-1)
        return jnp.concatenate(
            [apply_rope(part, positions, base=self.rope_base) for part in parts], -1
        )

    def attend(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        valid: Bool[Array, "#batch 1 queries keys"] | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
        k: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Attends to about `k` of the valid keys; causal in the sequence by default.

        Each query selects by itself, so that `lengths` matter as little as in
        `Attention`.

        Returns:
          The outputs `[batch, queries, heads, head_dim]`, and the share of the valid
          keys that were attended, a mean over heads, float32 `[batch, queries]`; 1
          where none is valid.
        """
        del lengths
        if valid is None:
            positions = jnp.arange(query.shape[1])[None]
            valid = attention.causal_mask(positions, positions, window=self.window)
        y, attended = attention.spark_attention(
            query,
            key,
            value,
            valid,
            k=self.k if k is None else k,
            split=self.split,
            implementation=self.implementation,
        )
        num_valid = jnp.sum(valid, axis=(1, 3))
        num_attended = jnp.sum(attended, axis=(1, 3)) / self.num_heads
        in_sight = jnp.maximum(num_valid, 1).astype(jnp.float32)
        share = num_attended / in_sight
        density = jnp.where(num_valid > 0, share, 1)
        return y, density.astype(jnp.float32)

    def mix(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        k: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `Attention`; a `k` given to a call is used instead of the layer's own.

        It may be traced, so that layers of different `k` can share one `nnx.scan`.
        """
        return self.attend(*self.project(x, positions), k=k, **filled(lengths))

"""Pyramid sparse attention: blocks that matter less are read through pooled keys."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparsejax import attention, ops
from sparsejax.nn._attention import Attention, filled


class PyramidAttention(Attention):
    """Causal attention to all blocks of keys, the less they matter the more coarsely.

    The kernels are those of `Attention`, and so is the result where all blocks are at
    level 1. Each block of queries gives each block of keys a level `h`, at which the
    keys and values of `h` neighbours are read as one, their mean, or drops it, see
    `sj.attention.pyramid_attention`. Gradients are those of that, and reach queries,
    keys and values; the levels have none. The first block and those at the queries' own
    positions are at level 1, as in the paper's language models.

    A block of queries chooses as one, and in decoding each token attends to all before
    it: see `BlockAttention`.

    Args:
      d_model: width of input and output.
      num_heads: query heads.
      block_shape: `(height, width)`, queries and keys of a block; a sequence has at
        least so many.
      bounds: pairs of a level and a share, the budget: see `sj.attention.quota_levels`,
        which has the same by default. Each level divides the width.
      importance: of blocks, `[batch, heads | kv_heads | 1, rows, columns]`, -inf out of
        sight. Called as `importance(query, key, block_shape=block_shape, causal=True)`,
        in `sj.decode` with `lengths=` too.
      assign: called as `assign(importance, bounds=bounds, full=full)`;
        `sj.attention.quota_levels`, or `mass_levels`, whose shares are of the mass.
      thresholds: pairs of a level and a cosine, see `sj.attention.similarity_cap`: what
        is not alike is read more finely. Empty for no such cap.
      num_kv_heads: key and value heads; divides `num_heads`. All of them by default.
      head_dim: width of a head; even. `d_model / num_heads` by default.
      rope_base: see `apply_rope`.
      implementation: of `sj.ops.block_attention`, which is called for each level.
      dtype: of the computation.
      param_dtype: of the kernels.
      rngs: draws the kernels.

    Raises:
      ValueError: As `Attention`. In a call, as `sj.attention.pyramid_attention`,
        `importance` and `assign`.

    Example:
      >>> from flax import nnx
      >>> layer = sj.nn.PyramidAttention(
      ...     32, 2, block_shape=(16, 16), bounds=[(4, 1.0)], rngs=nnx.Rngs(0)
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 32))
      >>> y, density = layer(x, jnp.arange(64)[None], with_density=True)
      >>> print(density[0, 31], density[0, 63])  # of four blocks, two at level 4
      1.0 0.625

    References:
      PSA, 2025, https://arxiv.org/abs/2512.04025. There models are distilled with it;
      language models use it without training.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        block_shape: tuple[int, int] = (128, 128),
        bounds: Sequence[tuple[int, float]] = ((1, 0.1), (2, 0.15), (8, 0.35)),
        importance: Callable[..., jax.Array] = attention.antidiagonal_importance,
        assign: Callable[..., jax.Array] = attention.quota_levels,
        thresholds: Sequence[tuple[int, float]] = (),
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = 10_000.0,
        implementation: ops.Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.block_shape = block_shape
        self.implementation: ops.Implementation | None = implementation
        # tuples, as what is static must hash
        self.bounds = tuple((level, share) for level, share in bounds)
        self.importance = importance
        self.assign = assign
        self.thresholds = tuple((level, cosine) for level, cosine in thresholds)
        super().__init__(
            d_model,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_base=rope_base,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that a block may have, ascending; 1 is among them."""
        pairs = (*self.bounds, *self.thresholds)
        return tuple(sorted({1, *(level for level, _ in pairs)}))

    def level_map(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq kv_heads head_dim"],
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> Int[Array, "batch some_heads block_rows block_columns"]:
        """Chooses the levels of rotated queries and keys, 0 where a block is dropped.

        What comes after `lengths` has no part in the choice.
        """
        importance = self.importance(
            query, key, block_shape=self.block_shape, causal=True, **filled(lengths)
        )
        full = attention.pyramid_full_blocks(
            query.shape[1], key.shape[1], self.block_shape
        )
        level_map = self.assign(importance, bounds=self.bounds, full=full)
        if not self.thresholds:
            return level_map
        cap = attention.similarity_cap(
            key, block=self.block_shape[1], thresholds=self.thresholds
        )
        sharing = max(1, level_map.shape[1] // cap.shape[1])
        cap = jnp.repeat(cap, sharing, axis=1)
        return jnp.minimum(level_map, cap[:, :, None])

    def attend(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        valid: Bool[Array, "#batch 1 queries keys"] | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Attends to the pyramid of the sequence, or to all keys of `valid`.

        What comes after `lengths` has no part in the choice of levels.

        Returns:
          The outputs `[batch, queries, heads, head_dim]`, and the share of the keys in
          sight that were read, where a key at level `h` counts `1 / h`: a mean over
          heads, float32 `[batch, queries]`.
        """
        if valid is not None:
            return super().attend(query, key, value, valid)
        level_map = self.level_map(query, key, lengths=lengths)
        y = attention.pyramid_attention(
            query,
            key,
            value,
            level_map,
            block_shape=self.block_shape,
            levels=self.levels,
            causal=True,
            implementation=self.implementation,
        )
        density = attention.pyramid_density(
            level_map,
            query.shape[1],
            block_shape=self.block_shape,
            levels=self.levels,
        )
        return y, jnp.broadcast_to(density, query.shape[:2])

"""Attention to the blocks that a selector keeps."""

from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparsejax import attention, ops
from sparsejax.formats import BlockMask
from sparsejax.nn._attention import Attention, filled


class BlockSelector(Protocol):
    """Chooses blocks; `sj.attention.topk_blocks` with its settings bound is one.

    So are `statistical_topk_blocks`, `block_sparse`, `vertical_slash`, `flex_prefill`.

    Takes rotated queries and keys `[batch, seq, heads, head_dim]` and gives a mask
    `[batch | 1, heads | kv_heads | 1, seq, seq]`, rounded up to whole blocks. It is
    given `lengths` where sequences are filled up, as the prompts of a batch are.
    """

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        /,
        *,
        causal: Literal[True],
        lengths: jax.Array = ...,
    ) -> BlockMask: ...


class BlockAttention(Attention):
    """Causal attention to the blocks of keys that each block of queries selects.

    The kernels are those of `Attention`, and so is the result where all blocks are
    kept. Blocks that are not are skipped, forward and backward, where
    `sj.ops.block_attention` has a kernel for the device. Gradients reach queries, keys
    and values of the kept blocks; the selection has none.

    A block of queries selects as one, so a token has a say in what the tokens shortly
    before it attend to. Decoding a token at a time cannot repeat that: there each token
    attends to all before it, or to the pages that `sj.decode.prepare` is told to
    select, and only the prompt is read by blocks. What fills up a shorter prompt of a
    batch has no say in it.

    Args:
      d_model: width of input and output.
      num_heads: query heads.
      select: called as `select(query, key, causal=True)`, in `sj.decode` with
        `lengths=` too.
      num_kv_heads: key and value heads; divides `num_heads`. All of them by default.
      head_dim: width of a head; even. `d_model / num_heads` by default.
      rope_base: see `apply_rope`.
      implementation: of `sj.ops.block_attention`.
      dtype: of the computation.
      param_dtype: of the kernels.
      rngs: draws the kernels.

    Raises:
      ValueError: As `Attention`.

    Example:
      >>> import functools
      >>> from flax import nnx
      >>> select = functools.partial(
      ...     sj.attention.topk_blocks, num_kept=2, block_shape=(16, 16)
      ... )
      >>> layer = BlockAttention(32, 2, select=select, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 32))
      >>> y, density = layer(x, jnp.arange(64)[None], with_density=True)
      >>> print(density[0, 31], density[0, 63])
      1.0 0.5
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        select: BlockSelector,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = 10_000.0,
        implementation: ops.Implementation | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.select = select
        self.implementation: ops.Implementation | None = implementation
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

    def attend(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        valid: Bool[Array, "#batch 1 queries keys"] | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Attends to the selected blocks of the sequence, or to all keys of `valid`.

        What comes after `lengths` has no part in the selection.

        Returns:
          The outputs `[batch, queries, heads, head_dim]`, and the share of the keys in
          sight that were attended, a mean over heads, float32 `[batch, queries]`.
        """
        if valid is not None:
            return super().attend(query, key, value, valid)
        mask = self.select(query, key, causal=True, **filled(lengths))
        return attend_to_blocks(
            query, key, value, mask, implementation=self.implementation
        )


def attend_to_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: BlockMask,
    *,
    implementation: ops.Implementation | None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention to the kept blocks: outputs and density, as a layer has them."""
    y = ops.block_attention(
        query, key, value, mask, causal=True, implementation=implementation
    )
    density = attention.causal_density(mask, query.shape[1])
    return y, jnp.broadcast_to(density, query.shape[:2])

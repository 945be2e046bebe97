"""The highest weight of each query in each block of keys, without the attention map."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax._ints import check_int
from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops._varying import zeros_beside
from sparsejax.ops.block_attention._arguments import check_arrays, of_scores


def attention_peaks(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    *,
    block: int,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch heads blocks seq"]:
    """Maxima of causal attention weights over blocks of keys.

    Equal to the softmax over all keys up to a query, then the maximum over each block,
    by one walk over the keys as FlashAttention computes its statistics: of the map
    there is one number for each query and block. Float32, no gradient.

    Args:
      q: rotated queries; bfloat16, float16 or float32.
      k: rotated keys, of the dtype of `q`; `kv_heads` divides `heads`.
      block: keys of a block, at least 1; the last one has what is left.
      scale: of the products, positive; `1 / sqrt(head_dim)` by default.
      implementation: "reference", "mosaic_gpu" (Hopper: 16 bit types and blocks of a
        multiple of 64 keys), or None for the fastest that serves.

    Returns:
      float32, in [0, 1]; 0 where the block lies after the query.

    Raises:
      TypeError: if dtypes differ or are not floating.
      ValueError: if shapes disagree, `block` is below 1, or the scale is not positive.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> x = jnp.zeros((1, 4, 1, 2))  # each token attends evenly
      >>> print(sj.ops.attention_peaks(x, x, block=2)[0, 0])
      [[1.         0.5        0.33333334 0.25      ]
       [0.         0.         0.33333334 0.25      ]]
    """
    q, k = map(jnp.asarray, jax.lax.stop_gradient((q, k)))
    check_arrays(q, k, k)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"`q` and `k` must be as long; got {q.shape[1]} and {k.shape[1]}."
        )
    check_int("block", block, least=1)
    scale = of_scores(scale, q.shape[-1])
    return dispatch(
        (q, k),
        implementation,
        reference=functools.partial(_by_blocks, block=block, scale=scale),
        kernels={"mosaic_gpu": functools.partial(_gpu, block, scale)},
    )


# jitted: a loop that is called eagerly is compiled each time
@jax.jit(static_argnames=("block", "scale"))
def _by_blocks(q: jax.Array, k: jax.Array, *, block: int, scale: float) -> jax.Array:
    batch, length, heads, dim = q.shape
    kv_heads, columns = k.shape[2], -(-length // block)
    k = jnp.pad(k, ((0, 0), (0, columns * block - length), (0, 0), (0, 0)))
    k = jnp.moveaxis(k.reshape(batch, columns, block, kv_heads, dim), 1, 0)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    positions = jnp.arange(length)[:, None]

    def step(carry, of_block):
        top, total = carry
        keys, column = of_block
        scores = jnp.einsum(
            "bqhgd,bkhd->bhgqk", q, keys, preferred_element_type=jnp.float32
        )
        seen = (column * block + jnp.arange(block))[None] <= positions
        scores = jnp.where(seen, scores * scale, -jnp.inf)
        highest = scores.max(axis=-1)
        new_top = jnp.maximum(top, highest)
        powers = jnp.exp(scores - new_top[..., None]).sum(axis=-1)
        return (new_top, total * jnp.exp(top - new_top) + powers), highest

    empty = zeros_beside(jnp.moveaxis(q[..., 0], 1, 3), k)  # [.., kv_heads, group, seq]
    (top, total), highest = jax.lax.scan(
        step, (empty - jnp.inf, empty), (k, jnp.arange(columns))
    )
    peaks = jnp.exp(highest - top[None]) / total[None]
    return jnp.moveaxis(peaks.reshape(columns, batch, heads, length), 0, 2)


def _gpu(block: int, scale: float) -> Kernel:
    from sparsejax.ops.block_attention import _mosaic_gpu_peaks

    run = functools.partial(_mosaic_gpu_peaks.attention_peaks, block=block, scale=scale)
    reason = functools.partial(_mosaic_gpu_peaks.unsupported_reason, block=block)
    return Kernel(run, reason)

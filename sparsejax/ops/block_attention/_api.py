"""`block_attention`: checks, then the reference or a kernel."""

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax._ints import check_int
from sparsejax._lengths import of_sequences
from sparsejax.formats import BlockMask
from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops.block_attention import _reference
from sparsejax.ops.block_attention._arguments import check_arrays, of_scores
from sparsejax.ops.block_attention._rules import Rules

_DEFAULT_BLOCK = 128  # without a mask


@overload
def block_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    block_mask: BlockMask | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    prefix: ArrayLike | None = None,
    segment_ids: Any = None,
    scale: float | None = None,
    bias: Float[Array, "#batch #heads block_rows block_columns"] | None = None,
    with_lse: Literal[False] = False,
    implementation: Implementation | None = None,
) -> Float[Array, "batch queries heads head_dim"]: ...


@overload
def block_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    block_mask: BlockMask | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    prefix: ArrayLike | None = None,
    segment_ids: Any = None,
    scale: float | None = None,
    bias: Float[Array, "#batch #heads block_rows block_columns"] | None = None,
    with_lse: Literal[True],
    implementation: Implementation | None = None,
) -> tuple[
    Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]
]: ...


def block_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    block_mask: BlockMask | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    prefix: ArrayLike | None = None,
    segment_ids: Any = None,
    scale: float | None = None,
    bias: Float[Array, "#batch #heads block_rows block_columns"] | None = None,
    with_lse: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention over the kept blocks; the others are not read.

    As `jax.nn.dot_product_attention`, with a block mask. A pair of query and key counts
    if its block is kept and every rule lets it: `causal`, `window` and `segment_ids`
    are rules on single pairs and cut through blocks. A query that sees no key gets 0.
    Scores and softmax are float32. Query head `i` uses key head `i // (heads /
    kv_heads)`. The mask is an operand: another one of its shape needs no new trace.

    Blocks that are not kept may hold NaN, and so may those of which a rule hides all
    pairs. In the others all queries, keys and values must be finite, and the gradient
    of the outputs: what a rule hides there is multiplied by 0.

    Args:
      q: queries; bfloat16, float16 or float32.
      k: keys, of the dtype of `q`; `kv_heads` divides `heads`.
      v: values, like the keys.
      block_mask: which blocks are kept, `[batch|1, heads|kv_heads|1, queries, keys]`;
        missing leading axes are added. Queries and keys are rounded up to whole blocks
        in it. None keeps all. One mask for all heads that share a key head is faster
        than one for each.
      causal: key j is seen from query i if `j <= i`.
      window: seen only if `i - j < window`, and `j - i < window`; at least 1.
      prefix: keys before this position, in `[0, keys]`, are seen in spite of `causal`
        and `window`: one integer, or int32 `[batch]`.
      segment_ids: int32 `[batch, seq]`, or a pair, for queries and keys: only keys of
        the query's own segment are seen.
      scale: of the products, positive; `1 / sqrt(head_dim)` by default.
      bias: added to the scaled scores of all pairs of a block; float32, on the grid of
        the blocks; -inf weighs a block as if it were dropped. No gradient is given for
        it.
      with_lse: return `(out, lse)`.
      implementation: "reference" (all scores, quadratic memory), "pallas_tpu",
        "mosaic_gpu" (Hopper), or None for the fastest that serves. The kernel for TPU
        rounds float32 operands to bfloat16 unless `jax.default_matmul_precision` asks
        for more; whatever more that is, it does not round them then. What a kernel does
        not take, None gives to the reference; by its name the kernel says why.

    Returns:
      out `[batch, queries, heads, head_dim]` of `q.dtype`; lse float32 `[batch,
      queries, heads]`, the log of the sum of the exponentials of the seen scores, -inf
      where none is seen. Both are differentiable, once.

    Raises:
      TypeError: if `q`, `k` and `v` are not floating and of one dtype, or the mask is
        no `BlockMask`.
      ValueError: if shapes disagree, there is no query or no key, or an option is out
        of range.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> q = k = v = jnp.ones((1, 4, 1, 2))
      >>> kept = jnp.array([[True, False], [True, True]])
      >>> mask = sj.BlockMask.from_blocks(kept, (2, 2))
      >>> out, lse = block_attention(q, k, v, mask, causal=True, with_lse=True)
      >>> print((jnp.exp(lse[0, :, 0] - 2**0.5)).round())  # keys that a query sees
      [1. 2. 3. 4.]

    References:
      Dao et al., 2022, https://arxiv.org/abs/2205.14135, section 3.3 (block-sparse
      FlashAttention). The backward is in two passes, over rows and over columns, so
      that it is deterministic.
    """
    q, k, v = map(jnp.asarray, (q, k, v))
    check_arrays(q, k, v)
    batch, num_queries, heads, head_dim = q.shape
    num_keys, kv_heads = k.shape[1:3]
    if block_mask is None:
        block_mask = _all_blocks(num_queries, num_keys)
    block_mask = _with_lead(block_mask)
    _check_mask(block_mask, q, k)
    if window is not None:
        window = check_int("window", window, least=1)
    query_segments, key_segments = _segments(segment_ids, q, k)
    lowest = None if window is None else 1 - window
    highest = 0 if causal else None if window is None else window - 1
    if prefix is not None:
        prefix = of_sequences("prefix", prefix, batch, 0, num_keys)
    rules = Rules(
        None if lowest is None and highest is None else prefix,  # all is seen then
        query_segments,
        key_segments,
        lowest,
        highest,
        num_keys,
    )
    if bias is not None:
        bias = _check_bias(jnp.asarray(bias), block_mask, batch, heads, kv_heads)
    scale = of_scores(scale, head_dim)
    out, lse = dispatch(
        (q, k, v, block_mask, rules, bias),
        implementation,
        reference=functools.partial(_reference.block_attention, scale=scale),
        kernels={
            "mosaic_gpu": functools.partial(_gpu, scale),
            "pallas_tpu": functools.partial(_tpu, scale),
        },
    )
    return (out, lse.swapaxes(1, 2)) if with_lse else out


def _gpu(scale: float) -> Kernel:
    from sparsejax.ops.block_attention import _mosaic_gpu

    run = functools.partial(_mosaic_gpu.block_attention, scale=scale)
    return Kernel(run, _mosaic_gpu.unsupported_reason)


def _tpu(scale: float) -> Kernel:
    from sparsejax.ops.block_attention import _pallas_tpu

    run = functools.partial(_pallas_tpu.block_attention, scale=scale)
    return Kernel(run, _pallas_tpu.unsupported_reason)


def _all_blocks(num_queries: int, num_keys: int) -> BlockMask:
    blocks = (-(-num_queries // _DEFAULT_BLOCK), -(-num_keys // _DEFAULT_BLOCK))
    kept = jnp.ones(blocks, jnp.bool_)
    return BlockMask.from_blocks(kept, (_DEFAULT_BLOCK, _DEFAULT_BLOCK))


def _with_lead(block_mask: Any) -> BlockMask:
    """Adds the axes of batch and heads where they are missing."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"`block_mask` must be a BlockMask; got {type(block_mask).__name__}. Build "
            "one by `sj.BlockMask.from_dense`."
        )
    lead = block_mask.overflowed.ndim
    if lead > 2:
        raise ValueError(
            "`block_mask` must have at most two leading axes, batch and heads; got one "
            f"of shape {block_mask.shape}."
        )
    return jax.tree.map(lambda a: a[(None,) * (2 - lead)], block_mask)


def _check_mask(block_mask: BlockMask, q, k) -> None:
    batch, num_queries, heads, _ = q.shape
    num_keys, kv_heads = k.shape[1:3]
    batches, of_heads, rows, columns = block_mask.shape
    if batches not in (1, batch) or of_heads not in (1, heads, kv_heads):
        raise ValueError(
            f"`block_mask` must have leading axes [1 or {batch}, 1, {kv_heads} or "
            f"{heads}], batch and heads; got a mask of shape {block_mask.shape}."
        )
    height, width = block_mask.block_shape
    needed = (-(-num_queries // height) * height, -(-num_keys // width) * width)
    if (rows, columns) != needed:
        raise ValueError(
            f"`block_mask` must cover {num_queries} queries and {num_keys} keys in "
            f"whole blocks of {block_mask.block_shape}, so {needed}; got "
            f"{(rows, columns)}. Pad the mask that it is made of."
        )


def _segments(segment_ids: Any, q, k) -> tuple[Any, Any]:
    if segment_ids is None:
        return None, None
    is_pair = isinstance(segment_ids, tuple | list) and len(segment_ids) == 2
    pair = segment_ids if is_pair else (segment_ids,) * 2
    of_queries, of_keys = map(jnp.asarray, pair)
    for name, ids, shape in (
        ("queries", of_queries, q.shape[:2]),
        ("keys", of_keys, k.shape[:2]),
    ):
        if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"`segment_ids` of the {name} must be integers of shape {shape}; got "
                f"{jax.typeof(ids)}. Pass a pair if queries and keys differ."
            )
    return of_queries.astype(jnp.int32), of_keys.astype(jnp.int32)


def _check_bias(bias, block_mask, batch, heads, kv_heads) -> jax.Array:
    blocks = block_mask.blocks_shape[2:]
    fits = (
        bias.ndim == 4
        and bias.shape[0] in (1, batch)
        and bias.shape[1] in (1, heads, kv_heads)
        and bias.shape[2] in (1, blocks[0])
        and bias.shape[3] == blocks[1]
    )
    if not fits:
        raise ValueError(
            "`bias` must have one number for each block, [batch|1, heads|kv_heads|1, "
            f"{blocks[0]}|1, {blocks[1]}]; got shape {bias.shape}."
        )
    bias = jnp.broadcast_to(bias, (*bias.shape[:2], *blocks))
    return jax.lax.stop_gradient(bias.astype(jnp.float32))

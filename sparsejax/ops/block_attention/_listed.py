"""Attention of a few queries to the listed keys of a cache, as in decoding."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax._indexing import map_rows
from sparsejax._lengths import of_sequences
from sparsejax.formats import KeyLists
from sparsejax.ops._platform import Implementation, Kernel, dispatch
from sparsejax.ops.block_attention._arguments import check_arrays, of_scores
from sparsejax.ops.block_attention._reference import of_heads, softmax_of_kept


def listed_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    key_lists: KeyLists,
    length: ArrayLike,
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Softmax attention to the listed keys; no other key or value is read.

    All queries of a head see the same keys: those that its list names and that lie
    below `length`. A query that sees none gets 0. Scores and softmax are float32. Query
    head `i` uses key head `i // (heads / kv_heads)`.

    Args:
      q: the queries, as a rule one a sequence; bfloat16, float16 or float32.
      k: a cache of keys, of the dtype of `q`; `kv_heads` divides `heads`. Slots from
        `length` on must be finite: a page is read whole.
      v: of values, like the keys.
      key_lists: which keys are read, with leading axes `[batch|1, heads|kv_heads|1]`.
      length: keys in the cache, in `[0, slots]`: one integer, or int32 `[batch]`.
      scale: of the products, positive; `1 / sqrt(head_dim)` by default.
      implementation: "reference" (gathers the keys), "mosaic_gpu" (Hopper: pages of a
        multiple of 128 keys, and one list for all heads that share a key head is read
        once), or None for the fastest that serves.

    Returns:
      Of the shape and dtype of `q`. Differentiable, a kernel in reverse mode and once:
      the gradients of q, k and v are those of the reference, which gathers the keys.

    Raises:
      TypeError: if `key_lists` are none, or the arrays' dtypes differ.
      ValueError: if shapes disagree, `length` is not of integers in its range, or the
        scale is not positive.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 6, 1, 4))
      >>> v = jnp.arange(6.0)[None, :, None, None] * k
      >>> kept = jnp.array([[[True, False, True]]])  # two keys a page
      >>> lists = sj.formats.KeyLists.from_mask(kept, page_size=2)
      >>> print(listed_attention(q, k, v, lists, 5)[0, 0, :, 0])  # of 0, 1 and 4
      [1.6666667 1.6666667]
    """
    q, k, v = map(jnp.asarray, (q, k, v))
    check_arrays(q, k, v)
    _check_lists(key_lists, q, k)
    scale = of_scores(scale, q.shape[-1])
    length = of_sequences("length", length, len(q), 0, k.shape[1])
    return dispatch(
        (q, k, v, key_lists, length),
        implementation,
        reference=functools.partial(_gathered, scale=scale),
        kernels={"mosaic_gpu": functools.partial(_gpu, scale)},
    )


def _gathered(q, k, v, key_lists, length, *, scale):
    """Gathers what is listed; the oracle of the kernel too."""
    batch, num_queries, heads, dim = q.shape
    kv_heads, own = k.shape[2], key_lists.num.shape[1]
    # a list for each key head, or for each query head where they differ
    groups = heads if own == heads else kv_heads
    positions, valid = (of_heads(a, groups) for a in key_lists.positions(length))
    shape = (batch, groups, positions.shape[-1])
    positions, valid = (jnp.broadcast_to(a, shape) for a in (positions, valid))
    key_head = jnp.arange(groups)[:, None] // (groups // kv_heads)

    def listed(row, positions):
        # a last page may reach beyond the cache; what is read there does not count
        return row.at[positions, key_head].get(mode="clip")

    # an empty list gathers key 0, which nobody listed, and 0 * NaN is NaN
    keys, values = (
        jnp.where(valid[..., None], map_rows(listed, a, positions), 0) for a in (k, v)
    )
    q = q.reshape(batch, num_queries, groups, heads // groups, dim)
    scores = jnp.einsum(
        "bqhgd,bhpd->bhgqp", q, keys, preferred_element_type=jnp.float32
    )
    weights, _ = softmax_of_kept(scores * scale, valid[:, :, None, None, :])
    out = jnp.einsum("bhgqp,bhpd->bqhgd", weights.astype(v.dtype), values)
    return out.reshape(batch, num_queries, heads, dim)


def _gpu(scale: float) -> Kernel:
    from sparsejax.ops.block_attention import _mosaic_gpu_listed

    run = functools.partial(_with_gradients, _mosaic_gpu_listed.listed_attention, scale)
    return Kernel(run, _mosaic_gpu_listed.unsupported_reason)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradients(kernel, scale, *operands):
    return kernel(*operands, scale=scale)


def _fwd(kernel, scale, *operands):
    return kernel(*operands, scale=scale), operands


def _bwd(kernel, scale, operands, gradient):
    """That of the reference: decoding takes none, and a few queries are soon done."""
    del kernel
    return jax.vjp(functools.partial(_gathered, scale=scale), *operands)[1](gradient)


_with_gradients.defvjp(_fwd, _bwd)


def _check_lists(key_lists, q, k) -> None:
    if not isinstance(key_lists, KeyLists):
        raise TypeError(
            f"`key_lists` must be KeyLists; got {type(key_lists).__name__}. Build them "
            "by `sj.formats.KeyLists.from_mask`."
        )
    (batch, _, heads, _), kv_heads, lead = q.shape, k.shape[2], key_lists.num.shape
    fits = len(lead) == 2 and lead[0] in (1, batch) and lead[1] in (1, heads, kv_heads)
    if not fits:
        raise ValueError(
            f"`key_lists` must have leading axes [1 or {batch}, 1, {kv_heads} or "
            f"{heads}], batch and heads; got {lead}."
        )

"""Attention of a few queries to the listed keys of a cache, as in decoding."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax.formats import KeyLists
from sparsejax.ops._platform import Implementation, Kernel, dispatch


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
      length: keys in the cache, at most `slots`: one integer, or int32 `[batch]`.
      scale: of the products, positive; `1 / sqrt(head_dim)` by default.
      implementation: "reference" (gathers the keys), "mosaic_gpu" (Hopper: pages of a
        multiple of 128 keys, and one list for all heads that share a key head is read
        once), or None for the fastest that serves.

    Returns:
      Of the shape and dtype of `q`.

    Raises:
      TypeError: if `key_lists` are none, or the arrays' dtypes differ.
      ValueError: if shapes disagree, or the scale is not positive.
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
    length = jnp.asarray(length)
    _check(q, k, v, key_lists, length)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"`scale` must be positive and finite; got {scale}.")
    length = jnp.broadcast_to(length.astype(jnp.int32), q.shape[:1])
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
    positions, valid = key_lists.positions(length)
    # a list for each key head, or for each query head where they differ
    groups = heads if own == heads else kv_heads
    shape = (batch, groups, positions.shape[-1])
    positions, valid = (_to_heads(a, shape) for a in (positions, valid))
    key_head = jnp.arange(groups) // (groups // kv_heads)
    rows = jnp.arange(batch)[:, None, None], positions, key_head[:, None]
    # a last page may reach beyond the cache; what is read there does not count
    keys, values = (a.at[rows].get(mode="clip") for a in (k, v))
    q = q.reshape(batch, num_queries, groups, -1, dim)
    scores = jnp.einsum(
        "bqhgd,bhpd->bhgqp", q, keys, preferred_element_type=jnp.float32
    )
    seen = valid[:, :, None, None, :]
    top = jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=-1e30)
    powers = jnp.where(seen, jnp.exp((scores - top) * scale), 0)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    weights = (powers / jnp.where(total > 0, total, 1)).astype(v.dtype)
    values = jnp.where(valid[..., None], values, 0)  # 0 * NaN
    out = jnp.einsum("bhgqp,bhpd->bqhgd", weights, values)
    return out.reshape(batch, num_queries, heads, dim)


def _to_heads(array: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """From lists that batches or heads share to one for each of `shape`."""
    own = array.shape[1]
    repeats = shape[1] // own if own > 1 else 1
    return jnp.broadcast_to(jnp.repeat(array, repeats, axis=1), shape)


def _gpu(scale: float) -> Kernel:
    from sparsejax.ops.block_attention import _mosaic_gpu_listed

    run = functools.partial(_mosaic_gpu_listed.listed_attention, scale=scale)
    return Kernel(run, _mosaic_gpu_listed.unsupported_reason)


def _check(q, k, v, key_lists, length) -> None:
    if not isinstance(key_lists, KeyLists):
        raise TypeError(
            f"`key_lists` must be KeyLists; got {type(key_lists).__name__}. Build them "
            "by `sj.formats.KeyLists.from_mask`."
        )
    for name, array in {"q": q, "k": k, "v": v}.items():
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype != q.dtype:
            raise TypeError(
                "`q`, `k` and `v` must be floating and of one dtype; got "
                f"{jax.typeof(array)} for `{name}`. Cast it."
            )
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "`q` must be [batch, queries, heads, head_dim], `k` and `v` alike [batch, "
            f"slots, kv_heads, head_dim]; got {q.shape}, {k.shape} and {v.shape}."
        )
    batch, _, heads, dim = q.shape
    kv_heads = k.shape[2]
    if k.shape[0] != batch or k.shape[3] != dim or not kv_heads or heads % kv_heads:
        raise ValueError(
            "`q` and `k` must agree on batch and head_dim, and the key heads divide "
            f"the query heads; got {q.shape} and {k.shape}."
        )
    lead = key_lists.num.shape
    if (
        len(lead) != 2
        or lead[0] not in (1, batch)
        or lead[1]
        not in (
            1,
            heads,
            kv_heads,
        )
    ):
        raise ValueError(
            f"`key_lists` must have leading axes [1 or {batch}, 1, {kv_heads} or "
            f"{heads}], batch and heads; got {lead}."
        )
    if not jnp.issubdtype(length.dtype, jnp.integer) or length.shape not in (
        (),
        (batch,),
    ):
        raise ValueError(
            f"`length` must be one integer or one for each of {batch}; got "
            f"{jax.typeof(length)}."
        )

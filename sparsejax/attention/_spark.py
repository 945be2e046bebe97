"""Spark attention: a slice of queries and keys decides which keys are attended."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparsejax import activations, ops
from sparsejax.attention._arguments import check_heads, check_tokens, check_valid


def spark_selection(
    scores: Float[Array, "*batch keys"],
    valid: Bool[Array, "*#batch keys"],
    *,
    k: ArrayLike,
) -> Bool[Array, "*batch keys"]:
    """Selects about `k` keys of each query by a threshold on their predictor scores.

    Kept are the scores above the statistical threshold over the valid keys, and always
    the highest: two-valued or equal scores would leave none. Where that one is tied,
    all of the tied are kept; where at most `k` keys are valid, all of the valid are.

    Args:
      scores: of the predictor, float32. A NaN at a valid key leaves its query none.
      valid: True where the query may see the key; a query without any gets none.
      k: expected number of keys, at least 1; may be traced.

    Returns:
      True where the query attends to the key; a subset of `valid`. No gradient.

    Raises:
      TypeError: if `valid` is not bool, or `k` is not a number.
      ValueError: if `valid` does not fit the scores, or a known `k` is below 1.

    Example:
      >>> scores = jnp.array([[0.0, 0.1, 5.0, 0.2, 9.0]])
      >>> sj.attention.spark_selection(scores, jnp.array([True] * 4 + [False]), k=1)
      Array([[False, False,  True, False, False]], dtype=bool)

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3. That statistics and
      `k / n` count the valid keys alone is our reading; the highest is our addition.
    """
    check_valid(valid, scores.shape)
    return ops.spark_kept(scores, _quantile(k, valid), where=valid)


def _quantile(k: ArrayLike, valid: jax.Array) -> ArrayLike:
    """What `statistical_threshold` multiplies the std of the valid scores by."""
    num = ops.num_entries(valid, where=valid)
    return activations.quantile(activations.check_k(k), num, ddof=0)


def spark_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    valid: Bool[Array, "... keys"],
    *,
    k: ArrayLike,
    split: int,
    implementation: ops.Implementation | None = None,
) -> tuple[
    Float[Array, "batch queries heads value_dim"],
    Bool[Array, "batch heads queries keys"],
]:
    """Attends to about `k` keys a query, found by the first `split` of `head_dim`.

    With the predictor's scores `s1 = q[:split] k[:split] / sqrt(split)` and the others'
    `s2 = q[split:] k[split:] / sqrt(head_dim - split)`, a query gets
    `sum_j softmax_j(s1) softplus(s2_j) v_j` over the selected keys `j`; the products
    with the softplus are not normalised again. Scores and softmax are float32.

    This is the dense form, for training: it computes all scores. Query head `i` uses
    key head `i // (heads / kv_heads)`.

    Args:
      query: rotated queries, each part by itself.
      key: rotated keys; `kv_heads` divides `heads`.
      value: any width.
      valid: True where a query may see a key, for all heads alike (`causal_mask`); the
        first axes may be missing. A query that sees none gets zeros.
      k: expected number of attended keys, see `spark_selection`.
      split: width of the predictor's part, in `[1, head_dim - 1]`.
      implementation: of `sj.ops.spark_weights`.

    Returns:
      The outputs in the dtype of `value`, and which keys were attended.

    Raises:
      TypeError: if `valid` is not bool, or `k` is not a number.
      ValueError: if shapes disagree, or `k` or `split` is out of its range.
      NotImplementedError: if the named implementation cannot take these operands.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 500, 2, 8))
      >>> positions = jnp.arange(500)[None]
      >>> valid = sj.attention.causal_mask(positions, positions)
      >>> y, attended = sj.attention.spark_attention(x, x, x, valid, k=20, split=4)
      >>> y.shape, attended[0, :, 19].sum(axis=-1)  # of 20 keys in sight
      ((1, 500, 2, 8), Array([20, 20], dtype=int32))

    References:
      You et al., 2025, https://arxiv.org/abs/2506.06644, section 3. The scales are not
      stated there.
    """
    check_heads(query, key)
    batch, num_queries, heads, dim = query.shape
    check_tokens("value", value)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "`value` must have the batch, keys and heads of `key`; got "
            f"{value.shape} and {key.shape}."
        )
    check_valid(valid, (batch, 1, num_queries, key.shape[1]))
    if not 0 < split < dim:
        raise ValueError(
            "`split` must be in [1, head_dim - 1]; got "
            f"split={split} and head_dim={dim}."
        )
    valid = jnp.expand_dims(valid, tuple(range(4 - valid.ndim)))[:, :, None]
    scores = _scores_of_parts(query, key, split)
    scales = split**-0.5, (dim - split) ** -0.5
    z = _quantile(k, valid)
    attended = ops.spark_kept(scores[..., 0, :] * scales[0], z, where=valid)
    weights = ops.spark_weights(
        scores,
        z,
        valid,
        scales=scales,
        dtype=value.dtype,
        implementation=implementation,
    )
    out = jnp.einsum("bhgqk,bkhd->bhgqd", weights, value)
    out = jnp.moveaxis(out, 3, 1)
    shape = (batch, heads, num_queries, key.shape[1])
    return out.reshape(batch, num_queries, heads, -1), attended.reshape(shape)


def _scores_of_parts(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    split: int,
) -> Float[Array, "batch kv_heads group queries 2 keys"]:
    """Products of the first `split` of the head, and of the others; float32.

    One product gives both, with zeros in place of the other part: its time is that of
    reading the keys or of writing the scores, and a part of keys would be copied first.
    """
    first = jnp.arange(query.shape[-1]) < split
    query = query.reshape(*query.shape[:2], key.shape[2], -1, 1, query.shape[-1])
    parts = jnp.where(jnp.stack([first, ~first]), query, 0)
    return _products(parts, key)


def scaled_scores(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
) -> Float[Array, "batch kv_heads group queries keys"]:
    """Products over the root of their width, float32; heads by the key that they use.

    Of the predictor's part of queries and keys it gives the scores by which decoding
    selects. `spark_attention` rounds them otherwise, so that a key within a rounding of
    the threshold may be attended in one and not in the other.
    """
    dim = query.shape[-1]
    kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    query = query.reshape(*query.shape[:2], kv_heads, group, dim)
    return _products(query, key) * dim**-0.5


def _products(query, key) -> jax.Array:
    """`[batch, kv_heads, group, queries, ..., keys]` of queries in such groups.

    That is the order in which the product gives them: they are not transposed, which
    would take as long as all else that is done with them.
    """
    query = jnp.moveaxis(query, 1, 3)
    last = query.ndim - 1

    def of_queries(query, key):
        axes = ((last,), (3,)), ((0, 1), (0, 2))
        return jax.lax.dot_general(query, key, axes, preferred_element_type=jnp.float32)

    def of_keys(query, key):
        axes = ((3,), (last,)), ((0, 2), (0, 1))
        products = jax.lax.dot_general(
            key, query, axes, preferred_element_type=jnp.float32
        )
        return jnp.moveaxis(products, 2, -1)

    if math.prod(query.shape[2:last]) >= key.shape[3]:
        return of_queries(query, key)
    # of few queries, a CPU would transpose the keys instead, which are more
    return jax.lax.platform_dependent(query, key, cpu=of_keys, default=of_queries)

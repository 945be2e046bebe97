"""The channels of queries and keys that carry their products, found once, offline."""

import dataclasses
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.attention._arguments import check_same_tokens

ChannelKind: TypeAlias = Literal["qk", "qk_var", "q", "k"]
"""What a channel is ranked by, see `channel_scores`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelChannels:
    """The channels that labels consist of, and the model that they were found for.

    Built by `select_channels`. May have leading axes, of layers; what reads keys or
    queries takes one layer, `jax.tree.map(lambda a: a[layer], channels)`.

    Attributes:
      indices: int32 `[*lead, label_heads, num_channels]`, ascending. A label for each
        key head, or for each query head.
      num_heads: query heads of the model.
      num_kv_heads: key heads.
      head_dim: width of queries and keys.
    """

    indices: jax.Array
    num_heads: int = dataclasses.field(metadata={"static": True})
    num_kv_heads: int = dataclasses.field(metadata={"static": True})
    head_dim: int = dataclasses.field(metadata={"static": True})


def channel_scores(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    kind: ChannelKind = "qk",
) -> Float[Array, "kv_heads group head_dim"]:
    """Scores the channels of one layer by how much they add to products.

    Sums over all tokens, so the scores of several batches add up:
    `jax.tree.map(jnp.add, a, b)` for those of all layers.

    Args:
      query: of a calibration text, rotated, as the labels will be; query head `i` uses
        key head `i // group`.
      key: of the same tokens, rotated.
      kind: what is summed over tokens. "qk": `|q_c k_c|` of a token's own query and
        key; "q": `|q_c|`; "k": `|k_c|`, equal for the heads of a group; "qk_var":
        `q_c ** 2` times the variance of `k_c` over the sequence, since what all keys
        have in common ranks none of them higher.

    Returns:
      float32, for each query head, by the key head that it uses. No gradient.

    Raises:
      ValueError: if shapes disagree or `kind` is unknown.

    Example:
      >>> query, key = jnp.array([[1.0, -3.0], [1.0, 2.0]]), jnp.array([[2.0, 1.0]] * 2)
      >>> query, key = query.reshape(1, 2, 1, 2), key.reshape(1, 2, 1, 2)
      >>> print(sj.attention.channel_scores(query, key))
      [[[4. 5.]]]

    References:
      Yang et al., 2024, https://arxiv.org/abs/2408.07092, and the code released with
      it, which takes "q" and "k" before the rotation, though labels are read after it,
      and of "qk" only the last batch. "qk_var" is ours.
    """
    check_same_tokens(query, key)
    if kind not in get_args(ChannelKind):
        raise ValueError(
            f"`kind` must be one of {get_args(ChannelKind)}; got {kind!r}."
        )
    query, key = jax.lax.stop_gradient((query, key))
    query = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    if kind == "q":
        return jnp.sum(jnp.abs(query), axis=(0, 1))
    if kind == "k":
        sums = jnp.sum(jnp.abs(key), axis=(0, 1))
        return jnp.broadcast_to(sums[:, None], query.shape[2:])
    if kind == "qk":
        parts = jnp.abs(query), jnp.abs(key)
        return jnp.einsum("bskgd,bskd->kgd", *parts, precision="highest")
    parts = jnp.sum(query**2, axis=1), jnp.var(key, axis=1)
    return jnp.einsum("bkgd,bkd->kgd", *parts, precision="highest")


def select_channels(
    scores: Float[Array, "*lead kv_heads group head_dim"],
    *,
    num_channels: int,
    per_head: bool = False,
) -> LabelChannels:
    """Keeps the channels of highest score of each head.

    Args:
      scores: of `channel_scores`, summed over batches; layers may be stacked in front.
      num_channels: length of a label. The paper goes down to 1/16 of `head_dim`.
      per_head: channels, and later lists of keys, for each query head; else for each
        key head, by the sum over the query heads that use it, and its keys are read
        once for all of them.

    Returns:
      Channels `[*lead, heads | kv_heads, num_channels]`. Of equal scores the lower
      channel wins.

    Raises:
      ValueError: if `scores` have too few axes or `num_channels` is out of range.

    Example:
      >>> scores = jnp.array([4.0, 9.0, 1.0, 6.0]).reshape(1, 1, 4)
      >>> print(sj.attention.select_channels(scores, num_channels=2).indices)
      [[1 3]]
    """
    if scores.ndim < 3:
        raise ValueError(
            "`scores` must be [*lead, kv_heads, group, head_dim]; got shape "
            f"{scores.shape}."
        )
    *lead, kv_heads, group, dim = scores.shape
    if not 1 <= num_channels <= dim:
        raise ValueError(
            f"`num_channels` must be in [1, {dim}], the channels of a head; got "
            f"{num_channels}."
        )
    if per_head:
        ranked = scores.reshape(*lead, kv_heads * group, dim)
    else:
        ranked = scores.sum(axis=-2)
    _, best = jax.lax.top_k(ranked, num_channels)
    indices = jnp.sort(best, axis=-1).astype(jnp.int32)
    return LabelChannels(indices, kv_heads * group, kv_heads, dim)


def interleaved_channels(channels: LabelChannels) -> LabelChannels:
    """Names the same channels in a model that rotates neighbours `(2 i, 2 i + 1)`.

    Args:
      channels: of a model that rotates the pairs `(i, i + head_dim / 2)`, as
        `sj.nn.apply_rope` does, with the same weights in that order.

    Example:
      >>> scores = jnp.array([4.0, 9.0, 1.0, 6.0]).reshape(1, 1, 4)
      >>> channels = sj.attention.select_channels(scores, num_channels=2)
      >>> print(sj.attention.interleaved_channels(channels).indices)
      [[2 3]]
    """
    dim = channels.head_dim
    moved = 2 * channels.indices % dim + 2 * channels.indices // dim
    return dataclasses.replace(channels, indices=jnp.sort(moved, axis=-1))

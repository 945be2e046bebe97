"""Double Sparsity: a few channels of each key tell which few keys a query reads.

Labels, the channels of `_label_channels`, lie beside the cache. The query's label times
theirs ranks the keys; the attention itself uses all channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparsejax.attention import _arguments
from sparsejax.attention._label_channels import LabelChannels
from sparsejax.attention._ranking import ends, keep_highest, nan_last
from sparsejax.attention._slots import change_slots
from sparsejax.formats import KeyLists


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyLabels:
    """The labels of the keys of a cache.

    Built by `key_labels`, kept up by `append_label`. Beside the keys it takes
    `num_channels / head_dim` of their size, times the query heads of a key head where
    each of them has labels of its own.

    Attributes:
      values: `[batch, slots, label_heads, num_channels]`, of the dtype of the keys; or
        uint8 codes with `bits`, a byte each however few the bits.
      low: float32 `[batch, slots, label_heads]`, what code 0 stands for; None without
        `bits`.
      step: likewise, what a code adds.
      lengths: int32 `[batch]`, keys of each sequence.
      channels: which channels they are.
      bits: of a code; None for labels in full precision.
    """

    values: jax.Array
    low: jax.Array | None
    step: jax.Array | None
    lengths: jax.Array
    channels: LabelChannels
    bits: int | None = dataclasses.field(metadata={"static": True})


def key_labels(
    key: Float[Array, "batch slots kv_heads head_dim"],
    channels: LabelChannels,
    *,
    lengths: ArrayLike | None = None,
    bits: int | None = None,
) -> KeyLabels:
    """Labels the keys of a cache.

    Args:
      key: rotated keys, or a cache of them with slots for more.
      channels: of this layer.
      lengths: int32 `[batch]` or one integer, in `[0, slots]`: keys that are there;
        all by default.
      bits: codes of so many bits, 1 to 8, rounded between the least and the greatest
        entry of each label; None for full precision.

    Raises:
      ValueError: if `channels` are of another model or of several layers, `lengths` are
        not integers in their range that fit the keys, or `bits` is out of range.

    Example:
      >>> key = jnp.array([4.0, 9.0, 1.0, 6.0]).reshape(1, 1, 1, 4)
      >>> scores = jnp.array([4.0, 9.0, 1.0, 6.0]).reshape(1, 1, 4)
      >>> channels = sj.attention.select_channels(scores, num_channels=2)
      >>> print(sj.attention.key_labels(key, channels).values)
      [[[[9. 6.]]]]
    """
    _check_channels("key", key, channels, channels.num_kv_heads)
    if bits is not None and not 1 <= bits <= 8:
        raise ValueError(f"`bits` must be in [1, 8], or None; got {bits}.")
    lengths = _arguments.cache_lengths(key, lengths)
    stored = _stored(_label(jax.lax.stop_gradient(key), channels), bits)
    return KeyLabels(*stored, lengths, channels, bits)


def append_label(
    labels: KeyLabels, key: Float[Array, "batch 1 kv_heads head_dim"]
) -> KeyLabels:
    """Labels the key of the next position.

    Args:
      labels: with a slot for it: a label beyond the slots is dropped.
      key: rotated; written to the cache by its owner.

    Raises:
      ValueError: if `key` does not fit `labels`.
    """
    channels = labels.channels
    _arguments.check_next(
        "key", key, len(labels.values), channels.num_kv_heads, channels.head_dim
    )
    label = _label(jax.lax.stop_gradient(key), channels)

    def written(old, new):
        return change_slots(old, labels.lengths, lambda _: new)

    olds = labels.values, labels.low, labels.step
    values, low, step = jax.tree.map(written, olds, _stored(label, labels.bits))
    lengths = labels.lengths + 1
    return dataclasses.replace(
        labels, values=values, low=low, step=step, lengths=lengths
    )


def label_scores(
    query: Float[Array, "batch 1 heads head_dim"], labels: KeyLabels
) -> Float[Array, "batch label_heads slots"]:
    """Multiplies the label of the query with those of the keys.

    With `bits` the label of the query is rounded as theirs are. The products are not
    scaled: only their order is used.

    Args:
      query: of the position at hand, rotated.
      labels: of the keys so far.

    Returns:
      float32; where labels are for each key head, the sum over the query heads that use
      it. -inf where there is no key. No gradient.

    Raises:
      ValueError: if the channels of `labels` are of another model.
    """
    _check_channels("query", query, labels.channels, labels.channels.num_heads)
    if query.shape[:2] != (len(labels.values), 1):
        raise ValueError(
            "`query` must be of one position in each sequence of `labels`, "
            f"[{len(labels.values)}, 1, heads, head_dim]; got {query.shape}."
        )
    label = _label(jax.lax.stop_gradient(query), labels.channels)
    label = _values(*_stored(label, labels.bits))[:, 0]
    batch, num_slots, label_heads, num_channels = labels.values.shape
    label = label.reshape(batch, label_heads, -1, num_channels).sum(axis=2)
    values = _values(labels.values, labels.low, labels.step)
    scores = jnp.einsum("bhc,bshc->bhs", label, values, precision="highest")
    there = jnp.arange(num_slots)[None, None] < labels.lengths[:, None, None]
    return jnp.where(there, scores, -jnp.inf)


def double_sparsity(
    query: Float[Array, "batch 1 heads head_dim"],
    labels: KeyLabels,
    *,
    num_kept: int = 256,
    sink: int = 0,
    local: int = 0,
) -> KeyLists:
    """Keeps the keys whose labels score highest for a decoding query.

    Nothing is evicted: the next query chooses anew.

    Args:
      query: of the last position in `labels`, rotated.
      labels: of the keys so far, the query's own included.
      num_kept: keys of a list, exactly; all of them where there are fewer. At most the
        slots. Of equal scores the earlier key wins; a NaN is kept last.
      sink: first keys that are always kept; they count among `num_kept`. The paper
        forces none.
      local: last keys likewise, the query's own the first of them.

    Returns:
      Lists of single keys, `[batch, label_heads, num_kept]`. No gradient.

    Raises:
      ValueError: as `label_scores`, or if `num_kept` is more than the slots or below
        what is always kept.

    Example:
      >>> key = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> scores = sj.attention.channel_scores(key, key)
      >>> channels = sj.attention.select_channels(scores, num_channels=2)
      >>> labels = sj.attention.key_labels(key, channels)
      >>> lists = sj.attention.double_sparsity(key[:, -1:], labels, num_kept=3)
      >>> print(lists.indices[0], lists.density(64)[0])
      [[19 21 45]
       [ 9 41 53]] [0.046875 0.046875]

    References:
      Yang et al., 2024, https://arxiv.org/abs/2408.07092, and the code released with
      it, which has labels and lists for each query head; its models keep the first two
      layers dense. One list for the heads that share a key head, and `sink` and
      `local`, are ours.
    """
    scores = label_scores(query, labels)
    num_slots = scores.shape[-1]
    _arguments.check_ends(local, sink, num_slots)
    least = max(1, min(local + sink, num_slots))
    _arguments.check_count(
        "num_kept",
        num_kept,
        least,
        num_slots,
        "keys of the cache",
        always=_arguments.ENDS,
    )
    there, always = ends(num_slots, labels.lengths, sink=sink, local=local)
    kept = keep_highest(nan_last(scores, there), num_kept, always=always)
    return KeyLists.from_mask(kept & there, capacity=num_kept)


def _label(x: jax.Array, channels: LabelChannels) -> jax.Array:
    """The channels of each head, `[batch, seq, max(heads, label_heads), channels]`."""
    heads, label_heads = x.shape[2], channels.indices.shape[0]
    every = jnp.arange(max(heads, label_heads))
    head, label_head = (every // (len(every) // n) for n in (heads, label_heads))
    return x[:, :, head[:, None], channels.indices[label_head]]


def _stored(label: jax.Array, bits: int | None):
    """Values, or codes with what they stand for."""
    if bits is None:
        return label, None, None
    label = label.astype(jnp.float32)
    low, high = label.min(axis=-1), label.max(axis=-1)
    most = 2**bits - 1
    step = (high - low) / most
    codes = (label - low[..., None]) / jnp.where(step > 0, step, 1)[..., None]
    codes = jnp.clip(jnp.round(codes), 0, most).astype(jnp.uint8)
    return codes, low, step


def _values(stored: jax.Array, low: jax.Array | None, step: jax.Array | None):
    stored = stored.astype(jnp.float32)
    if low is None or step is None:
        return stored
    return low[..., None] + step[..., None] * stored


def _check_channels(name: str, x, channels: LabelChannels, heads: int) -> None:
    """Raises unless `x` is of the model that the channels were found for."""
    if channels.indices.ndim != 2:
        raise ValueError(
            "`channels` must be of one layer, [label_heads, num_channels]; got shape "
            f"{channels.indices.shape}. Take a layer of them by `jax.tree.map`."
        )
    want = (heads, channels.head_dim)
    if x.ndim != 4 or x.shape[2:] != want:
        raise ValueError(
            f"`{name}` must be [batch, seq, {want[0]}, {want[1]}], of the model that "
            f"`channels` were calibrated on; got shape {x.shape}. Calibrate on this "
            "model."
        )

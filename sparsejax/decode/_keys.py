"""Selectors that choose anew for each token, by what they keep of the rotated keys."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax import attention
from sparsejax.decode._selector import LayerTokens, in_slots
from sparsejax.formats import KeyLists
from sparsejax.models import Decoder


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Quest:
    """Reads the pages whose keys may score highest, and the page of the query.

    Attributes:
      num_kept: earlier pages; at most all but one of the pages of the cache.
      page_size: keys of a page; a cache with fewer slots is one page. The kernel for
        Hopper takes multiples of 128; the paper's 16 fits the query closer.

    References:
      See `sj.attention.quest`.
    """

    num_kept: int = 64
    page_size: int = 16

    def start(
        self, tokens: LayerTokens, lengths: jax.Array, num_slots: int
    ) -> attention.PageBounds:
        """Bounds the keys of each page."""
        key = in_slots(tokens.key, num_slots)
        page_size = min(self.page_size, num_slots)  # all of a smaller cache
        return attention.page_bounds(key, lengths=lengths, page_size=page_size)

    def append(
        self, known: attention.PageBounds, tokens: LayerTokens
    ) -> attention.PageBounds:
        """Widens the bounds of the last page, or begins the next."""
        return attention.append_key(known, tokens.key)

    def select(self, known: attention.PageBounds, tokens: LayerTokens) -> KeyLists:
        """See `sj.attention.quest`; fewer pages where the cache has fewer."""
        num_kept = min(self.num_kept, known.low.shape[1] - 1)
        return attention.quest(tokens.query, known, num_kept=num_kept)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoubleSparsity:
    """Reads the keys whose labels, a few of their channels, score highest.

    Calibrated for one layer: give `prepare` one for each.

    Attributes:
      channels: of this layer, from `sj.attention.select_channels`.
      num_kept: keys; like `sink` and `local` at most those of the cache.
      sink: first keys that are always kept; the paper forces none.
      local: last keys likewise, the query's own the first of them.
      bits: of an entry of a label; None for the precision of the keys.

    Example:
      >>> from flax import nnx
      >>> config = sj.models.DecoderConfig(num_layers=2)
      >>> model = sj.models.Decoder(config, rngs=nnx.Rngs(0))
      >>> text = jnp.array([[72, 105, 33, 10]])
      >>> scores = sj.decode.channel_scores(model, text)
      >>> channels = [sj.attention.select_channels(s, num_channels=4) for s in scores]
      >>> # the first layer reads all
      >>> select = [None, sj.decode.DoubleSparsity(channels[1], num_kept=16)]
      >>> ready = sj.decode.prepare(model, select_keys=select)

    References:
      See `sj.attention.double_sparsity`.
    """

    channels: attention.LabelChannels
    num_kept: int = dataclasses.field(default=256, metadata={"static": True})
    sink: int = dataclasses.field(default=0, metadata={"static": True})
    local: int = dataclasses.field(default=0, metadata={"static": True})
    bits: int | None = dataclasses.field(default=None, metadata={"static": True})

    def start(
        self, tokens: LayerTokens, lengths: jax.Array, num_slots: int
    ) -> attention.KeyLabels:
        """Labels the keys; raises if `channels` are of another model."""
        key = in_slots(tokens.key, num_slots)
        return attention.key_labels(key, self.channels, lengths=lengths, bits=self.bits)

    def append(
        self, known: attention.KeyLabels, tokens: LayerTokens
    ) -> attention.KeyLabels:
        """Labels the next key."""
        return attention.append_label(known, tokens.key)

    def select(self, known: attention.KeyLabels, tokens: LayerTokens) -> KeyLists:
        """See `sj.attention.double_sparsity`; fewer keys where the cache has fewer."""
        num_slots = known.values.shape[1]
        return attention.double_sparsity(
            tokens.query,
            known,
            num_kept=min(self.num_kept, num_slots),
            sink=min(self.sink, num_slots),
            local=min(self.local, num_slots),
        )


def channel_scores(
    model: Decoder,
    tokens: Int[Array, "batch seq"],
    *,
    kind: attention.ChannelKind = "qk",
) -> tuple[Float[Array, "kv_heads group head_dim"], ...]:
    """Scores the channels of every layer on a calibration text.

    Those of several batches add up, `jax.tree.map(jnp.add, a, b)`. For speed call it
    under `nnx.jit`.

    Args:
      model: attends to all it would in training.
      tokens: without padding: every one counts.
      kind: see `sj.attention.channel_scores`.

    Returns:
      For each layer the scores that `sj.attention.select_channels` takes.

    Raises:
      ValueError: if `kind` is unknown.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = model.embed(tokens)
    scores = []
    for block in model.blocks:
        query, key, _ = block.attention.project(block.attention_norm(x), positions)
        scores.append(attention.channel_scores(query, key, kind=kind))
        x = block(x, positions)
    return tuple(scores)

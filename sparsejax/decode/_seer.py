"""SeerAttention's gate in decoding: trained to know which blocks a token reads."""

import dataclasses

import jax

from sparsejax import attention
from sparsejax.decode._selector import LayerTokens, in_slots
from sparsejax.formats import KeyLists


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seer:
    """Reads the blocks that a trained gate scores highest, and the token's own block.

    Trained for one layer: give `prepare` one for each. One of `num_kept` and
    `threshold` is set.

    Attributes:
      gate: of this layer, trained by `sj.attention.seer_decode_scores`.
      block: keys of a block, as in training. The kernel for Hopper takes multiples of
        128.
      num_kept: blocks of a token, its own among them; at most those of the cache. So
        many tokens over `block`.
      threshold: keep the blocks whose softmax of scores is above it; lists have room
        for all.

    Example:
      >>> from flax import nnx
      >>> config = sj.models.DecoderConfig(num_layers=1, num_heads=4, head_dim=16)
      >>> model = sj.models.Decoder(config, rngs=nnx.Rngs(0))
      >>> gate = sj.attention.init_seer_decode_gate(
      ...     4, model.blocks[0].attention.num_kv_heads, 16, key=jax.random.key(0)
      ... )
      >>> select = [sj.decode.Seer(gate, block=8, num_kept=2)]
      >>> ready = sj.decode.prepare(model, select_keys=select)
      >>> prompts = jnp.arange(20).reshape(1, 20)
      >>> sj.decode.generate(ready, prompts, num_tokens=3).tokens.shape
      (1, 3)

    References:
      See `sj.attention.seer_decode_topk`.
    """

    gate: attention.SeerDecodeGate
    block: int = dataclasses.field(default=64, metadata={"static": True})
    num_kept: int | None = dataclasses.field(default=None, metadata={"static": True})
    threshold: float | None = dataclasses.field(default=None, metadata={"static": True})

    def start(
        self, tokens: LayerTokens, lengths: jax.Array, num_slots: int
    ) -> attention.SeerCache:
        """Pools and projects the finished blocks.

        Raises:
          ValueError: if not one of `num_kept` and `threshold` is set, the gate is of
            another model, or `block` is more than the cache.
        """
        if (self.num_kept is None) == (self.threshold is None):
            raise ValueError(
                "one of `num_kept` and `threshold` must be set; got "
                f"num_kept={self.num_kept} and threshold={self.threshold}."
            )
        key = in_slots(tokens.unrotated_key, num_slots)
        return attention.seer_cache(
            self.gate,
            key,
            block=self.block,
            rotate=tokens.rotate,
            lengths=lengths,
        )

    def append(
        self, known: attention.SeerCache, tokens: LayerTokens
    ) -> attention.SeerCache:
        """Takes in the next key; a block that it finishes is pooled and projected."""
        return attention.append_to_seer_cache(
            self.gate, known, tokens.unrotated_key, rotate=tokens.rotate
        )

    def select(self, known: attention.SeerCache, tokens: LayerTokens) -> KeyLists:
        """See `sj.attention.seer_decode_topk` and `seer_decode_threshold`."""
        scores = attention.seer_cached_scores(
            self.gate, known, tokens.unrotated_query, rotate=tokens.rotate
        )
        if self.num_kept is not None:
            return attention.seer_decode_topk(
                scores,
                num_kept=min(self.num_kept, scores.shape[-1]),
                block=self.block,
                positions=tokens.positions,
            )
        assert self.threshold is not None  # by `start`
        return attention.seer_decode_threshold(
            scores,
            threshold=self.threshold,
            block=self.block,
            positions=tokens.positions,
        )

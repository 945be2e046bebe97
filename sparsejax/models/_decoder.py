"""A decoder-only transformer: tokens in, next-token logits out."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.models._config import DecoderConfig


class DecoderBlock(nnx.Module):
    """One pre-norm layer: attention, then the feed-forward part, each on a residual."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        numerics = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.attention_norm = _rms_norm(config, rngs)
        self.attention = config.attention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_base=config.rope_base,
            **numerics,
            rngs=rngs,
        )
        self.ffn_norm = _rms_norm(config, rngs)
        self.ffn = config.ffn(config.d_model, config.d_ff, **numerics, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch seq d_model"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq d_model"]:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nnx.Module):
    """Token embedding, `num_layers` blocks, a last norm, and the logits.

    Every weight is a leaf `kernel` `[d_in, d_out]`, `scale` or `embedding`, so the
    default `where` of the weight methods governs the kernels alone.

    Args:
      config: sizes, numerics and the kinds of layers.
      rngs: draws the weights.

    Example:
      >>> model = Decoder(DecoderConfig(num_layers=1), rngs=nnx.Rngs(0))
      >>> model(jnp.array([[72, 105]])).shape
      (1, 2, 256)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.d_model,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List(
            DecoderBlock(config, rngs=rngs) for _ in range(config.num_layers)
        )
        self.norm = _rms_norm(config, rngs)
        if not config.tie_embeddings:
            self.head = nnx.Linear(
                config.d_model,
                config.vocab_size,
                use_bias=False,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Computes the float32 logits of the token after each of `tokens`.

        Args:
          tokens: in `[0, vocab_size)`; a token sees itself and those before it.
          positions: of each token; 0, 1, 2, ... by default.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, positions)
        x = self.norm(x)
        if self.config.tie_embeddings:
            embedding = self.embed.embedding[...].astype(x.dtype)
            return jnp.dot(x, embedding.T, preferred_element_type=jnp.float32)
        return self.head(x)


def _rms_norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.d_model,
        epsilon=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )

"""A decoder-only transformer: tokens in, next-token logits out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import nn
from sparsejax._promotion import common_dtype
from sparsejax.models._config import DecoderConfig


class DecoderBlock(nnx.Module):
    """One pre-norm layer: attention, then the feed-forward part, each on a residual.

    Args:
      config: of the whole decoder.
      layer: which one this is, counted from 0.
      rngs: draws the weights.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        numerics = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.attention_norm = _rms_norm(config, rngs)
        self.attention = config.attention_of(layer)(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_base=config.rope_base,
            **numerics,
            rngs=rngs,
        )
        self.ffn_norm = _rms_norm(config, rngs)
        self.ffn = config.ffn_of(layer)(
            config.d_model, config.d_ff, **numerics, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        with_density: bool = False,
    ) -> Any:
        """Applies the layer; with `with_density`, `(y, {"attention": .., "ffn": ..})`.

        See `Decoder`.
        """
        given = {} if lengths is None else {"lengths": lengths}
        attention = functools.partial(self.attention, **given)
        if not with_density:
            x = x + attention(self.attention_norm(x), positions)
            return x + self.ffn(self.ffn_norm(x))
        y, attended = attention(self.attention_norm(x), positions, with_density=True)
        x = x + y
        y, active = self.ffn(self.ffn_norm(x), with_density=True)
        return x + y, {"attention": attended, "ffn": active}


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
        self.embed = _Embedding(config, rngs)
        self.blocks = nnx.List(
            DecoderBlock(config, layer, rngs=rngs) for layer in range(config.num_layers)
        )
        self.norm = _rms_norm(config, rngs)
        if not config.tie_embeddings:
            self.head = nnx.Linear(
                config.d_model,
                config.vocab_size,
                use_bias=False,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        *,
        lengths: Int[Array, " batch"] | None = None,
        with_density: bool = False,
    ) -> Any:
        """Computes the float32 logits of the token after each of `tokens`.

        Args:
          tokens: in `[0, vocab_size)`; a token sees itself and those before it.
          positions: of each token; 0, 1, 2, ... by default.
          lengths: tokens of each sequence; what comes after them only fills it up, and
            its logits mean nothing. Those of the others do not depend on it then, also
            where a layer selects for several tokens at once. All by default.
          with_density: return `(logits, densities)`.

        Returns:
          logits `[batch, seq, vocab]`; densities float32 `[num_layers, batch, seq]` by
          name: `"attention"`, the share of the tokens in sight that was attended (a
          mean over heads), and `"ffn"`, the share of the neurons that are active.

        Raises:
          ValueError: if `tokens` has other axes.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        x = self.embed(tokens)
        if x.ndim != 3:
            raise ValueError(
                f"`tokens` must be [batch, seq]; got shape {tokens.shape}. Of one "
                "sequence give `tokens[None]`, a batch of one."
            )
        densities = []
        for block in self.blocks:
            if with_density:
                x, density = block(x, positions, lengths=lengths, with_density=True)
                densities.append(density)
            else:
                x = block(x, positions, lengths=lengths)
        logits = self.logits(x)
        if not with_density:
            return logits
        return logits, jax.tree.map(lambda *layers: jnp.stack(layers), *densities)

    def logits(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Reads the float32 logits off the last layer's output."""
        x = self.norm(x)
        if self.config.tie_embeddings:
            kernel = self.embed.embedding[...].T
        elif nn.is_plain_linear(self.head):
            kernel = self.head.kernel[...]
        else:  # what a user put there
            return self.head(x).astype(jnp.float32)
        product = _product_16 if x.dtype.itemsize < 4 else _product
        return product(x, kernel.astype(x.dtype))


class _Embedding(nnx.Embed):
    """`nnx.Embed` whose gradient adds up in float32, whatever the decoder's dtype.

    A frequent token has thousands of terms. A sum in bfloat16 would lose most of them,
    and a GPU makes it by compare and swap: 100 ms of a step of 110 ms on an H200, where
    16384 tokens were bytes of text. On a mesh of explicit axes rows are cut as tokens.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        super().__init__(
            config.vocab_size,
            config.d_model,
            dtype=common_dtype(config.dtype, jnp.float32),
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.rows_dtype = config.dtype

    def __call__(self, inputs, out_sharding=None):
        sharding = jax.typeof(inputs).sharding
        if out_sharding is None and any(axis is not None for axis in sharding.spec):
            spec = jax.sharding.PartitionSpec(*sharding.spec, None)
            out_sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
        rows = _rows(self.embedding[...], inputs, self.dtype, out_sharding)
        return rows.astype(self.rows_dtype)


# jitted: without, an eager call would cast the whole table
@functools.partial(jax.jit, static_argnums=(2, 3))
def _rows(table, tokens, dtype, out_sharding):
    rows = table.astype(dtype).at[tokens]
    return rows.get(mode="fill", fill_value=jnp.nan, out_sharding=out_sharding)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


@jax.custom_jvp
def _product_16(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_product` of 16-bit operands, whose gradient is a product of such too.

    The gradient of float32 logits is float32: autodiff would multiply in float32, which
    took a sixth of the time of a training step.
    """
    return _product(x, kernel)


@_product_16.defjvp
def _product_16_jvp(operands, tangents):
    (x, kernel), (dx, dkernel) = operands, tangents
    tangent = jnp.dot(dx, kernel) + jnp.dot(x, dkernel)  # transposes to 16 bits
    return _product_16(x, kernel), tangent.astype(jnp.float32)


def _rms_norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.d_model,
        epsilon=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )

"""The one description of a decoder: sizes, numerics, and the layers it is made of."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sparsejax import nn


class AttentionFactory(Protocol):
    """Builds the attention of one layer; `sj.nn.Attention` is one.

    `functools.partial` binds settings of its own, as `k` of `sj.nn.SparkAttention`.
    What it returns is called as those are: `layer(x, positions)` gives activations,
    `layer(x, positions, with_density=True)` also the share that was attended.
    """

    def __call__(
        self,
        d_model: int,
        num_heads: int,
        /,
        *,
        num_kv_heads: int,
        head_dim: int,
        rope_base: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> Callable[..., Any]: ...


class FFNFactory(Protocol):
    """Builds the feed-forward part of one layer; `sj.nn.GatedFFN` is one.

    `functools.partial` binds settings of its own, such as `k` of `sj.nn.SparkFFN`.
    What it returns is called as those are: `layer(x)` gives activations,
    `layer(x, with_density=True)` also the share of the neurons that are active.
    """

    def __call__(
        self,
        d_model: int,
        d_ff: int,
        /,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> Callable[..., Any]: ...


_Factory = TypeVar("_Factory", AttentionFactory, FFNFactory)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Settings of a `Decoder`; the defaults make a Llama-type model of 0.8M weights.

    Attributes:
      vocab_size: number of tokens; 256 for bytes.
      d_model: width of the residual stream.
      num_layers: number of blocks.
      num_heads: query heads of a layer.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: width of a head; even.
      d_ff: neurons of a feed-forward layer.
      rope_base: base of the rotary angles, see `apply_rope`.
      norm_eps: added to the mean square in RMSNorm.
      tie_embeddings: read the logits off the embedding instead of an own kernel.
      attention: builds the attention of every layer; a tuple has one for each.
      ffn: builds the feed-forward part of every layer; a tuple has one for each.
      dtype: of the computation; norm statistics, softmax and logits are float32.
      param_dtype: of the weights.

    Raises:
      ValueError: if a size is below 1, `head_dim` is odd, `num_kv_heads` does not
        divide `num_heads`, `rope_base` or `norm_eps` is not positive, or a tuple has
        not one factory for each layer.
      TypeError: if a size is no integer, or `attention` or `ffn` no factory and no
        tuple of such.

    Example:
      >>> import functools
      >>> spark = functools.partial(sj.nn.SparkFFN, k=32, split=64)
      >>> config = DecoderConfig(num_layers=2, ffn=(sj.nn.GatedFFN, spark))
      >>> config.ffn_of(1) is spark
      True
    """

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    d_ff: int = 384
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention: AttentionFactory | tuple[AttentionFactory, ...] = nn.Attention
    ffn: FFNFactory | tuple[FFNFactory, ...] = nn.GatedFFN
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not isinstance(value, int | np.integer):
                raise TypeError(f"`{field.name}` must be an integer; got {value!r}.")
            if field.type is int and value < 1:
                raise ValueError(f"`{field.name}` must be at least 1; got {value}.")
            if field.type is float and not 0 < value < math.inf:
                raise ValueError(
                    f"`{field.name}` must be positive and finite; got {value}."
                )
            if field.type in (int, float):  # none of NumPy's, which no JSON takes
                object.__setattr__(self, field.name, field.type(value))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "`num_kv_heads` must divide `num_heads`; got "
                f"num_kv_heads={self.num_kv_heads} and num_heads={self.num_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even for rotary pairs; got {self.head_dim}."
            )
        for name in ("attention", "ffn"):
            factories = getattr(self, name)
            several = isinstance(factories, tuple)
            if several and len(factories) != self.num_layers:
                raise ValueError(
                    f"`{name}` must have one factory for each of the {self.num_layers} "
                    f"layers, or be one for all; got {len(factories)}."
                )
            if not all(map(callable, factories if several else [factories])):
                raise TypeError(
                    f"`{name}` must be a factory, such as a class of `sj.nn`, or a "
                    f"tuple of one for each layer; got {factories!r}."
                )

    def attention_of(self, layer: int) -> AttentionFactory:
        """Gives the factory of that layer, counted from 0."""
        return _of_layer(self.attention, layer)

    def ffn_of(self, layer: int) -> FFNFactory:
        """Gives the factory of that layer, counted from 0."""
        return _of_layer(self.ffn, layer)


def _of_layer(factories: _Factory | tuple[_Factory, ...], layer: int) -> _Factory:
    return factories[layer] if isinstance(factories, tuple) else factories

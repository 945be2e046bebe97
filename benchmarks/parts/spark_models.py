"""Decoders of as many weights, dense and Spark: what the benchmarks compare.

The dense ones have gated FFNs of 4 d_model neurons; the Spark ones have 6 d_model, of
which 8 % are used, and half of the input and half of each head predict.
"""

import dataclasses
import functools
from typing import Any

import jax

from sparsejax import models, nn

DENSITY = 0.08


@dataclasses.dataclass(frozen=True)
class Size:
    """Of both models."""

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


def dense(size: Size, **numerics: Any) -> models.DecoderConfig:
    return models.DecoderConfig(
        **dataclasses.asdict(size),
        d_ff=4 * size.d_model,
        attention=dense_attention(),
        **numerics,
    )


def dense_attention() -> Any:
    """The fastest there is: on a GPU, prompts and training sequences by cuDNN."""
    on_gpu = jax.default_backend() == "gpu"
    return functools.partial(nn.Attention, implementation="cudnn" if on_gpu else None)


def spark(
    size: Size,
    *,
    attended: int | None = None,
    implementation: str | None = None,
    **numerics: Any,
) -> models.DecoderConfig:
    """Spark FFNs, and Spark attention to `attended` keys unless that is None."""
    d_ff = 6 * size.d_model
    ffn = functools.partial(
        nn.SparkFFN,
        k=DENSITY * d_ff,
        split=size.d_model // 2,
        implementation=implementation,
    )
    attention = dense_attention()
    if attended is not None:
        attention = functools.partial(
            nn.SparkAttention, k=attended, split=size.head_dim // 2
        )
    return models.DecoderConfig(
        **dataclasses.asdict(size), d_ff=d_ff, ffn=ffn, attention=attention, **numerics
    )

"""Dense and Spark decoders of as many weights, and what a token costs in each.

`benchmarks.spark_quality` says what they are. A gated FFN has 4 d_model neurons, and so
has a Spark one whose gate sees all inputs; one with a split has 6 d_model.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks.parts import spark_models
from sparsejax import models, nn
from sparsejax.typing import Params

DENSITY = spark_models.DENSITY
DENSE, SPARK, BOTH = "dense", "Spark FFN", "Spark FFN and attention"
GEMMA, EXACT, BLOCK = "Gemma 3n form", "exact top-k", "block top-k"
NAMES = (DENSE, SPARK, BOTH, GEMMA, EXACT, BLOCK)

# What Spark attention needs: both, with other numbers of keys or other heads.
KEYS = (2, 4, 8)  # times as many
ALL_KEYS, WIDE_HEADS = "all keys", "half as many heads, twice as wide"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all kinds together."""

    model: spark_models.Size
    split: int  # inputs of an FFN that predict
    attended: int
    block: int  # neurons of a tile


class SelectedFFN(nn.SparkFFN):
    """A Spark FFN with another selector, which may use tiles of neurons as a whole.

    Args:
      args: as of `nn.SparkFFN`, and its other options.
      select: (gate, k) -> values, mask.
      block: neurons of a tile; one that has an activation is used.
    """

    def __init__(
        self,
        *args: int,
        select: Callable[..., tuple[jax.Array, jax.Array]],
        block: int = 1,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self.select, self.block = select, block

    def gate_values(self, x, *, k=None):
        scores = self.gate(self.parts(x)[0])
        return self.activation(self.select(scores, self.k if k is None else k)[0])

    def hidden(self, x, *, k=None):
        return self.gate_values(x, k=k) * self.up(self.parts(x)[1])

    def __call__(self, x, *, k=None, with_density=False):
        hidden = self.hidden(x, k=k)
        y = self.down(hidden)
        if not with_density:
            return y
        used = (hidden != 0).reshape(*hidden.shape[:-1], -1, self.block).any(axis=-1)
        return y, jnp.mean(used, axis=-1, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model that is compared."""

    config: models.DecoderConfig
    skips: bool = True  # neurons that its gate makes 0
    head_split: int = 0  # of a head, what predicts
    most_used: float = 1.0  # share of its neurons that a token may use


def num_keys(settings: Settings, times: int) -> str:
    return f"{times * settings.attended} keys"


def attention_names(settings: Settings) -> tuple[str, ...]:
    """Of the kinds that differ in attention alone, and the dense one before them."""
    keys = [num_keys(settings, times) for times in KEYS]
    return (DENSE, SPARK, BOTH, *keys, ALL_KEYS, WIDE_HEADS)


def kinds(settings: Settings) -> dict[str, Kind]:
    """By the names above."""
    size = settings.model
    narrow, wide = 4 * size.d_model, 6 * size.d_model  # of as many weights
    expected, exactly = DENSITY * wide, round(DENSITY * narrow)
    config = functools.partial(
        models.DecoderConfig,
        **dataclasses.asdict(size),
        attention=spark_models.dense_attention(),
        dtype=jnp.bfloat16,
    )
    spark = functools.partial(nn.SparkFFN, k=expected, split=settings.split)

    def both(attended: int, heads: int = 1) -> Kind:
        """With heads so many times as wide, and as many fewer."""
        half = heads * size.head_dim // 2
        found = config(
            d_ff=wide,
            ffn=spark,
            attention=functools.partial(nn.SparkAttention, k=attended, split=half),
            num_heads=size.num_heads // heads,
            num_kv_heads=size.num_kv_heads // heads,
            head_dim=heads * size.head_dim,
        )
        return Kind(found, head_split=half)

    gated = functools.partial(nn.GatedFFN, activation=jax.nn.gelu)
    whole = functools.partial(nn.SparkFFN, k=DENSITY * narrow, split=None)
    exact = functools.partial(
        SelectedFFN, k=exactly, split=None, select=sj.topk_activation
    )
    tiles = functools.partial(
        SelectedFFN,
        k=expected,
        split=settings.split,
        # of a tile chosen by its maximum hardly a value would be left
        select=functools.partial(
            sj.block_statistical_topk, block=settings.block, pool="mean"
        ),
        block=settings.block,
    )
    return {
        DENSE: Kind(config(d_ff=narrow, ffn=gated), skips=False),
        SPARK: Kind(config(d_ff=wide, ffn=spark)),
        BOTH: both(settings.attended),
        GEMMA: Kind(config(d_ff=narrow, ffn=whole)),
        EXACT: Kind(config(d_ff=narrow, ffn=exact), most_used=exactly / narrow),
        BLOCK: Kind(config(d_ff=wide, ffn=tiles)),
        **{
            num_keys(settings, times): both(times * settings.attended) for times in KEYS
        },
        ALL_KEYS: both(2**30),  # more than there are
        WIDE_HEADS: both(settings.attended, heads=2),
    }


def flops_a_token(
    kind: Kind, weights: Params, seq_len: int, *, used: float, keys: float
) -> float:
    """Of a forward pass without the output layer, a mean over a sequence.

    A predictor is computed whole: the gate of an FFN, the scores of its part of a head.
    The rest, `up` and `down`, other scores and values, is for what is used alone.

    Args:
      kind: of the model.
      weights: its own, or their shapes.
      seq_len: tokens of a sequence; each sees itself and those before it.
      used: share of the neurons.
      keys: that a token attends to, a mean over heads and tokens.
    """
    config, split = kind.config, kind.head_split
    pairs = seq_len * (seq_len + 1) // 2
    heads = config.num_layers * config.num_heads
    products = {  # dense, a product of scores and one of values
        "predictor": heads * split * pairs,
        "rest": heads * (2 * config.head_dim - split) * pairs,
    }
    specs = [
        *sj.metrics.kernel_specs(weights, positions=seq_len),
        *(sj.metrics.LayerSpec(name, 0, macs) for name, macs in products.items()),
    ]
    shares = {"rest": min(keys * seq_len / pairs, 1.0)}
    if kind.skips:
        shares |= {"'up'": used, "'down'": used}
    densities = [
        next((share for part, share in shares.items() if part in spec.name), 1.0)
        for spec in specs
    ]
    return sj.metrics.forward_flops(specs, densities) / seq_len

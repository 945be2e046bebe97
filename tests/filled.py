"""Decoders whose layers select blocks, and batches that are filled up in two ways."""

import functools

import jax
import numpy as np
from flax import nnx

from sparsejax import attention, models, nn

LENGTHS = (13, 21, 26)


def of_blocks(select, **options):
    select = functools.partial(select, block_shape=(4, 4), **options)
    return functools.partial(nn.BlockAttention, select=select)


LINES = dict(window=8, sink=1, local=2)
KINDS = {
    "topk": of_blocks(attention.topk_blocks, num_kept=2),
    "statistical": of_blocks(attention.statistical_topk_blocks, k=1.5),
    "block_sparse": of_blocks(attention.block_sparse, num_kept=4),
    "vertical_slash": of_blocks(
        attention.vertical_slash, num_vertical=2, num_slash=2, **LINES
    ),
    "flex_prefill": of_blocks(attention.flex_prefill, alpha=0.2, min_budget=2, **LINES),
    "pyramid": functools.partial(
        nn.PyramidAttention,
        block_shape=(4, 4),
        bounds=((2, 0.4), (4, 0.7)),
        importance=functools.partial(attention.antidiagonal_importance, stride=4),
    ),
    "spark": functools.partial(nn.SparkAttention, k=3, split=2),
}


def make(kind, num_layers: int = 1) -> models.Decoder:
    config = models.DecoderConfig(
        vocab_size=31,
        d_model=16,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        d_ff=16,
        attention=kind,
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    # larger weights, so that attention is sharp
    nnx.update(model, jax.tree.map(lambda x: 2 * x, nnx.state(model, nnx.Param)))
    return model


def two_ways() -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[2, 3, seq]` that differ beyond `LENGTHS` alone; where they are real."""
    batch = np.random.default_rng(0).integers(31, size=(2, 3, max(LENGTHS)))
    real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return np.where(real, batch[0], batch), real

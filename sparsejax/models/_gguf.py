"""Llama-type models in one GGUF file, the format of llama.cpp; quantized or not."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax._extras import Extra
from sparsejax.models._checkpoint import Checkpoint, FileSettings, StoredTensor
from sparsejax.models._config import DecoderConfig

NAMES = {
    "embed.embedding": "token_embd.weight",
    "blocks.{}.attention_norm.scale": "blk.{}.attn_norm.weight",
    "blocks.{}.attention.query.kernel": "blk.{}.attn_q.weight",
    "blocks.{}.attention.key.kernel": "blk.{}.attn_k.weight",
    "blocks.{}.attention.value.kernel": "blk.{}.attn_v.weight",
    "blocks.{}.attention.out.kernel": "blk.{}.attn_output.weight",
    "blocks.{}.ffn_norm.scale": "blk.{}.ffn_norm.weight",
    "blocks.{}.ffn.gate.kernel": "blk.{}.ffn_gate.weight",
    "blocks.{}.ffn.up.kernel": "blk.{}.ffn_up.weight",
    "blocks.{}.ffn.down.kernel": "blk.{}.ffn_down.weight",
    "norm.scale": "output_norm.weight",
    "head.kernel": "output.weight",
}
# llama.cpp takes a factor of 0 for none, whatever the type.
_UNSCALED = {
    "llama.rope.scaling.type": ("none", "linear"),
    "llama.rope.scaling.factor": (0.0, 1.0),
    "llama.rope.scale_linear": (0.0, 1.0),
}
_SCALING = "Scaled rotary angles are not supported: use a model without them."
# Models whose config.json says "llama3" have their scaling as a tensor, not as a value.
_ROTARY_FACTORS = "rope_freqs.weight"
_ROTATED = (".attn_q.weight", ".attn_k.weight")


def open_gguf(file: Path) -> Checkpoint:
    """Reads the metadata; weights stay in the file until they are asked for."""
    reader, values = _read(file)
    shapes = {
        tensor.name: tuple(map(int, tensor.shape[::-1])) for tensor in reader.tensors
    }
    config = _config(FileSettings(file, values), shapes)
    tensors = {}
    for tensor in reader.tensors:
        _require_readable(file, tensor)
        if tensor.name == _ROTARY_FACTORS:
            _require_unscaled(file, tensor)
            continue
        # What is rotated has one head after another, each `head_dim` rows.
        head_dim = config.head_dim if tensor.name.endswith(_ROTATED) else None
        read = functools.partial(_read_tensor, tensor, head_dim)
        tensors[tensor.name] = StoredTensor(file, shapes[tensor.name], read)
    return Checkpoint(file, config, NAMES, tensors)


def _config(
    settings: FileSettings, shapes: dict[str, tuple[int, ...]]
) -> DecoderConfig:
    only = "Only Llama-type models are supported."
    settings.get("general.architecture", str)
    settings.require("general.architecture", "llama", because=only)
    settings.require("llama.expert_count", 0, because=only)
    settings.require("split.count", 0, 1, because="Merge the parts into one file.")
    for key, allowed in _UNSCALED.items():
        settings.require(key, *allowed, because=_SCALING)
    d_model = settings.get("llama.embedding_length", int)
    num_heads = settings.get("llama.attention.head_count", int)
    head_dim = settings.get(
        "llama.attention.key_length", int, d_model // max(num_heads, 1)
    )
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        settings.require(
            key, head_dim, because="Keys, values and rotation have one width here."
        )
    embedding = shapes.get("token_embd.weight", (0,))
    return settings.decoder(
        vocab_size=settings.get("llama.vocab_size", int, embedding[0]),
        d_model=d_model,
        num_layers=settings.get("llama.block_count", int),
        num_heads=num_heads,
        num_kv_heads=settings.get("llama.attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        d_ff=settings.get("llama.feed_forward_length", int),
        rope_base=_shortest(settings.get("llama.rope.freq_base", float, 10_000.0)),
        norm_eps=_shortest(
            settings.get("llama.attention.layer_norm_rms_epsilon", float)
        ),
        tie_embeddings="output.weight" not in shapes,
    )


def _shortest(value: float) -> float:
    """The decimal number that was rounded to float32 for the file, as 1e-5."""
    return float(str(np.float32(value)))


def _read(file: Path) -> tuple[Any, dict[str, Any]]:
    """The package's reader of the file, and the settings of the model."""
    with Extra("models"):
        import gguf

    try:
        reader = gguf.GGUFReader(file)
        # A tokenizer's arrays have no use here, and take a second to decode.
        values = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("tokenizer.")
        }
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        # It takes offsets from the file as they come, and fails in as many ways.
        raise ValueError(
            f"{file} is not a sound GGUF file: {error}. Get it again from where it "
            "was written."
        ) from error
    return reader, values


def _require_readable(file: Path, tensor: Any) -> None:
    """Dequantizes one block of zeros: the package does not read every type."""
    from gguf import GGML_QUANT_SIZES, quants

    _, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), tensor.tensor_type)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{tensor.name} in {file} must have a type that the package gguf can "
            f"dequantize; got {tensor.tensor_type.name}. Use a file of another type, "
            "as Q8_0 or F16."
        ) from error


def _require_unscaled(file: Path, tensor: Any) -> None:
    """Refuses factors of the rotary angles, unless they change nothing."""
    factors = _read_tensor(tensor, None)
    if (factors != 1).any():
        raise NotImplementedError(
            f"{tensor.name} in {file} must be all ones or absent; got up to "
            f"{factors.max()}. {_SCALING}"
        )


def _read_tensor(tensor: Any, head_dim: int | None) -> np.ndarray:
    """Float32 `[d_out, d_in]`; queries and keys brought to the half-split form.

    llama.cpp rotates neighbours `(2 i, 2 i + 1)`, so the file has row `i` of the first
    half of a head followed by row `i` of its second half.
    """
    from gguf import quants

    x = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    if head_dim is None:
        return x
    pairs = x.reshape(-1, head_dim // 2, 2, x.shape[-1])
    return pairs.swapaxes(1, 2).reshape(x.shape)

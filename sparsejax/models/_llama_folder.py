"""Llama-type models in the folders of `transformers`: config.json and safetensors."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax._extras import Extra
from sparsejax._safetensors import opened
from sparsejax.models._checkpoint import Checkpoint, FileSettings, StoredTensor
from sparsejax.models._config import DecoderConfig

NAMES = {
    "embed.embedding": "model.embed_tokens.weight",
    "blocks.{}.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention.query.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.key.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.value.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.out.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.ffn_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.ffn.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.ffn.up.kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.ffn.down.kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
}
DTYPES = ("float32", "bfloat16", "float16")

_CONFIG, _SINGLE = "config.json", "model.safetensors"
_INDEX = f"{_SINGLE}.index.json"
_STORED_DTYPES = ("F32", "BF16", "F16")
# Old checkpoints store the angles of the rotation, which follow from its base.
_DERIVED = ".rotary_emb.inv_freq"
_SCALING = "Scaled rotary angles are not supported: use a model without them."


def open_folder(folder: Path) -> Checkpoint:
    """Reads config.json and the headers of the weights; no weight is read."""
    config = read_config(folder)
    return Checkpoint(folder, config, NAMES, _tensors(folder))


def read_config(folder: Path) -> DecoderConfig:
    """Reads config.json."""
    file = folder / _CONFIG
    return _config_of(file, _read_object(file))


def _config_of(file: Path, values: dict[str, Any]) -> DecoderConfig:
    """Of what that file holds."""
    settings = FileSettings(file, values)
    only = "Only Llama-type models are supported."
    settings.get("model_type", str)
    settings.require("model_type", "llama", because=only)
    settings.require("architectures", ["LlamaForCausalLM"], because=only)
    settings.require("hidden_act", "silu", because="The gate of Llama is SiLU.")
    for key in ("attention_bias", "mlp_bias"):
        settings.require(key, False, because="Our layers have no bias.")
    settings.require(
        "quantization_config",
        because="Save the model dequantized, as float32 or bfloat16.",
    )
    # Old versions of `transformers` write the base beside the scaling, new ones in it.
    rotary = values
    for key in ("rope_scaling", "rope_parameters"):
        rotary = rotary | settings.get(key, dict, {})
    rope = FileSettings(file, rotary)
    for key, unscaled in {
        "type": "default",
        "rope_type": "default",
        "factor": 1,
    }.items():
        rope.require(key, unscaled, because=_SCALING)
    rope.require("partial_rotary_factor", 1.0, because="All of a head is rotated.")
    # Likewise old ones say `torch_dtype`; where both are there, the new name counts.
    named = FileSettings(
        file, {"dtype": values.get("dtype") or values.get("torch_dtype")}
    )
    named.require("dtype", *DTYPES, because="Save the model in one of these.")
    dtype = jnp.dtype(named.get("dtype", str, "float32"))
    d_model = settings.get("hidden_size", int)
    num_heads = settings.get("num_attention_heads", int)
    return settings.decoder(
        vocab_size=settings.get("vocab_size", int),
        d_model=d_model,
        num_layers=settings.get("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=settings.get("num_key_value_heads", int, num_heads),
        head_dim=settings.get("head_dim", int, d_model // max(num_heads, 1)),
        d_ff=settings.get("intermediate_size", int),
        rope_base=rope.get("rope_theta", float, 10_000.0),
        norm_eps=settings.get("rms_norm_eps", float, 1e-6),
        tie_embeddings=settings.get("tie_word_embeddings", bool, False),
        dtype=dtype,
        param_dtype=dtype,
    )


def write_folder(
    folder: Path,
    config: DecoderConfig,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    *,
    settings: Mapping[str, Any],
    max_shard_bytes: int,
) -> None:
    """Writes the weights a shard at a time, then the index, and config.json last.

    Args:
      folder: made if it is not there; holds no weights.
      config: of the model.
      sizes: bytes of each tensor, by stored name.
      read: gives a tensor as it is stored.
      settings: further entries of config.json.
      max_shard_bytes: tensors go to a new file before they exceed it.
    """
    with Extra("models"):
        from safetensors.numpy import save_file

    described = _describe(config)
    if clash := [name for name in settings if _describes(name, settings, described)]:
        raise ValueError(
            "`settings` must not repeat what follows from the model; got "
            f"{', '.join(sorted(clash))}. Change `config` instead."
        )
    found = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    if found or (folder / _CONFIG).exists():
        raise FileExistsError(
            f"{folder} must not hold a model yet, or a reader may mix the two; it has "
            f"{(found or [folder / _CONFIG])[0].name}. Give a new folder."
        )
    text = json.dumps(described | dict(settings), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(sizes, max_shard_bytes)
    files = [_SINGLE]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: np.ascontiguousarray(read(name)) for name in names}
        # Readers of torch models insist on this word.
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {
                name: file
                for file, names in zip(files, shards, strict=True)
                for name in names
            },
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / _CONFIG).write_text(text)


def _describe(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a model, in names that all versions of readers know."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": jnp.dtype(config.param_dtype).name,
    }


def _describes(
    name: str, settings: Mapping[str, Any], described: dict[str, Any]
) -> bool:
    """Whether a setting would be read as part of what follows from the model."""
    if name in described:
        return True
    file = Path(_CONFIG)
    try:
        found = _config_of(file, described | {name: settings[name]})
    except (ValueError, NotImplementedError):
        return True
    return found != _config_of(file, described)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """What the safetensors files hold, by name; an index must tell the same."""
    if (folder / _SINGLE).exists() or not (folder / _INDEX).exists():
        found = _header(folder / _SINGLE)
    else:
        found = _indexed(folder)
    return {name: x for name, x in found.items() if not name.endswith(_DERIVED)}


def _indexed(folder: Path) -> dict[str, StoredTensor]:
    index = folder / _INDEX
    files = _read_object(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index} must have an object `weight_map`; got {files!r}.")
    found = {}
    for file in dict.fromkeys(files.values()):
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(
                f"{index} must name files beside it; got {file!r}. Get it again."
            )
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{index} must name files beside it; {file} is missing. Get it too."
            )
        found |= _header(folder / file)
    for name in sorted(files.keys() ^ found.keys()):
        raise ValueError(
            f"{index} and the files that it names must hold the same tensors; {name} "
            "is in only one of the two. Get the folder again."
        )
    for name, file in files.items():
        if (got := found[name].file.name) != file:
            raise ValueError(
                f"{name} must be in {file}, by {index}; got it in {got}. Get the "
                "folder again."
            )
    return found


def _header(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise FileNotFoundError(
            f"there must be a file {file}, or an index {_INDEX} beside it; there is "
            "none. Convert weights of another format to safetensors."
        )
    found = {}
    with opened(file, "numpy") as tensors:
        for name in tensors.keys():  # it is no mapping
            stored = tensors.get_slice(name)
            if (dtype := stored.get_dtype()) not in _STORED_DTYPES:
                if name.endswith(_DERIVED):
                    continue
                raise NotImplementedError(
                    f"{name} in {file} must be {', '.join(_STORED_DTYPES)}; got "
                    f"{dtype}. Save the model in one of these."
                )
            read = functools.partial(_read_tensor, file, name)
            found[name] = StoredTensor(file, tuple(stored.get_shape()), read)
    return found


def _read_tensor(file: Path, name: str) -> np.ndarray:
    with opened(file, "numpy") as tensors:
        return tensors.get_tensor(name)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not sound JSON: {error}. Get it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(values)}.")
    return values

"""Llama-type checkpoints: into a `Decoder`, and back into a folder of safetensors."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax import nn
from sparsejax._safetensors import named_leaves
from sparsejax.models._checkpoint import Checkpoint, stored_name
from sparsejax.models._config import DecoderConfig
from sparsejax.models._decoder import Decoder
from sparsejax.models._gguf import open_gguf
from sparsejax.models._llama_folder import DTYPES, NAMES, open_folder, write_folder
from sparsejax.typing import Params


def llama_config(path: str | Path) -> DecoderConfig:
    """Reads the sizes and numerics of a Llama-type checkpoint.

    Args:
      path: as in `load_llama`.

    Returns:
      The config of a dense decoder. From a folder, `dtype` and `param_dtype` are what
      its config.json names, float32 if nothing; from a GGUF file they are float32.

    Raises:
      ValueError: A value is missing, or not of its type; `path` is one file of a
        folder.
      NotImplementedError: The model computes what `Decoder` does not: another
        architecture, scaled rotary angles, biases, quantized safetensors.
      FileNotFoundError: There is no such checkpoint.

    Example:
      As in `load_llama`; `dataclasses.replace(llama_config(path), dtype=jnp.bfloat16)`
      is the same model with other numerics.
    """
    return _open(path).config


def load_llama(path: str | Path, config: DecoderConfig | None = None) -> Decoder:
    """Loads a Llama-type model.

    The files are opened and compared with the model before a weight is read; weights
    are then read one by one. Nothing in the files is run.

    Args:
      path: a folder as `transformers` writes it (config.json, and model.safetensors or
        its index with several files), or a GGUF file, quantized or not.
      config: what to build; `llama_config(path)` by default. Replace `dtype`,
        `param_dtype`, `attention` or `ffn` in it for other numerics or other layers
        with the same kernels, as `sj.nn.BlockSparseFFN`, or `sj.nn.SeerAttention`,
        whose gates are then as in a new decoder.

    Returns:
      The decoder, its weights in `param_dtype`.

    Raises:
      ValueError: A tensor is missing, unexpected or of another shape, or a file is
        damaged. And as in `llama_config`.
      NotImplementedError: As in `llama_config`.
      FileNotFoundError: There is no such checkpoint.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> config = DecoderConfig(num_layers=1)
      >>> params = nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
      >>> pruned = sj.apply_masks(params, sj.prune(params, 0.9))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_llama(folder, pruned, config)
      ...     model = load_llama(folder)
      >>> model(jnp.array([[72, 105]])).shape
      (1, 2, 256)

    References:
      Touvron et al., 2023, https://arxiv.org/abs/2302.13971, section 2.2.
    """
    checkpoint = _open(path)
    config = checkpoint.config if config is None else config
    checkpoint = _without_tied_copy(checkpoint, config)
    _require_last_layer(checkpoint, config)

    def build() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0))

    abstract = nnx.eval_shape(build)
    in_file = nnx.All(nnx.Param, nnx.Not(nn.GateParam))
    graph, params, _ = nnx.split(abstract, in_file, ...)
    leaves, treedef = named_leaves(params)
    stored = _stored_names(leaves, checkpoint.names)
    _require_alike(checkpoint, leaves, stored)
    loaded = []
    for name, leaf in leaves.items():
        tensor = checkpoint.tensors[stored[name]].read()
        # a copy: a view would keep the file open, and follow its changes
        loaded.append(jnp.array(_turned(name, tensor), leaf.dtype))
    # What else a layer holds, as block masks or a gate, is as in a new decoder.
    # Compiled, as then no weights are drawn for it.
    rest = jax.jit(lambda: nnx.state(build(), nnx.Not(in_file)))()
    return nnx.merge(graph, treedef.unflatten(loaded), rest)


def save_llama(
    folder: str | Path,
    params: Params,
    config: DecoderConfig,
    *,
    settings: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a decoder as a folder that `transformers` and `load_llama` read.

    Pruned weights are stored as the zeros they are. config.json is written last: an
    interrupted folder is not taken for a model.

    Args:
      folder: made if it is not there; must not hold a model yet.
      params: the weights, as `nnx.state(model, nnx.Param)` or `sj.sparse_params` gives
        them, all of the dtype `config.param_dtype`.
      config: of the model; `attention` and `ffn` are the dense ones, and `param_dtype`
        is float32, bfloat16 or float16.
      settings: further entries of config.json, such as `eos_token_id`.
      max_shard_bytes: from which on the weights are split into several files; also the
        memory that writing takes, unless a single weight is larger.

    Raises:
      ValueError: A leaf is missing, unexpected, or of another shape or dtype, or two
        would have one name; the layers or the dtype are not those of Llama; `settings`
        repeats what follows from the model, or says otherwise.
      FileExistsError: The folder holds a model.

    Example:
      As in `load_llama`.
    """
    if max_shard_bytes < 1:
        raise ValueError(
            f"`max_shard_bytes` must be at least 1; got {max_shard_bytes}."
        )
    if (dtype := jnp.dtype(config.param_dtype).name) not in DTYPES:
        raise ValueError(
            f"`param_dtype` must be one of {', '.join(DTYPES)}, which readers know; "
            f"got {dtype}. Cast the weights and replace it in `config`."
        )
    _require_dense(config)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    wanted, _ = named_leaves(nnx.state(abstract, nnx.Param))
    leaves, _ = named_leaves(params)
    if unmatched := wanted.keys() ^ leaves.keys():
        raise ValueError(
            "`params` must be the weights of a decoder of `config`, no more and no "
            f"less; in only one of the two: {_listed(unmatched)}."
        )
    for name, leaf in wanted.items():
        got = leaves[name]
        if (got.shape, got.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{name} in `params` must be {leaf.dtype}{list(leaf.shape)}, by "
                f"`config`; got {got.dtype}{list(got.shape)}. Cast it, or change "
                "`param_dtype`."
            )
    stored = _stored_names(wanted, NAMES)
    by_stored = {stored[name]: name for name in wanted}

    write_folder(
        Path(folder),
        config,
        {
            stored[name]: leaf.size * leaf.dtype.itemsize
            for name, leaf in wanted.items()
        },
        lambda name: _turned(by_stored[name], np.asarray(leaves[by_stored[name]])),
        settings=settings or {},
        max_shard_bytes=max_shard_bytes,
    )


def _open(path: str | Path) -> Checkpoint:
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if path.suffix == ".safetensors" and path.is_file():
        raise ValueError(
            f"`path` must be a folder with config.json and safetensors, or a GGUF file;"
            f" got {path}, which does not say what the model is. Give its folder."
        )
    if path.is_file():
        return open_gguf(path)
    raise FileNotFoundError(
        f"`path` must be a folder with config.json and safetensors, or a GGUF file; "
        f"there is nothing at {path}."
    )


def _turned(name: str, x: np.ndarray) -> np.ndarray:
    """From our layout to the stored one or back: kernels are stored transposed."""
    return x.T if name.endswith(".kernel") else x


def _stored_names(
    leaves: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, str]:
    found = {leaf: stored_name(leaf, names) for leaf in leaves}
    if homeless := [leaf for leaf, name in found.items() if name is None]:
        raise ValueError(
            "the layers of the model must have the weights of `sj.nn.Attention` and "
            f"`sj.nn.GatedFFN`; a Llama-type file has no place for {_listed(homeless)}."
            " Change `attention` and `ffn` of `config`."
        )
    return {leaf: name for leaf, name in found.items() if name is not None}


def _without_tied_copy(checkpoint: Checkpoint, config: DecoderConfig) -> Checkpoint:
    """Some files repeat a tied embedding as the output layer."""
    tensors, names = checkpoint.tensors, checkpoint.names
    head = tensors.get(names["head.kernel"])
    embedding = tensors.get(names["embed.embedding"])
    if not config.tie_embeddings or head is None or embedding is None:
        return checkpoint
    if head.shape != embedding.shape or not np.array_equal(
        head.read(), embedding.read()
    ):
        return checkpoint  # another output layer, which is unexpected
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not head}
    return dataclasses.replace(checkpoint, tensors=tensors)


def _require_last_layer(checkpoint: Checkpoint, config: DecoderConfig) -> None:
    """Before the model is built, which takes long if a damaged number is large."""
    leaf = f"blocks.{config.num_layers - 1}.ffn_norm.scale"
    last = stored_name(leaf, checkpoint.names)
    if last not in checkpoint.tensors:
        raise ValueError(
            f"{checkpoint.path} must hold the {config.num_layers} layers of the model; "
            f"there is no {last}. Correct that number, or get the files again."
        )


def _require_alike(
    checkpoint: Checkpoint, leaves: Mapping[str, Any], stored: Mapping[str, str]
) -> None:
    """Compares what the files hold with what the model needs; reads no weight."""
    path, tensors = checkpoint.path, checkpoint.tensors
    if missing := [name for name in stored.values() if name not in tensors]:
        raise ValueError(
            f"{path} must hold every weight of the model; missing: {_listed(missing)}. "
            "Get the files again, or build the model that they hold."
        )
    if unexpected := tensors.keys() - set(stored.values()):
        files = {tensors[name].file.name for name in unexpected}
        raise ValueError(
            f"{path} must hold nothing but the weights of the model; unexpected in "
            f"{_listed(files)}: {_listed(unexpected)}. Remove them, or build the model "
            "that they belong to."
        )
    for leaf, name in stored.items():
        tensor, shape = tensors[name], leaves[leaf].shape
        want = shape[::-1] if leaf.endswith(".kernel") else shape
        if tensor.shape != want:
            raise ValueError(
                f"{name} in {tensor.file} must have the shape {want} for {leaf} of the "
                f"model; got {tensor.shape}. Correct the sizes or layers of `config`."
            )


def _require_dense(config: DecoderConfig) -> None:
    """A Llama-type file cannot say that a layer computes something else."""
    for layer in range(config.num_layers):
        for name, factory, dense in (
            ("attention", config.attention_of(layer), nn.Attention),
            ("ffn", config.ffn_of(layer), nn.GatedFFN),
        ):
            if factory is not dense:
                raise ValueError(
                    f"`{name}` of layer {layer} must be `sj.nn.{dense.__name__}`, as a "
                    f"Llama-type file says nothing else; got {factory}. If the dense "
                    "layer computes the same from these weights, replace it in "
                    "`config`."
                )


def _listed(names: Any) -> str:
    """The first few names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more

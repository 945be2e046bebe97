"""Final weights as safetensors: no code in the file, readable by every framework."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from sparsejax._extras import Extra
from sparsejax._safetensors import named_leaves, opened
from sparsejax.training._files import write_atomic

Tree = TypeVar("Tree")


# Names that are not the letter of the kind and the bits, as F32 or U8.
_DTYPE_NAMES = {
    "bool": "BOOL",
    "bfloat16": "BF16",
}


def save_weights(path: str | Path, params: object, metadata: Mapping[str, str]) -> None:
    """Writes the leaves of `params` to a safetensors file, named `a.b.kernel`.

    Pruned weights are stored as the zeros they are, so that any reader can load the
    file; the pattern belongs in `metadata`.

    Args:
      path: of the file; replaced as a whole.
      params: a pytree of arrays.
      metadata: texts to store with them.

    Raises:
      ValueError: two leaves would have one name.
      TypeError: a leaf is of 8-bit floats, which safetensors does not read back.
    """
    with Extra("models"):
        from safetensors.numpy import save

    named, _ = named_leaves(params)
    # in order, as its bytes are taken; `ascontiguousarray` gives a scalar an axis
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in named.items()}
    for name, tensor in tensors.items():
        if tensor.dtype.name.startswith("float8"):
            raise TypeError(
                f"{name} must be of a dtype that safetensors reads back; got "
                f"{tensor.dtype}. Cast it to bfloat16, which holds its values."
            )
    write_atomic(path, save(tensors, dict(metadata)))


def load_weights(path: str | Path, like: Tree) -> tuple[Tree, dict[str, str]]:
    """Reads what `save_weights` wrote into a tree like `like`.

    Nothing in the file is run; a name in it is only compared.

    Args:
      path: of the file.
      like: a tree of the structure, shapes and dtypes wanted; arrays or
        `jax.ShapeDtypeStruct`.

    Returns:
      `(params, metadata)`.

    Raises:
      ValueError: it is no sound safetensors file, or a name, shape or dtype in it is
        not that of `like`, or the dtype has 64 bits and `jax_enable_x64` is off;
        checked for all of them before a tensor is read.
      FileNotFoundError: there is no such file.

    Example:
      >>> import tempfile
      >>> weights = {"kernel": jnp.array([[1.0, 0.0]])}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_weights(f"{folder}/w.safetensors", weights, {"pattern": "1:2"})
      ...     loaded, metadata = load_weights(f"{folder}/w.safetensors", weights)
      >>> print(loaded["kernel"], metadata)
      [[1. 0.]] {'pattern': '1:2'}
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a safetensors file; it is no file at all.")
    wanted, treedef = named_leaves(like)
    with opened(path, "flax") as file:
        _require_alike(path, file, wanted)
        leaves = [file.get_tensor(name) for name in wanted]
        metadata = file.metadata() or {}
    return treedef.unflatten(leaves), metadata


def _require_alike(path: Path, file: Any, wanted: Mapping[str, Any]) -> None:
    """Compares the header with what is wanted; no tensor is read."""
    if unmatched := wanted.keys() ^ set(file.keys()):
        raise ValueError(
            f"{path} must hold the leaves of `like`, no more and no less; in only "
            f"one of the two: {', '.join(sorted(unmatched))}."
        )
    for name, leaf in wanted.items():
        stored, dtype = file.get_slice(name), np.dtype(leaf.dtype)
        if (shape := tuple(stored.get_shape())) != leaf.shape:
            raise ValueError(
                f"{name} in {path} must have the shape {leaf.shape} of `like`; "
                f"got {shape}."
            )
        plain = f"{dtype.kind.upper()}{8 * dtype.itemsize}"
        if (got := stored.get_dtype()) != _DTYPE_NAMES.get(dtype.name, plain):
            raise ValueError(
                f"{name} in {path} must have the dtype {dtype} of `like`; got {got}."
            )
        if (kept := jax.dtypes.canonicalize_dtype(dtype)) != dtype:
            raise ValueError(
                f"{name} in {path} must be of a dtype that JAX holds; got {dtype}, "
                f"which would become {kept}. Set `jax_enable_x64`."
            )

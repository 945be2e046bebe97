"""Final weights as safetensors: no code in the file, readable by every framework."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from sparsejax.training._files import write_atomic
from sparsejax.typing import plain_path

Tree = TypeVar("Tree")


def save_weights(path: Path, params: object, metadata: Mapping[str, str]) -> None:
    """Writes the leaves of `params` to a safetensors file, named `a.b.kernel`.

    Pruned weights are stored as the zeros they are, so that any reader can load the
    file; the pattern belongs in `metadata`.

    Args:
      path: of the file; replaced as a whole.
      params: a pytree of arrays.
      metadata: texts to store with them.
    """
    from safetensors.numpy import save  # of the extra `examples`

    tensors = {
        ".".join(plain_path(key_path)): np.ascontiguousarray(leaf)
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    write_atomic(path, save(tensors, dict(metadata)))


def load_weights(path: Path, like: Tree) -> tuple[Tree, dict[str, str]]:
    """Reads what `save_weights` wrote into a tree like `like`.

    Args:
      path: of the file.
      like: a tree of the structure, shapes and dtypes wanted; arrays or
        `jax.ShapeDtypeStruct`.

    Returns:
      `(params, metadata)`.

    Raises:
      ValueError: a name, shape or dtype in the file is not that of `like`; checked
        for all of them before a tensor is read.
    """
    from safetensors import safe_open

    paths, treedef = jax.tree.flatten_with_path(like)
    wanted = {".".join(plain_path(key_path)): leaf for key_path, leaf in paths}
    with safe_open(path, framework="flax") as file:
        if unmatched := wanted.keys() ^ set(file.keys()):
            raise ValueError(
                f"{path} must hold the leaves of `like`, no more and no less; in only "
                f"one of the two: {', '.join(sorted(unmatched))}."
            )
        for name, leaf in wanted.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != leaf.shape:
                raise ValueError(
                    f"{name} in {path} must have the shape {leaf.shape} of `like`; "
                    f"got {shape}."
                )
        leaves = [file.get_tensor(name) for name in wanted]
        metadata = file.metadata() or {}
    for (name, leaf), tensor in zip(wanted.items(), leaves, strict=True):
        if tensor.dtype != leaf.dtype:
            raise ValueError(
                f"{name} in {path} must have the dtype {leaf.dtype} of `like`; "
                f"got {tensor.dtype}."
            )
    return treedef.unflatten(leaves), metadata

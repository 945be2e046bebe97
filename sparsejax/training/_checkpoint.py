"""Checkpoints: saved whole or not at all, the newest sound one restored."""

import shutil
import warnings
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")


def save_checkpoint(folder: Path, step: int, tree: object, *, keep: int = 2) -> None:
    """Saves a pytree of arrays as `folder/step`, then drops all but the newest `keep`.

    Orbax writes to a temporary folder and renames it, so a process that dies on the
    way leaves the older checkpoints as they were. Masks, packed or not, random keys
    and the static settings of the weight methods need nothing special.
    """
    saved = {"tree": tree, "checksums": _checksums(tree)}
    with _manager(folder, keep=keep) as manager:
        manager.save(step, args=ocp.args.StandardSave(saved), force=True)


def restore_checkpoint(folder: Path, like: Tree) -> Tree | None:
    """Restores the newest checkpoint in `folder` that is sound.

    If that is not the newest one there, a warning says so, and each damaged one is
    renamed `damaged-STEP`, out of the way of the steps to come.

    Args:
      folder: where `save_checkpoint` wrote.
      like: a tree of the structure, shapes, dtypes and shardings wanted.

    Returns:
      The tree, or None if there is no checkpoint.

    Raises:
      ValueError: no checkpoint there can be read as `like`; nothing is renamed.
    """
    if not folder.is_dir():
        return None
    wanted = {"tree": like, "checksums": jax.eval_shape(_checksums, like)}
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    damaged: dict[int, Exception] = {}
    with _manager(folder) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                saved = manager.restore(step, args=ocp.args.StandardRestore(wanted))
                if (_checksums(saved["tree"]) != saved["checksums"]).any():
                    raise ValueError("its contents differ from what was saved")
            except Exception as error:  # Orbax and TensorStore raise many kinds
                damaged[step] = error
                continue
            for bad_step, error in damaged.items():
                path, aside = folder / str(bad_step), folder / f"damaged-{bad_step}"
                warnings.warn(
                    f"the checkpoint {path} cannot be read and is now {aside.name}; "
                    f"going on from step {step}. The cause: {error}",
                    stacklevel=2,
                )
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            return saved["tree"]
    if damaged:
        step, error = next(iter(damaged.items()))
        raise ValueError(
            f"none of the {len(damaged)} checkpoints in {folder} can be read as the "
            f"state of this run; at step {step}: {error}. Start a run of another name, "
            "or delete that folder to begin this part again."
        ) from error
    return None


def _manager(folder: Path, *, keep: int | None = None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


@jax.jit
def _checksums(tree: object) -> jax.Array:
    """Sums the bits of each leaf modulo 2**32: a flipped bit or a lost part shows."""

    def checksum(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(bits, dtype=jnp.uint32)

    return jnp.stack([checksum(x) for x in jax.tree.leaves(tree)])

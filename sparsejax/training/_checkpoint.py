"""Checkpoints: saved whole or not at all, the newest sound one restored."""

import math
import shutil
import warnings
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sparsejax.training._processes import all_say, as_first_says, is_first

Tree = TypeVar("Tree")

_MAX_STEP = 2**31 - 1


def save_checkpoint(
    folder: str | Path, step: int, tree: object, *, keep: int = 2
) -> None:
    """Saves a pytree of arrays as `folder/step`, then drops all but the newest `keep`.

    Orbax writes to a temporary folder and renames it, so a process that dies on the
    way leaves the older checkpoints as they were; when this returns, the new one is on
    the disk. Masks, packed or not, random keys and the static settings of the weight
    methods need nothing special. Of several processes each calls this, with a folder
    that all see and a tree of global arrays, and writes its own shards.

    Args:
      folder: made if it is not there; holds a folder for each step.
      step: names the checkpoint, in [0, 2**31 - 1]; above those that are there.
      tree: what is saved. Leaves without entries are left out, and made anew by
        `restore_checkpoint`; at least one leaf must have some.
      keep: how many checkpoints stay, at least 1.

    Raises:
      ValueError: if `step` or `keep` is out of its range, or `step` is not above those
        that are there; nothing is written.
      OSError: the system refused to write, as on a full disk. The older checkpoints
        are as they were.
    """
    if not 0 <= step <= _MAX_STEP or keep < 1:
        raise ValueError(
            f"`step` must be in [0, {_MAX_STEP}] and `keep` at least 1; got "
            f"step={step} and keep={keep}."
        )
    newest = as_first_says(max(_steps(Path(folder)), default=-1))
    if step <= newest:
        raise ValueError(
            "`step` must be above those that are saved, of which the newest stay; got "
            f"step={step}, and {folder} holds step {newest} already. Save in another "
            "folder, or delete that one."
        )
    tree = _without_empty(tree)
    saved = {"tree": tree, "checksums": np.asarray(_checksums(tree))}
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    try:
        with ocp.CheckpointManager(Path(folder).absolute(), options=options) as manager:
            manager.save(step, args=ocp.args.StandardSave(saved), force=True)
    except (OSError, ValueError) as error:
        # TensorStore has the system's errors in the text of a ValueError.
        if isinstance(error, ValueError) and "os_error_code" not in str(error):
            raise
        raise OSError(
            f"cannot save step {step} in {folder}; the checkpoints before it are "
            f"whole. Make room or mend the disk, then resume. The cause: {error}"
        ) from error


def restore_checkpoint(folder: str | Path, like: Tree) -> Tree | None:
    """Restores the newest checkpoint in `folder` that is sound.

    If that is not the newest one there, a warning says so, and each damaged one is
    renamed `damaged-STEP`, out of the way of the steps to come. Names, shapes and
    dtypes are compared with those of `like` before memory is taken, and the bits that
    were read with the checksums that were saved. Nothing in a checkpoint is run.

    Of several processes each calls this and reads its own shards; a checkpoint that
    one of them cannot read is damaged for all. Their number and the mesh may be others
    than when it was saved.

    Args:
      folder: where `save_checkpoint` wrote.
      like: a tree of the structure, shapes, dtypes and shardings wanted.

    Returns:
      The tree, or None if there is no checkpoint.

    Raises:
      ValueError: no checkpoint there can be read as `like`; nothing is renamed.

    Example:
      >>> import tempfile
      >>> state = {"params": jnp.arange(3.0), "step": jnp.int32(10)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_checkpoint(folder, 10, state)
      ...     restored = restore_checkpoint(folder, jax.tree.map(jnp.zeros_like, state))
      >>> restored["params"]
      Array([0., 1., 2.], dtype=float32)
    """
    folder = Path(folder)
    steps = _steps(folder)
    damaged: dict[int, Exception] = {}
    while (step := as_first_says(max(steps, default=-1))) >= 0:
        steps.discard(step)
        tree, error = _read(folder / str(step), like)
        if error is None:
            _set_aside(folder, damaged, step)
            return tree
        damaged[step] = error
    if damaged:
        step, error = next(iter(damaged.items()))
        raise ValueError(
            f"none of the {len(damaged)} checkpoints in {folder} can be read as the "
            f"state of this run; at step {step}: {error}. Start a run in another "
            "folder, or delete that folder to begin this part again."
        ) from error
    return None


def _steps(folder: Path) -> set[int]:
    """The steps that have a folder; what has another name is left alone."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = {int(name) for name in names if name.isdecimal() and len(name) < 11}
    return {
        step for step in found if step <= _MAX_STEP and (folder / str(step)).is_dir()
    }


def _set_aside(folder: Path, damaged: dict[int, Exception], step: int) -> None:
    for bad_step, error in damaged.items():
        path, aside = folder / str(bad_step), folder / f"damaged-{bad_step}"
        warnings.warn(
            f"the checkpoint {path} cannot be read and is now {aside.name}; going on "
            f"from step {step}. The cause: {error}",
            stacklevel=3,
        )
        if is_first():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def _read(path: Path, like: Tree) -> tuple[Tree | None, Exception | None]:
    """Reads one checkpoint: the tree, or why not. All processes get the same one."""
    path, saved, cause = path.absolute() / "default", {}, None
    filled = _without_empty(like)
    sums = np.zeros(len(jax.tree.leaves(filled)), "uint32")
    wanted = {"tree": filled, "checksums": sums}
    # A process that fails must not leave the others waiting: each reads alone.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=str(jax.process_index()),
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        try:
            # Orbax asks for a path of its own kind; one of pathlib has all it uses.
            metadata = handler.metadata(path)  # pyright: ignore[reportArgumentType]
            _require_alike(metadata, wanted)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
            args = ocp.args.StandardRestore(abstract)
            saved = reader.restore(path, args=args)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            cause = error
    if not all_say(cause is None):
        return None, cause or OSError("another process cannot read its part")
    if (np.asarray(_checksums(saved["tree"])) != saved["checksums"]).any():
        return None, ValueError("its contents differ from what was saved")
    return _with_empty(saved["tree"], like), None


def _without_empty(tree: object) -> object:
    """None for leaves without entries, which Orbax does not save."""
    return jax.tree.map(lambda x: x if np.size(x) else None, tree)


def _with_empty(tree: object, like: Tree) -> Tree:
    """The inverse: leaves without entries as in `like`."""
    filled = iter(jax.tree.leaves(tree))
    return jax.tree.map(
        lambda x: next(filled) if np.size(x) else jnp.zeros_like(x), like
    )


def _require_alike(metadata: Any, wanted: object) -> None:
    """Raises unless a checkpoint describes the leaves that are wanted."""
    there, here = (
        ocp.tree.to_flat_dict(tree, keep_empty_nodes=False)
        for tree in (metadata.tree, wanted)
    )
    if unmatched := sorted(".".join(path) for path in there.keys() ^ here.keys()):
        rest = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
        raise ValueError(
            "it must hold the leaves of this run, no more and no less; in only one of "
            f"the two: {', '.join(unmatched[:3])}{rest} (the method, its `pattern` and "
            "`pack_masks` must be those of the run that saved)"
        )
    for path, leaf in here.items():
        if not hasattr(leaf, "dtype"):  # a Python number
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        name, stored = ".".join(path), there[path]
        got, want = (stored.dtype, tuple(stored.shape)), (leaf.dtype, leaf.shape)
        if got != want:
            raise ValueError(
                f"{name} must be {want[0]} {want[1]}; the checkpoint has {got[0]} "
                f"{got[1]}"
            )
        # A chunk is read as a whole, however little of it the array needs.
        chunk = stored.storage.chunk_shape
        if math.prod(chunk) > leaf.size:
            raise ValueError(f"{name} of shape {leaf.shape} has larger chunks, {chunk}")


@jax.jit
def _checksums(tree: object) -> jax.Array:
    """A number for each leaf that depends on each bit and where it is.

    A sum modulo 2**32 of mixed words, so it is the same on every mesh and gathers
    nothing. Mixing is one to one: a leaf with one other word has another sum.
    """

    def checksum(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            x = jnp.stack([x.real, x.imag])
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        # 64 bits become two words, in a new last axis.
        unsigned = f"uint{min(8 * x.dtype.itemsize, 32)}"
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        place = jnp.zeros([], jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * jnp.uint32(size % 2**32) + index
        word = bits + place * jnp.uint32(0x9E3779B9)
        word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
        word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
        return jnp.sum(word ^ (word >> 16), dtype=jnp.uint32)

    return jnp.array([checksum(x) for x in jax.tree.leaves(tree)], jnp.uint32)

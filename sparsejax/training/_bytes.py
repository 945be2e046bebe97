"""Byte-level text: real data without a download, a batch from (seed, step) alone."""

import dataclasses
import errno
import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

# Tests and bundled tools: much of it generated, little of it like the rest.
_NOT_LIBRARY = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}

# One byte of twenty validates.
_VALIDATION_SHARE = 20


@dataclasses.dataclass(frozen=True)
class ByteText:
    """A text as bytes, split into a part to learn and a part to validate on.

    Attributes:
      name: where it comes from, for messages and tables.
      train: uint8[num_train]; what batches are cut from.
      validation: uint8[num_validation]; never trained on.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray

    def describe(self) -> dict[str, str | int]:
        """Name, sizes in bytes and a digest: two texts are equal if these are."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.validation.tobytes())
        return {
            "name": self.name,
            "train_bytes": self.train.size,
            "validation_bytes": self.validation.size,
            "sha256": digest.hexdigest(),
        }


def standard_library_text() -> ByteText:
    """Reads the source of the running Python's standard library, about 11 MB.

    Split by file: a hash of the relative path sends about one file of twenty to
    validation. The text differs between Python versions, so compare results only
    where `describe` agrees.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts)
    }
    if not files:
        raise FileNotFoundError(
            f"this Python has no standard library source under {root}. Pass files of "
            "your own by `--text FILE...`."
        )
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, path in sorted(files.items()):
        validates = hashlib.sha256(name.encode()).digest()[0] % _VALIDATION_SHARE == 0
        parts[validates].append(_read(path))
    version = sysconfig.get_python_version()
    name = f"Python {version} standard library"
    return ByteText(name, _concatenate(parts[False]), _concatenate(parts[True]))


def text_from_files(paths: Sequence[str | Path]) -> ByteText:
    """Reads files of any kind; the last twentieth of each is for validation.

    Raises:
      OSError: a file cannot be read; the message names it.
    """
    train, validation = [], []
    for path in paths:
        data = _read(Path(path))
        cut = len(data) - len(data) // _VALIDATION_SHARE
        train.append(data[:cut])
        validation.append(data[cut:])
    name = ", ".join(str(path) for path in paths)
    return ByteText(name, _concatenate(train), _concatenate(validation))


def require_length(text: ByteText, *, batch_size: int, seq_len: int) -> None:
    """Checks that each part of a text holds one batch, before anything is computed.

    Args:
      text: to learn and to validate on.
      batch_size: windows in a batch, at least 1.
      seq_len: bytes to predict in a window, at least 1.

    Raises:
      ValueError: if a part is too short, or a size is below 1.
    """
    if min(batch_size, seq_len) < 1:
        raise ValueError(
            "`batch_size` and `seq_len` must be at least 1; got "
            f"{batch_size} and {seq_len}."
        )
    needed = batch_size * (seq_len + 1)
    for part in ("train", "validation"):
        size = getattr(text, part).size
        if size < needed:
            raise ValueError(
                f"the {part} part of the text must hold at least one batch, "
                f"{batch_size} x ({seq_len} + 1) = {needed:,} bytes; got {size:,} "
                f"bytes from {text.name}. Pass a longer text, or a smaller batch size "
                "or sequence length. (One byte of twenty is kept for validation.)"
            )


def sample_batch(
    data: UInt8[np.ndarray, " size"],
    *,
    seed: int,
    step: int,
    batch_size: int,
    seq_len: int,
    rows: slice = slice(None),
) -> Int[np.ndarray, "batch seq+1"]:
    """Cuts `batch_size` windows of `seq_len + 1` bytes at random places.

    A pure function of its arguments: a resumed run sees what an uninterrupted one
    would have seen. Inputs are `batch[:, :-1]`, targets `batch[:, 1:]`.

    Args:
      data: at least `seq_len + 1` bytes.
      seed: of the run, at least 0.
      step: of the batch.
      batch_size: windows in a batch.
      seq_len: bytes to predict in a window.
      rows: the part of the batch that is cut: what one of several processes needs.

    Raises:
      ValueError: if `data` is shorter than a window.

    Example:
      >>> data = np.arange(100, dtype=np.uint8)
      >>> sample_batch(data, seed=0, step=7, batch_size=2, seq_len=3)
      array([[77, 78, 79, 80],
             [ 3,  4,  5,  6]], dtype=int32)
    """
    if data.size <= seq_len:
        raise ValueError(
            f"`data` must hold a window of {seq_len} + 1 bytes; got {data.size}."
        )
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, data.size - seq_len, size=batch_size)[rows]
    return data[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def validation_batches(
    data: UInt8[np.ndarray, " size"],
    *,
    num_batches: int,
    batch_size: int,
    seq_len: int,
) -> Int[np.ndarray, "num batch seq+1"]:
    """Cuts windows that lie evenly over `data` and do not overlap.

    The same windows on every call, so losses of two models are paired.

    Args:
      data: at least one batch of bytes.
      num_batches: how many are wanted; fewer come where `data` does not hold them.
      batch_size: windows in a batch.
      seq_len: bytes to predict in a window.

    Raises:
      ValueError: if not one batch is wanted, or `data` does not hold one.

    Example:
      >>> data = np.arange(100, dtype=np.uint8)
      >>> validation_batches(data, num_batches=2, batch_size=1, seq_len=3)
      array([[[ 0,  1,  2,  3]],
             [[50, 51, 52, 53]]], dtype=int32)
    """
    there = data.size // (batch_size * (seq_len + 1))
    if min(num_batches, there) < 1:
        raise ValueError(
            f"`data` must hold a batch of {batch_size} x ({seq_len} + 1) bytes, and "
            f"`num_batches` be at least 1; got {data.size} bytes and {num_batches}."
        )
    num_batches = min(num_batches, there)
    num_windows = num_batches * batch_size
    starts = np.arange(num_windows) * (data.size // num_windows)
    windows = data[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
    return windows.reshape(num_batches, batch_size, seq_len + 1)


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # /dev/zero would never end
            raise OSError(errno.EINVAL, "not a plain file")
        return path.read_bytes()
    except OSError as error:
        raise OSError(
            f"cannot read the text {path}: {error.strerror}. Check the path and its "
            "permissions; a text is a file, not a folder."
        ) from error


def _concatenate(parts: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(parts), dtype=np.uint8)

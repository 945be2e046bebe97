"""The four patterns: how the zeros of one leaf may lie.

A pattern divides a leaf into *units* that are kept or dropped whole: single weights,
blocks or channels. N:M differs: its units are single weights too, but each group of
`m` neighbours keeps exactly `n`, so its `sparsity` is fixed; that of others is None.
"""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, TypeAlias

from sparsejax._ints import check_int


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero.

    Example:
      >>> Unstructured().unit_shape((8, 4), stacked=0)
      (8, 4)
    """

    sparsity: ClassVar[float | None] = None

    def unit_shape(self, shape: tuple[int, ...], stacked: int) -> tuple[int, ...]:
        """The shape of the array of units: one unit a weight."""
        del stacked
        return shape

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What must lie whole on one device: a weight."""
        return (1,) * len(shape)


@dataclasses.dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` neighbours along `axis`: `NM(2, 4)` is 2:4 sparsity.

    The default axis suits kernels `[..., d_in, d_out]`: groups lie along the
    contraction axis, as sparse tensor cores need them. For a convolution `[height,
    width, in, out]` that is the input channels. Weights `[d_out, d_in]`, as Equinox and
    PyTorch keep them, need `axis=-1`.

    Attributes:
      n: weights kept in a group, `0 < n <= m`.
      m: weights in a group; must divide `axis` of every leaf under this pattern.
      axis: the axis along which the neighbours lie; a non-negative axis counts from
        the leaf's first, stacked axes included.

    Raises:
      ValueError: unless `0 < n <= m`.
      TypeError: if one is no whole number.

    Example:
      >>> NM(2, 4).sparsity
      0.5

    References:
      Zhou et al., 2021, https://arxiv.org/abs/2102.04010, section 3.1.
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self):
        check_int("n", self.n)
        check_int("m", self.m)
        check_int("axis", self.axis)
        if not 0 < self.n <= self.m:
            raise ValueError(f"N:M needs 0 < n <= m; got n={self.n}, m={self.m}.")

    @property
    def sparsity(self) -> float:
        """Share of zeros, `1 - n / m`."""
        return 1 - self.n / self.m

    def unit_shape(self, shape: tuple[int, ...], stacked: int) -> tuple[int, ...]:
        """The shape of the array of units: one unit a weight.

        Raises:
          ValueError: if there is no such axis or `m` does not divide it.
        """
        axis = _own_axis(self.axis, shape, stacked)
        if shape[axis] % self.m:
            raise ValueError(
                f"`m` must divide the pruned axis; got m={self.m} for axis "
                f"{self.axis} of shape {shape}. Pad it or exclude the leaf."
            )
        return shape

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What must lie whole on one device: a group."""
        axis = self.axis % len(shape)
        return tuple(self.m if i == axis else 1 for i in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class Block:
    """Keep or drop blocks of `shape`, which tile the last `len(shape)` axes.

    Attributes:
      shape: weights in a block along each of the last axes, for a matrix `(height,
        width)`; each must divide its axis.

    Raises:
      ValueError: if `shape` is empty or an entry is below 1.
      TypeError: if it holds no whole numbers.

    Example:
      >>> Block((32, 32)).unit_shape((64, 96), stacked=0)
      (2, 3)
    """

    sparsity: ClassVar[float | None] = None
    shape: tuple[int, ...]

    def __post_init__(self):
        if not isinstance(self.shape, Iterable):
            raise TypeError(
                "`shape` must hold one size an axis, as in Block((32, 32)); got "
                f"{self.shape!r}."
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        for size in self.shape:
            check_int("shape", size)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"`shape` must hold positive sizes; got {self.shape}.")

    def unit_shape(self, shape: tuple[int, ...], stacked: int) -> tuple[int, ...]:
        """The shape of the array of blocks.

        Raises:
          ValueError: if the leaf has too few axes or a block does not divide one.
        """
        split = len(shape) - len(self.shape)
        if split < stacked:
            raise ValueError(
                f"blocks of {self.shape} need {len(self.shape)} axes beyond the "
                f"{stacked} stacked ones; got shape {shape}. Exclude the leaf."
            )
        if any(
            size % block for size, block in zip(shape[split:], self.shape, strict=True)
        ):
            raise ValueError(
                f"blocks of {self.shape} must divide the last axes; got shape "
                f"{shape}. Pad it, choose other blocks or exclude the leaf."
            )
        tiles = (
            size // block for size, block in zip(shape[split:], self.shape, strict=True)
        )
        return (*shape[:split], *tiles)

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What must lie whole on one device: a block."""
        return (1,) * (len(shape) - len(self.shape)) + self.shape


@dataclasses.dataclass(frozen=True)
class Channel:
    """Keep or drop each index along `axis` whole: a row, a column, a filter, a head.

    Attributes:
      axis: the axis of the channels; `-1` prunes the outputs of a kernel `[..., d_in,
        d_out]`, `-2` its inputs. A non-negative axis counts from the leaf's first.

    Raises:
      TypeError: if it is no whole number.

    Example:
      >>> Channel(-1).unit_shape((8, 4), stacked=0)
      (1, 4)
    """

    sparsity: ClassVar[float | None] = None
    axis: int = -1

    def __post_init__(self):
        check_int("axis", self.axis)

    def unit_shape(self, shape: tuple[int, ...], stacked: int) -> tuple[int, ...]:
        """The shape of the array of channels: size 1 on every pooled axis.

        Raises:
          ValueError: if the leaf has no such axis beyond the stacked ones.
        """
        axis = _own_axis(self.axis, shape, stacked)
        return tuple(
            size if i < stacked or i == axis else 1 for i, size in enumerate(shape)
        )

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What must lie whole on one device: a weight; of channels only sums travel."""
        return (1,) * len(shape)


Pattern: TypeAlias = Unstructured | NM | Block | Channel


def _own_axis(axis: int, shape: tuple[int, ...], stacked: int) -> int:
    """`axis` counted from the first one; it must lie beyond the stacked axes."""
    from_first = axis + len(shape) if axis < 0 else axis
    if not stacked <= from_first < len(shape):
        raise ValueError(
            f"axis {axis} must be one of the axes beyond the {stacked} stacked ones "
            f"of shape {shape}. Pass a per-leaf pattern or exclude the leaf."
        )
    return from_first

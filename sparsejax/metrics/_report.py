"""How sparse a model is, counted exactly, leaf by leaf."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparsejax._governed import mask_sources
from sparsejax.patterns import broadcast_prefix, is_default_governed
from sparsejax.typing import MaskTree, Params, is_none


@dataclasses.dataclass(frozen=True)
class LeafSparsity:
    """The counts of one leaf.

    Attributes:
      name: its path in words.
      shape: of the leaf.
      num_kept: weights that the mask keeps, whatever their values.
    """

    name: str
    shape: tuple[int, ...]
    num_kept: int

    @property
    def size(self) -> int:
        """All weights of the leaf."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Share of weights kept; 1 for an empty leaf."""
        return self.num_kept / self.size if self.size else 1.0

    @property
    def sparsity(self) -> float:
        """Share of zeros; 0 for an empty leaf."""
        return (self.size - self.num_kept) / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """Sparsity of each leaf and in total; `print` shows it as a table.

    Attributes:
      leaves: the governed leaves.
      excluded: the other leaves of the params, all dense; None if the report was made
        from masks alone, which do not know them.
    """

    leaves: tuple[LeafSparsity, ...]
    excluded: tuple[LeafSparsity, ...] | None = None

    @property
    def size(self) -> int:
        """Weights of the governed leaves."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def num_kept(self) -> int:
        """Kept weights of the governed leaves."""
        return sum(leaf.num_kept for leaf in self.leaves)

    @property
    def sparsity(self) -> float:
        """Share of zeros over the governed leaves."""
        return (self.size - self.num_kept) / self.size if self.size else 0.0

    @property
    def sparsity_all(self) -> float | None:
        """Share of zeros over all params; None if `excluded` is not known."""
        if self.excluded is None:
            return None
        total = self.size + sum(leaf.size for leaf in self.excluded)
        return (self.size - self.num_kept) / total if total else 0.0

    @property
    def densities(self) -> tuple[float, ...]:
        """The densities of the governed leaves, for `forward_flops`."""
        return tuple(leaf.density for leaf in self.leaves)

    def __str__(self) -> str:
        rows = [("leaf", "shape", "size", "kept", "sparsity")]
        rows += [(leaf.name, str(leaf.shape), *_numbers(leaf)) for leaf in self.leaves]
        rows.append(("governed", "", *_numbers(self)))
        if self.excluded is not None:
            size = sum(leaf.size for leaf in self.excluded)
            rows.append(("excluded", "", f"{size:,}", f"{size:,}", f"{0:.4f}"))
            total, kept = self.size + size, self.num_kept + size
            share = f"{self.sparsity_all:.4f}"
            rows.append(("all params", "", f"{total:,}", f"{kept:,}", share))
        return _table(rows, num_leaves=len(self.leaves))


def sparsity_report(
    params_or_masks: Params | MaskTree,
    *,
    params: Params | None = None,
) -> SparsityReport:
    """Counts what is pruned, exactly, on the host.

    Masks are counted as they are: a kept weight that happens to be 0 is kept. Where
    only params are at hand, the zeros of the leaves that are governed by default
    (`patterns.is_default_governed`) are counted as pruned, too many where a method
    grows weights, as RigL does: those just grown are zeros that are kept. Give its
    masks, `sj.masks_of(opt_state)`.

    Args:
      params_or_masks: masks, a tree of bool arrays with None for leaves that are not
        governed; or params.
      params: with masks, the params they belong to: adds the excluded leaves and
        `sparsity_all`. Only paths and shapes are read.

    Returns:
      A report of Python numbers; `forward_flops` makes FLOPs of its `densities`.

    Raises:
      ValueError: if no leaf is governed, or masks and params do not fit, naming the
        leaf.
      TypeError: if `params` is given and the first argument holds no masks, or what is
        counted is the state of an optimizer or has no values: shapes alone, or traced
        by jit.

    Example:
      >>> masks = {"bias": None, "kernel": jnp.arange(8).reshape(4, 2) < 2}
      >>> params = {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2))}
      >>> print(sparsity_report(masks, params=params))
      leaf        shape   size  kept  sparsity
      ['kernel']  (4, 2)     8     2    0.7500
      ----------------------------------------
      governed               8     2    0.7500
      excluded               2     2    0.0000
      all params            10     4    0.6000

    References:
      Liu and Wang, 2023, https://arxiv.org/abs/2302.02596: publish the sparsity over
      the pruned leaves and over all, and which are excluded.
    """
    if mask_sources(params_or_masks):
        raise TypeError(
            "what is counted must be masks or params; got the state of an optimizer. "
            "Pass `sj.masks_of(opt_state)`."
        )
    _check_values(params_or_masks)
    if _are_masks(params_or_masks):
        masks, everything = params_or_masks, params
    elif params is None:
        masks, everything = _zeros_as_masks(params_or_masks), params_or_masks
    else:
        raise TypeError(
            "`params` goes with masks, a tree of bool arrays and None; got a tree of "
            "other arrays as the first argument. Pass the masks first."
        )
    tree = masks if everything is None else everything
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]
    per_leaf = broadcast_prefix(masks, tree, name="masks")
    leaves, excluded = [], []
    for (path, leaf), mask in zip(flat, per_leaf, strict=True):
        if leaf is None:
            continue
        name, shape = jax.tree_util.keystr(path), jnp.shape(leaf)
        if mask is None:
            excluded.append(LeafSparsity(name, shape, math.prod(shape)))
        elif jnp.shape(mask) != shape:
            raise ValueError(
                "a mask must have the shape of its leaf; got "
                f"{jnp.shape(mask)} for shape {shape} at {name}."
            )
        else:
            leaves.append(LeafSparsity(name, shape, _num_true(mask)))
    if not leaves:
        raise ValueError(
            "at least one leaf must have a mask, or be governed by default; none of "
            f"{len(flat)} is. Pass masks, such as `sj.masks_of(opt_state)`."
        )
    return SparsityReport(
        tuple(leaves), None if everything is None else tuple(excluded)
    )


def _check_values(tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
            raise TypeError(
                "what is counted must have values; got "
                f"{type(leaf).__name__} at {jax.tree_util.keystr(path)}. Pass arrays, "
                "and call `sparsity_report` outside of jit."
            )


def _are_masks(tree: Any) -> bool:
    return all(
        isinstance(leaf, bool) or getattr(leaf, "dtype", None) == jnp.bool_
        for leaf in jax.tree.leaves(tree)
    )


def _zeros_as_masks(params: Params) -> MaskTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf != 0 if is_default_governed(path, leaf) else None,
        params,
    )


def _num_true(mask: Any) -> int:
    """Counts on the device along the last axis, the rest in Python's own integers."""
    rows = jnp.sum(jnp.atleast_1d(mask), axis=-1, dtype=jnp.int32)
    return int(np.asarray(rows).sum(dtype=np.int64))


def _numbers(counted: LeafSparsity | SparsityReport) -> tuple[str, ...]:
    return f"{counted.size:,}", f"{counted.num_kept:,}", f"{counted.sparsity:.4f}"


def _table(rows: Sequence[Sequence[str]], *, num_leaves: int) -> str:
    """Text columns to the left, numbers to the right, a rule above the totals."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([*lines[: num_leaves + 1], rule, *lines[num_leaves + 1 :]])

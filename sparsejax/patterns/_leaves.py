"""Which leaves of a params tree are governed, and under which pattern.

`where`, `pattern` and `stacked` are resolved once, from paths and shapes alone, into
a flat tuple with one entry a leaf. Everything below works on that tuple, so that
trees of other node types (a dict here, an `nnx.State` there) align by order.
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax._devices import shape_on_a_device
from sparsejax._ints import check_int
from sparsejax.patterns._patterns import NM, Pattern, Unstructured
from sparsejax.patterns._prefix import broadcast_prefix, leaf_name
from sparsejax.typing import KeyPath, Params, Where, is_none, plain_path

PatternTree: TypeAlias = Pattern | Callable[[KeyPath, Any], Pattern] | Any
"""One pattern, a tree prefix of patterns, or a function of `(path, leaf)` to one."""

StackedTree: TypeAlias = int | Callable[[KeyPath, Any], int] | Any
"""How many leading axes are stacked layers: a number, a tree prefix, or a function."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A governed leaf: static, hashable, no arrays.

    Attributes:
      name: its path in words, as `jax.tree_util.keystr` spells it.
      shape: of the leaf, stacked axes included.
      pattern: how its zeros may lie.
      stacked: leading axes that are layers stacked by `scan`; each layer is pruned on
        its own.
      path: its path in plain names, as `typing.plain_path` gives it.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    stacked: int
    path: tuple[str, ...] = ()

    @property
    def own_axes(self) -> int:
        """How many axes are not stacked ones."""
        return len(self.shape) - self.stacked

    @property
    def is_convolution(self) -> bool:
        """Kernels of 2-D and 3-D convolutions by their axes, of 1-D ones by their name.

        A 3-axis leaf may as well be a DenseGeneral's `[d_in, heads, head_dim]`, whose
        axis -2 is no contraction axis: its own name, or that of the module that owns
        it, must say `conv`, as in `Conv_0/kernel` or `conv/0`. A module further out
        may be a ConvBlock with attention.
        """
        if self.own_axes != 3:
            return self.own_axes >= 4
        owners = [name for name in self.path[:-1] if not name.isdigit()]
        return any("conv" in name.lower() for name in (*self.path[-1:], *owners[-1:]))

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of the array of units, stacked axes included."""
        return self.pattern.unit_shape(self.shape, self.stacked)


def is_default_governed(path: KeyPath, leaf: Any, stacked: int = 0) -> bool:
    """The default of `where`: two axes or more, under no name of a dense leaf.

    True for all floating leaves with at least 2 axes beyond the `stacked` ones whose
    last name is not `bias`, `scale` or `embedding`: matrices and kernels, and whatever
    else has two axes, such as position embeddings, CLS tokens, LoRA factors and an
    embedding that is a bare `nnx.Param`. The names are Flax's: an embedding called
    `embeddings` (Haiku) or `weight` (Equinox) is governed too. A `where` of your own
    leaves them out.

    Args:
      path: of the leaf, entries of jax's key paths. `sj.typing.plain_path(path)` gives
        their names, such as `("blocks", "0", "ffn", "kernel")`, alike for dicts, Linen
        and NNX.
      leaf: an array or a `ShapeDtypeStruct`.
      stacked: leading axes that are stacked layers.

    Returns:
      Whether the leaf is governed where no `where` is given.

    Raises:
      TypeError: if the leaf is no array, such as a module's activation function.

    Example:
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
      >>> jax.tree_util.tree_map_with_path(is_default_governed, params)
      {'bias': False, 'kernel': True}
      >>> def but_tokens(path, leaf):
      ...   names = sj.typing.plain_path(path)
      ...   return "tokens" not in names and is_default_governed(path, leaf)
      >>> params = {"tokens": jnp.ones((1, 8)), "head": {"kernel": jnp.ones((8, 2))}}
      >>> jax.tree_util.tree_map_with_path(but_tokens, params)
      {'head': {'kernel': True}, 'tokens': False}
    """
    names = plain_path(path)
    return (
        jnp.issubdtype(_dtype(path, leaf), jnp.floating)
        and jnp.ndim(leaf) - stacked >= 2
        and (not names or names[-1] not in ("bias", "scale", "embedding"))
    )


def governed(
    params: Params,
    *,
    where: Where = None,
    pattern: PatternTree = Unstructured(),  # noqa: B008 - frozen
    stacked: StackedTree = 0,
) -> tuple[Leaf | None, ...]:
    """Resolves which leaves are governed, each with its pattern.

    Args:
      params: arrays or `ShapeDtypeStruct`s; only paths, shapes and dtypes are read.
      where: predicate `(path, leaf) -> bool`, a tree (prefix) of bools, or None for
        `is_default_governed`, which says what a path is.
      pattern: one pattern, a tree prefix of patterns, or a function of `(path, leaf)`,
        which is asked about governed leaves alone.
      stacked: one count of stacked axes, a tree prefix, or a function likewise.

    Returns:
      One entry for each leaf of `params` (None counts as one), None = not governed.

    Raises:
      ValueError: if no leaf is governed, a pattern does not suit its leaf, or a leaf's
        sharding cuts a group or block in two.
      TypeError: if a governed leaf is not floating, or an argument holds values of
        another kind.

    Example:
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
      >>> [leaf and leaf.name for leaf in governed(params)]
      [None, "['kernel']"]
    """
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]
    stacks = _per_leaf(stacked, params, flat, name="stacked")
    for (path, _), stack in zip(flat, stacks, strict=True):
        if stack is not None:
            check_int("stacked", stack, at=leaf_name(path))
    is_rule = where is None or (callable(where) and not isinstance(where, type))
    if is_rule:
        rule = is_default_governed if where is None else where
        extra = stacks if where is None else [None] * len(flat)
        chosen = [
            leaf is not None and rule(path, leaf, *([] if stack is None else [stack]))
            for (path, leaf), stack in zip(flat, extra, strict=True)
        ]
    else:
        chosen = broadcast_prefix(where, params, name="where")
    for (path, _), keep in zip(flat, chosen, strict=True):
        if not isinstance(keep, bool | np.bool_) and (is_rule or keep is not None):
            raise TypeError(
                "`where` must be a predicate `(path, leaf) -> bool`, which must return "
                "a bool, a tree prefix of bools, or None; got "
                f"{keep!r} at {leaf_name(path)}."
            )
    kept = [
        (path, leaf if keep else None)
        for (path, leaf), keep in zip(flat, chosen, strict=True)
    ]
    patterns = _per_leaf(pattern, params, kept, name="pattern")
    leaves = tuple(
        None if leaf is None else _resolve(path, leaf, leaf_pattern, stack)
        for (path, leaf), leaf_pattern, stack in zip(
            kept, patterns, stacks, strict=True
        )
    )
    if not any(leaves):
        seen = ", ".join(
            f"{leaf_name(path)} {_words(leaf)}"
            for path, leaf in flat[:5]
            if leaf is not None
        )
        raise ValueError(
            "at least one leaf must be governed; `where` chose none of the "
            f"{len(flat)} leaves ({seen or 'the tree is empty'}"
            f"{', ...' if len(flat) > 5 else ''}). Pass a `where` that is true for "
            "the weights to prune; by default these are floating, with two axes beyond "
            "`stacked`. To compare names take those of `sj.typing.plain_path(path)`."
        )
    return leaves


def _per_leaf(
    value: Any | Callable[[KeyPath, Any], Any], params: Params, flat: list, *, name: str
) -> list[Any]:
    if callable(value) and not isinstance(value, type):  # a class is a mistake
        return [None if leaf is None else value(path, leaf) for path, leaf in flat]
    return broadcast_prefix(
        value, params, name=name, none="where `where` leaves it out"
    )


def check_patterns(pattern: PatternTree) -> None:
    """Raises unless an argument holds patterns; functions, which need leaves, pass.

    Args:
      pattern: what a user passed.

    Raises:
      TypeError: if there is something else in it.

    Example:
      >>> check_patterns({"query": NM(2, 4), "out": Unstructured()})
    """
    if callable(pattern) and not isinstance(pattern, type):
        return
    flat = jax.tree_util.tree_flatten_with_path(pattern, is_leaf=is_none)[0]
    for path, value in flat:
        if value is not None or not path:  # in a tree None is where `where` is False
            _check_pattern(value, at=jax.tree_util.keystr(path))


def _check_pattern(pattern: Any, *, at: str) -> None:
    if not isinstance(pattern, Pattern):
        raise TypeError(
            "`pattern` must be Unstructured(), NM(...), Block(...) or Channel(...); "
            f"got {pattern!r}{at and f' at {at}'}. 2:4 sparsity is `sj.NM(2, 4)`."
        )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, numbers.Number) or hasattr(leaf, "dtype")


def _dtype(path: KeyPath, leaf: Any) -> Any:
    if not _is_array(leaf):
        raise TypeError(
            f"the params must be arrays; got {_words(leaf)} at {leaf_name(path)}. "
            "Filter first, as by `eqx.filter(model, eqx.is_inexact_array)`, or exclude "
            "the leaf by `where`."
        )
    return jnp.result_type(leaf)


def _words(leaf: Any) -> str:
    if not _is_array(leaf):
        return f"a leaf of type {type(leaf).__name__}"
    return f"{jnp.result_type(leaf)} {jnp.shape(leaf)}"


def _resolve(path: KeyPath, leaf: Any, pattern: Pattern, stacked: int) -> Leaf:
    name = leaf_name(path)
    shape = jnp.shape(leaf)
    if not jnp.issubdtype(_dtype(path, leaf), jnp.floating):
        raise TypeError(
            f"governed leaves must be floating; got {_dtype(path, leaf)} at {name}. "
            "Exclude it by `where`."
        )
    _check_pattern(pattern, at=name)
    check_int("stacked", stacked, at=name)
    if not 0 <= stacked <= len(shape):
        raise ValueError(
            f"`stacked` must count leading axes of the leaf; got {stacked} for shape "
            f"{shape} at {name}."
        )
    found = Leaf(name, shape, pattern, stacked, plain_path(path))
    if (
        isinstance(pattern, NM)
        and pattern.axis == NM(1, 1).axis
        and found.own_axes > 2
        and not found.is_convolution
    ):
        raise ValueError(
            f"the default N:M axis {pattern.axis} is the contraction axis of a matrix "
            f"or a convolution only; got shape {shape} with {found.own_axes} axes "
            f"beyond the {stacked} stacked ones at {name}. Pass a per-leaf `pattern` "
            "that names the axis, counted from the first, or say which axes are "
            "`stacked`."
        )
    try:
        pattern.unit_shape(shape, stacked)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; leaf {name}.") from None
    part = shape_on_a_device(leaf)
    whole = pattern.whole_shape(shape)
    if any(size % own for size, own in zip(part, whole, strict=True)):
        raise ValueError(
            f"groups and blocks must lie whole on one device; got {pattern} for a leaf "
            f"of shape {shape}, sharded in parts of {part}, at {name}. Shard another "
            "axis, or over fewer devices."
        )
    return found

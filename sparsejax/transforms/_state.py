"""The one state that every method keeps, and how it is found again.

A method is an optax wrapper. Its state holds what the forward and the checkpoint need:
the masks, the inner optimizer's state and a few small arrays. What is static (which
leaves are governed, which kind of forward) rides along as `Settings`, which has no
leaves, so that every wrapper and checkpoint carries it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from sparsejax import masks
from sparsejax._governed import GovernedLeaf, governed_twice, no_state
from sparsejax._names import check_order, names_of
from sparsejax.patterns import Leaf, Pattern
from sparsejax.typing import MaskTree, Params, is_none, plain_path


@dataclasses.dataclass(frozen=True)
class Masked:
    """The forward sees the weights under the state's masks, the gradient is dense."""


@dataclasses.dataclass(frozen=True)
class Projected:
    """The forward projects the dense weights anew: `where(mask, w, factor * w)`.

    The factor is `state.arrays["factor"]`, or 0 where the state has none.
    """

    straight_through: bool


@dataclasses.dataclass(frozen=True)
class Framed:
    """The forward projects under one of several patterns: `state.arrays["frame"]`.

    Attributes:
      frames: the governed leaves of each frame, like `Settings.leaves`.
      straight_through: whether pruned weights get the gradient of kept ones.
    """

    frames: tuple[tuple[Leaf | None, ...], ...]
    straight_through: bool


@dataclasses.dataclass(frozen=True)
class Plain:
    """The forward sees the dense weights."""


Forward: TypeAlias = Masked | Projected | Framed | Plain


class LeafOptions(NamedTuple):
    """What a method was asked for at all leaves alike; None where they may differ."""

    pattern: Pattern | None
    stacked: int | None
    sparsity: float | None


class Options(NamedTuple):
    """What a method was built with, to be held against the settings of a state."""

    leaves: tuple[LeafOptions, ...]  # of each frame; one where there are no frames
    update_every: int | None
    stop_step: int | None = None
    straight_through: bool | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static in a method's state.

    Attributes:
      method: its name, for messages.
      forward: what the forward uses.
      leaves: one entry a leaf of the params, None = not governed.
      sparsities: of the governed leaves that a soft method projects, as given; None for
        hard methods, whose masks are in the state.
      update_every: steps between two changes of the topology; None for never.
      stop_step: the last step that may change it; None for no end.
      grows_by_gradient: a change reads the gradient of pruned weights.
    """

    method: str
    forward: Forward
    leaves: tuple[Leaf | None, ...]
    sparsities: tuple[float | None, ...]
    update_every: int | None = None
    stop_step: int | None = None
    grows_by_gradient: bool = False


class SparseState(NamedTuple):
    """State of every method."""

    step: jax.Array  # int32[]; updates so far
    masks: MaskTree  # of the last update; bool, or uint8 when packed; None = dense
    inner_state: Any  # of the inner optimizer
    arrays: dict[str, jax.Array]  # small: a key, a decay factor, a frame
    settings: Settings

    def governed_leaves(self) -> Iterator[GovernedLeaf]:
        """Its leaves, then those of the states in its inner state: a `MaskSource`."""
        for state in (self, *_states_in(self.inner_state)):
            yield from _own_leaves(state)


def _own_leaves(state: SparseState) -> Iterator[GovernedLeaf]:
    settings = state.settings
    due = is_due(state) if settings.grows_by_gradient else jnp.zeros([], jnp.bool_)
    stored = jax.tree_util.tree_flatten_with_path(state.masks, is_leaf=is_none)[0]
    for (path, mask), leaf in zip(stored, settings.leaves, strict=True):
        if leaf is not None:
            units = zip(leaf.shape, leaf.unit_shape, strict=True)
            yield GovernedLeaf(
                plain_path(path),
                settings.method,
                leaf.pattern,
                unit=tuple(size // max(count, 1) for size, count in units),
                mask=leaf_mask(mask, leaf),
                is_masked=isinstance(settings.forward, Masked),
                needs_dense_gradient=due,
            )


def is_due(state: SparseState) -> jax.Array:
    """Whether the next update of one state may change its masks."""
    step, settings = array(state.step), state.settings
    if settings.update_every is None:
        return jnp.zeros(step.shape, jnp.bool_)
    due = step % settings.update_every == 0
    return due if settings.stop_step is None else due & (step <= settings.stop_step)


def find_states(opt_state: optax.OptState) -> list[SparseState]:
    """Our states, wherever they sit inside other optax states or an `nnx.Optimizer`.

    Raises:
      ValueError: if there is none.
    """
    states = _states_in(opt_state)
    if not states:
        raise no_state(opt_state)
    return states


def _states_in(opt_state: optax.OptState) -> list[SparseState]:
    """A state first, then those in its own inner state."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, SparseState))
    found = [leaf for leaf in leaves if isinstance(leaf, SparseState)]
    return [s for state in found for s in (state, *_states_in(state.inner_state))]


def settled(
    inner_state: optax.OptState, before: optax.OptState | None = None
) -> optax.OptState:
    """Gives every array of a state the dtype that it began with.

    Some optimizers begin with weakly typed numbers and return settled ones
    (`optax.lbfgs`), or widen bfloat16 moments (`inject_hyperparams`): a jitted step
    would be traced twice and a scan would fail.
    """

    def settle(leaf, like):
        dtype = jax.typeof(like).dtype
        if jax.typeof(leaf).dtype == dtype and not jax.typeof(leaf).weak_type:
            return leaf
        return jax.lax.convert_element_type(leaf, dtype)

    return jax.tree.map(settle, inner_state, inner_state if before is None else before)


def array(leaf: Any) -> jax.Array:
    """The array in a leaf that Flax may have wrapped in a Variable."""
    return jax.tree.leaves(leaf)[0]


def leaf_mask(stored: Any, leaf: Leaf) -> jax.Array:
    """One mask as bools, whether stored packed or not."""
    stored = array(stored)
    if stored.dtype == jnp.uint8:
        return masks.unpack(stored, leaf.shape[-1])
    return stored


def store_masks(found: list[jax.Array | None], like: Params, packed: bool) -> MaskTree:
    """A mask tree of the structure of `like`, packed if asked."""
    treedef = jax.tree.structure(like, is_leaf=is_none)
    return treedef.unflatten(
        [mask if mask is None or not packed else masks.pack(mask) for mask in found]
    )


def is_packed(stored: MaskTree) -> bool:
    """Whether masks are stored in 1 bit a weight."""
    return any(array(mask).dtype == jnp.uint8 for mask in jax.tree.leaves(stored))


def loaded_masks(state: SparseState) -> list[jax.Array | None]:
    """The masks of a state as a flat list of bools, aligned with its leaves."""
    stored = jax.tree.leaves(state.masks, is_leaf=is_none)
    return [
        None if leaf is None else leaf_mask(mask, leaf)
        for mask, leaf in zip(stored, state.settings.leaves, strict=True)
    ]


def is_hole(node: Any) -> bool:
    """None, or the `MaskedNode` with which optax hides a leaf or a whole subtree."""
    return node is None or isinstance(node, optax.MaskedNode)


class Entry(NamedTuple):
    """One governed leaf of one state."""

    state: SparseState
    index: int  # into `state.settings.leaves`
    stored: Any  # its mask as stored


def align(
    states: list[SparseState], params: Params
) -> tuple[list[Any], list[Entry | None], Any]:
    """Says for each leaf of `params` which state governs it.

    Leaves align by order, which their names must not contradict; where optax hid a
    subtree, by its path.

    Returns:
      The leaves of params, the entry that governs each (None = dense), the treedef.

    Raises:
      ValueError: if a state was made for other params, or a leaf is governed twice.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)
    names = names_of(flat)
    owners: list[Entry | None] = [None] * len(flat)
    for state in states:
        stored = jax.tree_util.tree_flatten_with_path(state.masks, is_leaf=is_hole)[0]
        words = f"the state of `{state.settings.method}` and the params"
        check_order(names_of(stored), names, words)
        # as a list: it checks the number of leaves before any is looked up
        for position, entry in list(_positions(state, stored, names)):
            owner = owners[position]
            if owner is not None:
                name = jax.tree_util.keystr(flat[position][0])
                methods = (s.settings.method for s in (owner.state, state))
                raise governed_twice(name, *methods)
            owners[position] = entry
    return [leaf for _, leaf in flat], owners, treedef


def _positions(
    state: SparseState, stored: list[Any], names: list[tuple[str, ...]]
) -> Iterator[tuple[int, Entry]]:
    """Walks a state's masks, with their paths, beside the params' paths."""
    position = index = 0
    for path, mask in stored:
        if isinstance(mask, optax.MaskedNode):
            hidden = plain_path(path)
            if names[position : position + 1] == [hidden]:
                position += 1  # one leaf, maybe a field `value` of what is not hidden
                continue
            while names[position : position + 1] and (
                names[position][: len(hidden)] == hidden
            ):
                position += 1
            continue
        if mask is not None:
            yield position, Entry(state, index, mask)
        position += 1
        index += 1
    if position != len(names):
        raise ValueError(
            f"the params must be those that `{state.settings.method}` was initialised "
            f"with; its masks cover {position} leaves, the params have {len(names)}."
        )

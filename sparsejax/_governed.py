"""What an optimizer's state tells of the leaves that a method governs.

Layers read it, which know no optimizer, and methods give it, which know no layers.
Every room may import this module; it imports none of them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import jax


@dataclasses.dataclass(frozen=True)
class GovernedLeaf:
    """What the optimizer's state knows of a leaf of the params that it makes sparse.

    Attributes:
      path: of the leaf, as `plain_path` gives it.
      method: what governs it, for messages.
      pattern: of the room `patterns`, for messages.
      unit: weights along each axis that the pattern keeps or drops together.
      mask: bool, of the leaf's shape; that of the last update.
      is_masked: the weights are used under `mask`; False where they are projected anew
        in every forward, or used dense.
      needs_dense_gradient: bool scalar, whether the next update reads the gradient of
        pruned weights too.
    """

    path: tuple[str, ...]
    method: str
    pattern: Any
    unit: tuple[int, ...]
    mask: jax.Array
    is_masked: bool
    needs_dense_gradient: jax.Array


@runtime_checkable
class MaskSource(Protocol):
    """A part of an optimizer's state that tells which weights are kept.

    Layers look for it in the state that they are given: they know no optimizer, and the
    methods know no layers.
    """

    def governed_leaves(self) -> Iterable[GovernedLeaf]:
        """Of this state and of those inside of it, in any order."""
        ...


def mask_sources(tree: Any) -> list[MaskSource]:
    """The outermost of them in a tree, such as an optimizer's state."""

    def is_source(node: Any) -> bool:
        return isinstance(node, MaskSource)

    return [
        node for node in jax.tree.leaves(tree, is_leaf=is_source) if is_source(node)
    ]


def no_state(opt_state: Any) -> ValueError:
    """What to raise where an optimizer's state holds that of no method."""
    return ValueError(
        "the optimizer state must hold the state of a sparsejax method; found none in "
        f"{type(opt_state).__name__}. Wrap the optimizer, as in "
        "`sj.rigl(optax.adamw(...), ...)`, and pass its state, which "
        "`sj.forward_params` takes before the params. A checkpoint that is restored "
        "without a target is a plain dict: give `jax.eval_shape(tx.init, params)`."
    )


def governed_twice(name: str, *methods: str) -> ValueError:
    """What to raise where two methods govern the leaf `name`; they may be unknown."""
    got = " and ".join(f"`{method}`" for method in methods) or "two"
    return ValueError(
        f"a leaf must be governed by one method; got {got} at {name}. Restrict one by "
        "`where`."
    )

"""Static sparse training: masks fixed before the first step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from sparsejax import allocation as allocations
from sparsejax import scores
from sparsejax.masks import is_made_of
from sparsejax.patterns import (
    Leaf,
    PatternTree,
    StackedTree,
    Unstructured,
    broadcast_prefix,
    check_patterns,
    governed,
)
from sparsejax.transforms._arguments import check_key
from sparsejax.transforms._hard import FlatMasks, MaskChoice, hard_method
from sparsejax.transforms._sparsity import Sparsity, by_path, choose_masks
from sparsejax.transforms._state import LeafOptions
from sparsejax.typing import MaskTree, Params, SparsityTree, Where, is_none


def static_sparse(
    inner: optax.GradientTransformation,
    sparsity: float | SparsityTree | None = None,
    *,
    masks: MaskTree | None = None,
    key: jax.Array | None = None,
    where: Where = None,
    pattern: PatternTree = Unstructured(),
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    across_leaves: bool = False,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains under masks that never change: random ones, or those you bring.

    The baseline that every other method must beat, and the way to fine-tune under the
    masks of `sj.prune`. Pruned weights become exactly 0 with the first update.

    Args:
      inner: the whole optax optimizer, clipping included, as in
        `optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr))`. The method comes
        last in a chain: its updates set pruned weights to 0, so nothing may scale them,
        and a clip before it would count the gradients of pruned weights too.
      sparsity: share of zeros of random masks: a float or a tree prefix of floats,
        rounded to whole units of each leaf, at least one of which stays. With N:M
        patterns it may be omitted.
      masks: bring your own, True = kept, None = dense; instead of `sparsity`.
      key: draws the random masks; needed without `masks`.
      where: which leaves are governed: a predicate `(path, leaf) -> bool`, a tree of
        bools, or None for `sj.patterns.is_default_governed`: all with two axes or more
        whose name is not bias, scale or embedding. Not beside brought masks, of
        which those that are not None are governed.
      pattern: of each leaf: a pattern, a tree prefix, or a function of `(path, leaf)`.
        Of brought masks: what they are made of, such as `Block` for block kernels;
        checked.
      stacked: leading axes that are layers stacked by scan, likewise.
      allocation: spreads the sparsity over the leaves, such as
        `sj.erdos_renyi_kernel`; under `optax.inject_hyperparams` named in
        `static_args`, also if left at its default.
      across_leaves: rank all leaves together instead.
      pack_masks: store 1 bit a weight instead of 1 byte.

    Returns:
      The wrapped optimizer.

    Raises:
      ValueError: unless exactly one of `masks` and `key` (with `sparsity` or an N:M
        pattern) is given, if an option is not read beside it, or at `init` if a mask
        does not fit its leaf or a weight is NaN.
      TypeError: if an argument is of another kind.

    Example:
      >>> tx = static_sparse(optax.adam(1e-3), 0.5, key=jax.random.key(0))
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> int(sj.masks_of(tx.init(params))["kernel"].sum())
      4

    References:
      Liu et al., 2022, https://arxiv.org/abs/2202.02643. Counts are exact, where the
      released code draws each weight on its own; masks depend on a leaf's path, not on
      which other leaves there are.
    """
    if (masks is None) == (key is None) or (masks is not None and sparsity is not None):
        raise ValueError(
            "`static_sparse` needs exactly one of `masks` and `sparsity` with `key`; "
            f"got masks={'None' if masks is None else 'a tree'}, sparsity={sparsity}, "
            f"key={'None' if key is None else 'a key'}."
        )
    if masks is not None:
        unread = {
            "where": where is not None,
            "allocation": allocation is not allocations.uniform,
            "across_leaves": across_leaves,
        }
        if any(unread.values()):
            raise ValueError(
                "what chooses masks is not read beside `masks`; got "
                f"{', '.join(name for name, given in unread.items() if given)}. Leave "
                "it out; None in `masks` leaves a leaf dense."
            )
        choice = _brought(masks, pattern, stacked)
    else:
        check_key(key)
        rule = Sparsity.constant(
            sparsity, allocate=allocation, where=where, pattern=pattern, stacked=stacked
        )

        def first(params: Params, leaves: tuple[Leaf | None, ...]) -> FlatMasks:
            assert key is not None
            draw = functools.partial(scores.random, key=key)
            return choose_masks(rule, draw, params, leaves, across_leaves)

        choice = MaskChoice("static_sparse", rule.leaves, first, rule.common)
    return hard_method(inner, choice, pack_masks=pack_masks)


def _brought(masks: MaskTree, pattern, stacked) -> MaskChoice:
    """Masks that the user made."""
    check_patterns(pattern)

    def spread(params: Params) -> list:
        return broadcast_prefix(masks, params, name="masks")

    def leaves_of(params: Params) -> tuple[Leaf | None, ...]:
        flags = [mask is not None for mask in spread(params)]
        where = by_path(params, flags)
        return governed(params, where=where, pattern=pattern, stacked=stacked)

    def first(params: Params, leaves: tuple[Leaf | None, ...]) -> FlatMasks:
        found = spread(params)
        for mask, leaf in zip(found, leaves, strict=True):
            if leaf is not None and (
                jnp.shape(mask) != leaf.shape or jnp.result_type(mask) != jnp.bool_
            ):
                raise ValueError(
                    f"a mask must be bool and of its leaf's shape {leaf.shape}; got "
                    f"{jnp.result_type(mask)} {jnp.shape(mask)} at {leaf.name}."
                )
            if leaf is not None and not _is_made_of(mask, leaf):
                raise ValueError(
                    f"a mask must be made of its pattern, {leaf.pattern}; that at "
                    f"{leaf.name} is not. Pass the `pattern` that it was made with, or "
                    "none."
                )
        # new arrays, since the state may be donated and the user's masks must outlive
        # it; sharded as the weights are
        weights = jax.tree.leaves(params, is_leaf=is_none)
        return [
            None if leaf is None else jnp.asarray(mask) | jnp.zeros_like(weight, bool)
            for mask, weight, leaf in zip(found, weights, leaves, strict=True)
        ]

    # the masks themselves say what they are made of
    return MaskChoice("static_sparse", leaves_of, first, LeafOptions(None, None, None))


def _is_made_of(mask: jax.Array, leaf: Leaf) -> bool:
    """Whether a mask follows its leaf's pattern; under jit, where none knows, True."""
    if isinstance(mask, Tracer):
        return True
    with jax.ensure_compile_time_eval():  # concrete arrays that a jit closes over
        return bool(is_made_of(mask, leaf))

"""Gradual magnitude pruning."""

from collections.abc import Callable

import optax

from sparsejax import allocation as allocations
from sparsejax import scores
from sparsejax.patterns import Leaf, PatternTree, StackedTree, Unstructured
from sparsejax.transforms._arguments import check_count
from sparsejax.transforms._hard import FlatMasks, MaskChoice, Refresh, hard_method
from sparsejax.transforms._sparsity import Sparsity, choose_masks
from sparsejax.typing import Params, ScalarOrSchedule, SparsityTree, Where


def magnitude_prune(
    inner: optax.GradientTransformation,
    sparsity: ScalarOrSchedule | SparsityTree | None = None,
    *,
    update_every: int = 100,
    where: Where = None,
    pattern: PatternTree = Unstructured(),
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    across_leaves: bool = False,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Prunes the smallest weights while `inner` trains the rest.

    With a schedule such as `sj.schedules.cubic` this is gradual magnitude pruning; with
    a number it prunes once and trains on. Every `update_every` steps, from step 0 on,
    the masks are recomputed from the weights before the step; the optimizer steps as
    usual. Pruned weights are 0, so they stay the lowest and the masks nest as long as
    the sparsity does not fall.

    A non-finite gradient reaches the weights but not the masks' counts: a weight that
    became NaN ranks lowest at the next refresh.

    Args:
      inner: the whole optax optimizer, clipping included, as in
        `optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr))`. The method comes
        last in a chain: its updates set pruned weights to 0, so nothing may scale them,
        and a clip before it would count the gradients of pruned weights too.
      sparsity: share of zeros: a float, a schedule, a tree prefix of these, or None
        when every pattern is N:M. It is rounded to whole units of each leaf, at least
        one of which stays. Of a schedule traced values are clipped to [0, 1], others
        checked; it should reach its end by the last refresh, as the step at the run's
        length is never taken.
      update_every: steps between refreshes, at least 1.
      where: which leaves are governed: a predicate `(path, leaf) -> bool`, a tree of
        bools, or None for `sj.patterns.is_default_governed`: all with two axes or more
        whose name is not bias, scale or embedding.
      pattern: of each leaf: a pattern, a tree prefix, or a function of `(path, leaf)`.
      stacked: leading axes that are layers stacked by scan, likewise.
      allocation: spreads a single sparsity over the leaves; under
        `optax.inject_hyperparams` named in `static_args`, also if left at its default.
      across_leaves: rank all leaves together instead; warns as `sj.prune` does of what
        is known, such as the masks of `init` outside of jit.
      pack_masks: store 1 bit a weight instead of 1 byte.

    Returns:
      The wrapped optimizer.

    Raises:
      ValueError: if an argument is out of range, or at `init` if the patterns do not
        suit the leaves or a weight is NaN.
      TypeError: if an argument is of another kind.

    Example:
      >>> schedule = sj.schedules.cubic(0.9, begin=0, end=1000)
      >>> tx = magnitude_prune(optax.adam(1e-3), schedule, update_every=10)
      >>> state = tx.init({"kernel": jnp.ones((4, 2))})
      >>> bool(sj.masks_of(state)["kernel"].all())  # nothing is pruned at step 0
      True

    References:
      Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878.
    """
    check_count("update_every", update_every)
    rule = Sparsity(
        sparsity, allocate=allocation, where=where, pattern=pattern, stacked=stacked
    )

    def first(params: Params, leaves: tuple[Leaf | None, ...]) -> FlatMasks:
        return choose_masks(rule, scores.magnitude, params, leaves, across_leaves)

    def refresh(read: Refresh, leaves: tuple[Leaf | None, ...]) -> FlatMasks:
        return choose_masks(
            rule, scores.magnitude, read.params, leaves, across_leaves, read.step
        )

    choice = MaskChoice(
        "magnitude_prune",
        rule.leaves,
        first,
        rule.common,
        refresh,
        update_every=update_every,
        scheduled=(rule,),
    )
    return hard_method(inner, choice, pack_masks=pack_masks)

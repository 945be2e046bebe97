"""One-shot magnitude pruning: masks of the largest weights, with no training."""

from collections.abc import Callable

import jax

from sparsejax import allocation as allocations
from sparsejax import masks, scores
from sparsejax.patterns import PatternTree, StackedTree, Unstructured
from sparsejax.transforms._sparsity import Sparsity, choose_masks, only_governed
from sparsejax.typing import MaskTree, Params, SparsityTree, Where, is_none


def prune(
    params: Params,
    sparsity: float | SparsityTree | None = None,
    *,
    where: Where = None,
    pattern: PatternTree = Unstructured(),
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    across_leaves: bool = False,
) -> MaskTree:
    """Masks of the largest weights; `sj.apply_masks` applies them.

    Args:
      params: the weights.
      sparsity: share of zeros: a float (traced allowed), a tree prefix of floats, or
        None when every pattern is N:M.
      where: which leaves are governed: a predicate `(path, leaf) -> bool`, a tree of
        bools, or None for `sj.patterns.is_default_governed`: all with two axes or more
        whose name is not bias, scale or embedding.
      pattern: of each leaf: a pattern, a tree prefix, or a function of `(path, leaf)`.
      stacked: leading axes that are layers stacked by scan, likewise.
      allocation: spreads a single sparsity over the leaves.
      across_leaves: rank all leaves together instead (`Unstructured` only); warns of a
        layer that is known to keep less than 1 % where the model keeps more.

    Returns:
      A tree of masks, True = kept, None where not governed. Counts are exact; of equal
      weights the one with the lower index stays; at least one unit of each leaf stays,
      but for `across_leaves`.

    Raises:
      ValueError: if the sparsity is out of range, missing, a schedule or contradicts an
        N:M pattern, a pattern does not suit its leaf, no leaf is governed, or a
        concrete weight to be pruned is NaN (under jit NaN ranks lowest).
      TypeError: if an argument is of another kind.

    Example:
      >>> params = {"bias": jnp.ones(2), "kernel": jnp.array([[3.0, -4.0], [1.0, 2.0]])}
      >>> masks = prune(params, 0.5)
      >>> print(sj.apply_masks(params, masks)["kernel"])
      [[ 3. -4.]
       [ 0.  0.]]

    References:
      Han et al., 2015, https://arxiv.org/abs/1506.02626, section 3.
    """
    rule = Sparsity.constant(
        sparsity, allocate=allocation, where=where, pattern=pattern, stacked=stacked
    )
    leaves = rule.leaves(params)
    masks.check_scores(only_governed(params, leaves), "params")
    found = choose_masks(rule, scores.magnitude, params, leaves, across_leaves)
    return jax.tree.structure(params, is_leaf=is_none).unflatten(found)

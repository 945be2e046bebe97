"""SR-STE: straight-through training with a pull on pruned weights."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from sparsejax import allocation as allocations
from sparsejax._promotion import common_dtype
from sparsejax.patterns import PatternTree, StackedTree
from sparsejax.transforms._schedules import Scheduled
from sparsejax.transforms._soft import soft_method
from sparsejax.transforms._sparsity import Sparsity
from sparsejax.typing import ScalarOrSchedule, SparsityTree, Where


def sr_ste(
    inner: optax.GradientTransformation,
    *,
    pattern: PatternTree,
    decay: ScalarOrSchedule = 2e-4,
    decoupled: bool = False,
    sparsity: float | SparsityTree | None = None,
    where: Where = None,
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Projects the weights on every forward, and pulls the pruned ones to zero.

    The forward (`sj.forward_params`) keeps the largest weights of each group, chosen
    anew each time; the gradient goes straight through to all weights, and
    `decay * weight` is added for the pruned ones *before* the inner optimizer, as in
    the paper. Under Adam the optimizer rescales that term, so its strength is then no
    longer `decay`; it adds to any weight decay of `inner`. `decay=0` is plain STE.
    `decoupled=True` subtracts `decay * weight` *after* the inner optimizer instead, as
    AdamW does its own. Either is done in the wider of the gradient's and the weight's
    dtype, which the updates of governed weights then have.

    A non-finite gradient reaches the weights as under `inner` alone; masks are chosen
    from the weights, where NaN ranks lowest and the count stays exact.

    Args:
      inner: any optax optimizer; the paper uses SGD with momentum.
      pattern: of each leaf: a pattern, a tree prefix, or a function of `(path, leaf)`.
      decay: strength of the pull, at least 0, or a schedule of the step; a traced value
        below is clipped. If decoupled, the learning rate is part of it, as in
        `lambda step: rate(step) * 0.1`.
      decoupled: whether the pull bypasses the inner optimizer; not in the paper.
      sparsity: constant share of zeros for patterns other than N:M.
      where: which leaves are governed: a predicate `(path, leaf) -> bool`, a tree of
        bools, or None for `sj.patterns.is_default_governed`: all with two axes or more
        whose name is not bias, scale or embedding.
      stacked: leading axes that are layers stacked by scan: a number, a tree prefix, or
        a function likewise.
      allocation: spreads a single sparsity over the leaves; under
        `optax.inject_hyperparams` named in `static_args`, also if left at its default.
      pack_masks: store 1 bit a weight instead of 1 byte.

    Returns:
      The wrapped optimizer.

    Raises:
      ValueError: if a known `decay` is negative, or at `init` if a pattern does not
        suit its leaf or a weight is NaN.
      TypeError: if an argument is of another kind.

    Example:
      >>> tx = sr_ste(optax.sgd(0.1, momentum=0.9), pattern=sj.NM(2, 4))
      >>> params = {"kernel": jnp.arange(8.0).reshape(4, 2)}
      >>> print(sj.forward_params(tx.init(params), params)["kernel"])
      [[0. 0.]
       [0. 0.]
       [4. 5.]
       [6. 7.]]

    References:
      Zhou et al., 2021, https://arxiv.org/abs/2102.04010, equation 5. Ties go to the
      lower index, where the released code leaves them to a sort.
    """
    strength_at = Scheduled("decay", decay)

    def pull(step, mask, grad, weight):
        sign = -1 if decoupled else 1
        # the gradient's dtype may be narrower, in which the pull would be rounded away
        dtype = common_dtype(grad.dtype, weight.dtype)
        wide = common_dtype(dtype, jnp.float32)
        pulled = jnp.where(mask, 0, weight).astype(wide)
        pulled = sign * strength_at(step).astype(wide) * pulled
        return grad.astype(dtype) + pulled.astype(dtype)

    return soft_method(
        inner,
        "sr_ste",
        Sparsity.constant(
            sparsity, allocate=allocation, where=where, pattern=pattern, stacked=stacked
        ),
        straight_through=True,
        pull=None if decoupled else pull,
        pull_after=pull if decoupled else None,
        scheduled=(strength_at,),
        pack_masks=pack_masks,
    )

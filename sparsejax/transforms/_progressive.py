"""Progressive gradient flow: masks that fade in, or patterns that tighten."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from sparsejax import allocation as allocations
from sparsejax.patterns import PatternTree, StackedTree
from sparsejax.transforms._arguments import check_count
from sparsejax.transforms._schedules import Scheduled
from sparsejax.transforms._soft import soft_method
from sparsejax.transforms._sparsity import Sparsity
from sparsejax.typing import ScalarOrSchedule, SparsityTree, Where


def mask_decay(
    inner: optax.GradientTransformation,
    decay: ScalarOrSchedule,
    *,
    pattern: PatternTree,
    straight_through: bool = False,
    sparsity: float | SparsityTree | None = None,
    where: Where = None,
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """MdGf: multiplies pruned weights by a factor that decays from 1 to 0.

    The forward (`sj.forward_params`) is `w * d` with `d = 1` for the largest weights of
    each group and `d = decay(step)` for the others, chosen anew each time; `d` is a
    constant in the backward. With a schedule that does not end at exactly 0
    (`exponential_decay` without `hard_after`) the model that was trained differs from
    `sj.sparse_params`. Under `optax.inject_hyperparams` the factor that an update is
    given reaches the forward after it, one step later than a schedule passed here.

    A non-finite gradient reaches the weights as under `inner` alone; masks are chosen
    from the weights, where NaN ranks lowest and the count stays exact.

    Args:
      inner: any optax optimizer.
      decay: factor of pruned weights in [0, 1]: a schedule of the step such as
        `sj.schedules.exponential_decay(rate, hard_after=...)`, or a number. A traced
        value is clipped.
      pattern: of each leaf: a pattern, a tree prefix, or a function of `(path, leaf)`.
      straight_through: False differentiates through `w * d`, so that the gradient of
        pruned weights fades with the factor, as the paper words it; True hands every
        weight the gradient of `w * d`, as the released code does. In our measurements
        only the former gains on `sj.sr_ste` with `decay=2e-4`; on `decay=2e-2`, which
        is better from 1:8 on, neither does.
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
      ValueError: if a known `decay` is outside [0, 1], or at `init` if a pattern does
        not suit its leaf or a weight is NaN.
      TypeError: if an argument is of another kind.

    Example:
      >>> decay = sj.schedules.exponential_decay(1e-4, hard_after=90_000)
      >>> tx = mask_decay(optax.adam(1e-3), decay, pattern=sj.NM(1, 2))
      >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
      >>> print(sj.forward_params(tx.init(params), params)["kernel"].T)  # factor 1
      [[1. 2.]]

    References:
      Bambhaniya et al., 2024, https://arxiv.org/abs/2402.04744 (MdGf), and its
      released code.
    """
    factor_at = Scheduled("decay", decay, at_most=1)

    def arrays_at(step):
        # a copy: the state may be donated and the user's number must outlive it
        return {"factor": jnp.array(factor_at(step), jnp.float32)}

    return soft_method(
        inner,
        "mask_decay",
        Sparsity.constant(
            sparsity, allocate=allocation, where=where, pattern=pattern, stacked=stacked
        ),
        straight_through=straight_through,
        arrays_at=arrays_at,
        scheduled=(factor_at,),
        pack_masks=pack_masks,
    )


def structure_decay(
    inner: optax.GradientTransformation,
    patterns: Sequence[PatternTree],
    boundaries: Sequence[int | jax.Array],
    *,
    straight_through: bool = False,
    sparsity: float | SparsityTree | None = None,
    where: Where = None,
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """SdGf: tightens the pattern in frames, dense before the first.

    From step `boundaries[i]` on the forward projects the weights on `patterns[i]` by
    magnitude, chosen anew each time; the last pattern is that of `sj.sparse_params`.
    `sj.patterns.stepwise_frames` and `geometric_frames` make the paper's sequences,
    `sj.schedules.frame_boundaries` frames of equal length.

    A non-finite gradient reaches the weights as under `inner` alone; masks are chosen
    from the weights, where NaN ranks lowest and the count stays exact.

    Args:
      inner: any optax optimizer.
      patterns: one a frame; each a pattern, a tree prefix, or a function of
        `(path, leaf)`.
      boundaries: first step of each frame, not decreasing; as many as `patterns`.
        Traced ones serve runs of several lengths in one program; they are not checked.
      straight_through: False differentiates through the mask; True hands every weight
        the gradient, as the released code does.
      sparsity: constant share of zeros for patterns other than N:M; in a tree, None
        leaves its leaf dense in the frames of these.
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
      ValueError: if the lengths differ or the boundaries decrease, or at `init` if a
        pattern does not suit its leaf or a weight is NaN.
      TypeError: if an argument is of another kind.

    Example:
      >>> frames = sj.patterns.stepwise_frames(sj.NM(1, 4))  # 3:4, 2:4, 1:4
      >>> tx = structure_decay(optax.adam(1e-3), frames, [100, 200, 300])
      >>> params = {"kernel": jnp.arange(4.0)[:, None]}
      >>> print(sj.forward_params(tx.init(params), params)["kernel"].T)  # dense yet
      [[0. 1. 2. 3.]]

    References:
      Bambhaniya et al., 2024, https://arxiv.org/abs/2402.04744 (SdGf), and its
      released code.
    """
    for name, given in (("patterns", patterns), ("boundaries", boundaries)):
        if not isinstance(given, Iterable) or isinstance(given, str | bytes):
            raise TypeError(f"`{name}` must hold one entry a frame; got {given!r}.")
    patterns = tuple(patterns)
    boundaries = tuple(
        x.item() if isinstance(x, jax.Array) and not isinstance(x, Tracer) else x
        for x in boundaries
    )
    if not patterns or len(patterns) != len(boundaries):
        raise ValueError(
            "each pattern needs the step at which it begins; got "
            f"{len(patterns)} patterns and {len(boundaries)} boundaries. Pass as many "
            "`boundaries` as `patterns`."
        )
    known = [x for x in boundaries if not isinstance(x, Tracer)]
    for boundary in known:
        check_count("boundaries", boundary, at_least=0)
    if any(a > b for a, b in itertools.pairwise(known)):
        raise ValueError(f"`boundaries` must not decrease; got {boundaries}.")

    rules = [
        Sparsity.constant(
            sparsity, allocate=allocation, where=where, pattern=pattern, stacked=stacked
        )
        for pattern in patterns
    ]

    def arrays_at(step):
        begun = jnp.asarray(boundaries) <= step
        return {"frame": jnp.sum(begun, dtype=jnp.int32)}

    return soft_method(
        inner,
        "structure_decay",
        rules[-1],
        straight_through=straight_through,
        frames=tuple(rules),
        arrays_at=arrays_at,
        pack_masks=pack_masks,
    )

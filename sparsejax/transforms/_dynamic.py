"""Dynamic sparse training: SET and RigL, which drop and grow at a fixed sparsity."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from sparsejax import allocation as allocations
from sparsejax import masks, schedules, scores
from sparsejax.patterns import Leaf, PatternTree, StackedTree, Unstructured
from sparsejax.transforms._arguments import check_count, check_key
from sparsejax.transforms._hard import FlatMasks, MaskChoice, Refresh, hard_method
from sparsejax.transforms._schedules import Scheduled
from sparsejax.transforms._sparsity import Sparsity, choose_masks
from sparsejax.typing import Params, ScalarOrSchedule, SparsityTree, Where, is_none


def sparse_evolution(
    inner: optax.GradientTransformation,
    sparsity: ScalarOrSchedule | SparsityTree | None = None,
    *,
    update_every: int,
    stop_step: int,
    drop_fraction: float | Callable = 0.3,
    key: jax.Array,
    where: Where = None,
    pattern: PatternTree = Unstructured(),
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """SET: drops the smallest weights and grows random ones.

    Starts from random masks. Every `update_every` steps, from step 0 to `stop_step`
    inclusive, the optimizer steps first; then the smallest kept weights are dropped and
    as many random ones are grown from 0, with fresh optimizer moments. A weight that is
    grown right after it was dropped keeps its value and moments.

    Non-finite gradients do not change the count of kept weights: a weight that became
    NaN is dropped first.

    Args:
      inner: the whole optax optimizer, clipping included, as in
        `optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr))`. The method comes
        last in a chain: its updates set pruned weights to 0, so nothing may scale them,
        and a clip before it would count the gradients of pruned weights too.
      sparsity: share of zeros: a float, a schedule, a tree prefix of these, or None
        when every pattern is N:M (then groups regrow what they dropped). It is rounded
        to whole units of each leaf, at least one of which stays: a leaf that is one
        block stays dense. Of a schedule traced values are clipped to [0, 1], others
        checked.
      update_every: steps between mask updates, at least 1.
      stop_step: last step that may update the masks, at least 1; below `update_every`
        they are updated at step 0 alone.
      drop_fraction: share of the kept weights replaced at step 0, annealed by a cosine
        to 0 at `stop_step`; or a schedule of your own, whose traced values are clipped
        to [0, 1].
      key: draws the first masks and every growth.
      where: which leaves are governed: a predicate `(path, leaf) -> bool`, a tree of
        bools, or None for `sj.patterns.is_default_governed`: all with two axes or more
        whose name is not bias, scale or embedding.
      pattern: of each leaf: a pattern, a tree prefix, or a function of `(path, leaf)`.
      stacked: leading axes that are layers stacked by scan, likewise.
      allocation: spreads a single sparsity over the leaves; under
        `optax.inject_hyperparams` named in `static_args`, also if left at its default.
      pack_masks: store 1 bit a weight instead of 1 byte.

    Returns:
      The wrapped optimizer.

    Raises:
      ValueError: if an argument is out of range or, at `init`, does not suit a leaf or
        a weight is NaN.
      TypeError: if an argument is of another kind.

    Example:
      >>> tx = sparse_evolution(optax.sgd(0.1), 0.5, update_every=10, stop_step=100,
      ...                       key=jax.random.key(0))
      >>> int(sj.masks_of(tx.init({"kernel": jnp.ones((4, 2))}))["kernel"].sum())
      4

    References:
      Mocanu et al., 2018, https://arxiv.org/abs/1707.04780, algorithm 2; magnitude
      instead of the smallest positive and largest negative weights, and a cosine drop
      fraction, as in the released code of RigL. That code breaks ties by noise; here
      the lower index stays.
    """

    def grow_scores(read: Refresh) -> Params:
        assert read.key is not None
        return scores.random(read.params, key=read.key)

    return _dynamic(
        inner,
        "sparse_evolution",
        Sparsity(
            sparsity, allocate=allocation, where=where, pattern=pattern, stacked=stacked
        ),
        grow_scores,
        update_every=update_every,
        stop_step=stop_step,
        drop_fraction=drop_fraction,
        key=key,
        steps_first=True,
        pack_masks=pack_masks,
    )


def rigl(
    inner: optax.GradientTransformation,
    sparsity: ScalarOrSchedule | SparsityTree | None = None,
    *,
    update_every: int,
    stop_step: int,
    drop_fraction: float | Callable = 0.3,
    key: jax.Array,
    where: Where = None,
    pattern: PatternTree = Unstructured(),
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """RigL: drops the smallest weights and grows those with the largest gradient.

    Starts from random masks. Every `update_every` steps, from step 0 to `stop_step`
    inclusive, the smallest kept weights are dropped and as many are grown from 0 where
    the dense gradient is largest, with fresh optimizer moments; on such a step the
    optimizer takes no step and its state stays. The gradient must be taken at
    `sj.forward_params(opt_state, params)`, which makes it dense.

    Non-finite gradients do not change the count of kept weights: a NaN gradient grows
    last, and a weight that became NaN is dropped first.

    Args:
      inner: the whole optax optimizer, clipping included, as in
        `optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr))`. The method comes
        last in a chain: its updates set pruned weights to 0, so nothing may scale them,
        and a clip before it would count the gradients of pruned weights too.
      sparsity: share of zeros: a float, a schedule, a tree prefix of these, or None
        when every pattern is N:M (then groups regrow what they dropped). It is rounded
        to whole units of each leaf, at least one of which stays: a leaf that is one
        block stays dense. Of a schedule traced values are clipped to [0, 1], others
        checked.
      update_every: steps between mask updates, at least 1.
      stop_step: last step that may update the masks, at least 1; below `update_every`
        they are updated at step 0 alone. The paper stops at 75 % of the run.
      drop_fraction: share of the kept weights replaced at step 0, annealed by a cosine
        to 0 at `stop_step`; or a schedule of your own, whose traced values are clipped
        to [0, 1].
      key: draws the first masks.
      where: which leaves are governed: a predicate `(path, leaf) -> bool`, a tree of
        bools, or None for `sj.patterns.is_default_governed`: all with two axes or more
        whose name is not bias, scale or embedding.
      pattern: of each leaf: a pattern, a tree prefix, or a function of `(path, leaf)`.
        With `Block` and `Channel` whole units are ranked by their summed scores.
      stacked: leading axes that are layers stacked by scan, likewise.
      allocation: spreads a single sparsity over the leaves; the paper uses
        `sj.erdos_renyi_kernel`. Under `optax.inject_hyperparams` named in
        `static_args`, also if left at its default.
      pack_masks: store 1 bit a weight instead of 1 byte.

    Returns:
      The wrapped optimizer.

    Raises:
      ValueError: if an argument is out of range or, at `init`, does not suit a leaf or
        a weight is NaN.
      TypeError: if an argument is of another kind.

    Example:
      >>> tx = rigl(optax.adam(1e-3), 0.5, update_every=100, stop_step=750,
      ...           key=jax.random.key(0), allocation=sj.erdos_renyi_kernel)
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> state = tx.init(params)
      >>> print(sj.masks_of(state)["kernel"])
      [[False  True  True  True]
       [False False  True False]]
      >>> grads = {"kernel": jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 9.0]])}
      >>> updates, state = tx.update(grads, state, params)
      >>> print(sj.masks_of(state)["kernel"])  # smallest weight out, steepest in
      [[False False  True  True]
       [False False  True  True]]
      >>> print(optax.apply_updates(params, updates)["kernel"])  # grown ones are 0
      [[0. 0. 3. 4.]
       [0. 0. 7. 0.]]

    References:
      Evci et al., 2020, https://arxiv.org/abs/1911.11134, algorithm 1. The released
      code breaks ties by noise; here the lower index stays.
    """

    def grow_scores(read: Refresh) -> Params:
        _check_shapes(read.grads, read.params)
        return scores.magnitude(read.grads)

    return _dynamic(
        inner,
        "rigl",
        Sparsity(
            sparsity, allocate=allocation, where=where, pattern=pattern, stacked=stacked
        ),
        grow_scores,
        update_every=update_every,
        stop_step=stop_step,
        drop_fraction=drop_fraction,
        key=key,
        skips_step=True,
        grows_by_gradient=True,
        pack_masks=pack_masks,
    )


def _dynamic(
    inner: optax.GradientTransformation,
    method: str,
    rule: Sparsity,
    grow_scores: Callable[[Refresh], Params],
    *,
    update_every: int,
    stop_step: int,
    drop_fraction: float | Callable,
    key: jax.Array,
    pack_masks: bool,
    steps_first: bool = False,
    skips_step: bool = False,
    grows_by_gradient: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Random masks at first, then drop by magnitude and grow by `grow_scores`."""
    check_count("update_every", update_every)
    check_count("stop_step", stop_step)
    check_key(key)
    given = Scheduled("drop_fraction", drop_fraction, at_most=1)
    drops = given
    if not callable(drop_fraction):
        drops = schedules.cosine_drop(drop_fraction, stop_step)

    def first(params: Params, leaves: tuple[Leaf | None, ...]) -> FlatMasks:
        draw = functools.partial(scores.random, key=key)
        return choose_masks(rule, draw, params, leaves, across_leaves=False)

    def refresh(read: Refresh, leaves: tuple[Leaf | None, ...]) -> FlatMasks:
        grow = jax.tree.leaves(grow_scores(read), is_leaf=is_none)
        drop = jax.tree.leaves(scores.magnitude(read.params), is_leaf=is_none)
        sparsities = rule.at(read.params, leaves, read.step)
        fraction = drops(read.step)
        return [
            None
            if leaf is None or mask is None
            else masks.drop_and_grow(
                mask,
                leaf,
                drop_scores=drop[i],
                grow_scores=grow[i],
                sparsity=sparsities[i],
                drop_fraction=fraction,
            )
            for i, (leaf, mask) in enumerate(zip(leaves, read.masks, strict=True))
        ]

    choice = MaskChoice(
        method,
        rule.leaves,
        first,
        rule.common,
        refresh,
        update_every=update_every,
        stop_step=stop_step,
        steps_first=steps_first,
        skips_step=skips_step,
        grows_by_gradient=grows_by_gradient,
        key=key,
        scheduled=(rule, given),
    )
    return hard_method(inner, choice, pack_masks=pack_masks)


def _check_shapes(grads: Params, params: Params) -> None:
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_none)[0]
    flat_grads = jax.tree.leaves(grads, is_leaf=is_none)
    for (path, weight), grad in zip(flat, flat_grads, strict=True):
        if grad is None or weight is None:
            continue  # not governed
        if jnp.shape(grad) != jnp.shape(weight):
            raise ValueError(
                "RigL grows by the gradient of each weight; got a gradient of shape "
                f"{jnp.shape(grad)} for a weight of {jnp.shape(weight)} at "
                f"{jax.tree_util.keystr(path)}. Average the gradients of examples, or "
                "use `sj.sparse_evolution`, which grows at random."
            )

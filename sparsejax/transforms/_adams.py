"""AdamS: the optimizer of CAST, which pulls losing weights to zero while dense."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from sparsejax import allocation as allocations
from sparsejax import masks
from sparsejax.patterns import PatternTree, StackedTree
from sparsejax.transforms._arguments import (
    check_count,
    check_given_params,
    check_number,
    check_params,
    check_update,
)
from sparsejax.transforms._schedules import Scheduled, check_ahead, check_now
from sparsejax.transforms._soft import current_masks
from sparsejax.transforms._sparsity import Sparsity
from sparsejax.transforms._state import (
    Options,
    Plain,
    Settings,
    SparseState,
    is_due,
    is_packed,
    loaded_masks,
    settled,
    store_masks,
)
from sparsejax.typing import Params, ScalarOrSchedule, SparsityTree, Where, is_none


def adams(
    learning_rate: optax.ScalarOrSchedule,
    total_steps: int,
    l1_decay: ScalarOrSchedule,
    *,
    pattern: PatternTree,
    mask_period: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    alpha_schedule: Callable | None = None,
    second_moment_of_pull: bool = True,
    sparsity: float | SparsityTree | None = None,
    where: Where = None,
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamS with a learning rate: `scale_by_adams`, then `-learning_rate`.

    The forward stays dense for the whole run; train on `params` as they are (or on
    `sj.weight_scaling.apply`), finish with `sj.sparse_params`. Let the learning rate
    decay: losing weights end up oscillating at about its last value. How large a weight
    can come to zero in a run says `sj.schedules.decay_budget`.

    Args:
      learning_rate: a number or an optax schedule.
      total_steps: length of the run, updates; sets the ramp of the pull.
      l1_decay: strength of the pull, of the gradients' order of magnitude; with a
        non-zero gradient a far smaller one does nothing.
      pattern: of each leaf: a pattern, a tree prefix, or a function of `(path, leaf)`.
      mask_period: steps between refreshes of the masks.
      b1: decay of the first moment.
      b2: decay of the second moment; 0.95 to 0.99 for runs below about 5,000 steps.
      eps: added to the root of the second moment; 0 is allowed.
      alpha_schedule: as for `scale_by_adams`.
      second_moment_of_pull: as for `scale_by_adams`.
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
      An optimizer of its own; it wraps no other.

    Raises:
      ValueError: as for `scale_by_adams`.
      TypeError: as for `scale_by_adams`.

    Example:
      >>> tx = adams(optax.cosine_decay_schedule(2e-5, 7500, 0.1), 7500, 4e-7,
      ...            pattern=sj.NM(2, 4))
      >>> params = {"kernel": jnp.arange(8.0).reshape(4, 2)}
      >>> state = tx.init(params)
      >>> int((sj.sparse_params(state, params)["kernel"] != 0).sum())
      4

    References:
      Huang et al., 2025 (CAST), https://arxiv.org/abs/2509.25996, algorithm 1.
    """
    check_number("learning_rate", learning_rate)
    return optax.chain(
        scale_by_adams(
            total_steps,
            l1_decay,
            pattern=pattern,
            mask_period=mask_period,
            b1=b1,
            b2=b2,
            eps=eps,
            alpha_schedule=alpha_schedule,
            second_moment_of_pull=second_moment_of_pull,
            sparsity=sparsity,
            where=where,
            stacked=stacked,
            allocation=allocation,
            pack_masks=pack_masks,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adams(
    total_steps: int,
    l1_decay: ScalarOrSchedule,
    *,
    pattern: PatternTree,
    mask_period: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    alpha_schedule: Callable | None = None,
    second_moment_of_pull: bool = True,
    sparsity: float | SparsityTree | None = None,
    where: Where = None,
    stacked: StackedTree = 0,
    allocation: Callable = allocations.uniform,
    pack_masks: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, with an L1 pull on the weights that lose their group.

    At update t, with `alpha = t / total_steps` and the masks of the last refresh (every
    `mask_period` updates, before the gradient is used):

        mu    = b1 mu + (1 - b1) g
        mu~   = mu                                            kept
              = (1 - alpha) mu + alpha l1_decay sign(w)       losing
        nu    = b2 nu + (1 - b2) mu~^2
        step  = mu~ / (1 - b1^(t+1)) / (sqrt(nu / (1 - b2^(t+1))) + eps)

    `mu~` is never written back to `mu`. Leaves that are not governed get plain Adam.
    Anything that rescales gradients before it changes the effective `l1_decay`.

    A non-finite gradient poisons the moments of its weight, as in Adam; masks are
    chosen from the weights, where NaN ranks lowest and the count stays exact.

    Args:
      total_steps: length of the run, updates. It sets the ramp, so it is kept in the
        state, and going on with another value raises; so does restoring a checkpoint
        into the state of another value.
      l1_decay: strength of the pull, at least 0; a number or a schedule of the step, of
        which a traced value below is clipped.
      pattern: of each leaf: a pattern, a tree prefix, or a function of `(path, leaf)`.
      mask_period: updates between refreshes of the masks, at least 1.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment; with 0, 0 / 0 is 0.
      alpha_schedule: step -> alpha in [0, 1]; None for `t / total_steps`.
      second_moment_of_pull: False takes `nu` from the gradient, as Adam does.
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
      A transformation to chain before `optax.scale_by_learning_rate`; its inner state
      is an `optax.ScaleByAdamState`.

    Raises:
      ValueError: if an argument is out of range, `total_steps` differs from that of the
        state, or at `init` if a pattern does not suit its leaf or a weight is NaN.
      TypeError: if an argument is of another kind, or at `init` if a governed leaf is
        narrower than float32, in which the pull would vanish.

    Example:
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0),
      ...                  scale_by_adams(1000, 1e-3, pattern=sj.NM(2, 4)),
      ...                  optax.scale_by_learning_rate(1e-3))
      >>> state = tx.init({"kernel": jnp.arange(8.0).reshape(4, 2)})

    References:
      Huang et al., 2025 (CAST), https://arxiv.org/abs/2509.25996, algorithm 1,
      equations 6-8. Departures: t counts from 0, so that the first alpha is 0 (the
      paper's algorithm 2 counts from 1); exactly n are kept under ties; alpha stays 1
      after `total_steps`.
    """
    check_count("total_steps", total_steps)
    check_count("mask_period", mask_period)
    for name, decay in (("b1", b1), ("b2", b2)):
        if not isinstance(decay, Tracer) and not 0 <= decay < 1:
            raise ValueError(f"`{name}` must be in [0, 1); got {decay}.")
    check_number("eps", eps)
    pull_at = Scheduled("l1_decay", l1_decay)
    rule = Sparsity.constant(
        sparsity, allocate=allocation, where=where, pattern=pattern, stacked=stacked
    )

    options = Options((rule.common,), update_every=mask_period)

    def init_fn(params: Params) -> Any:
        check_given_params("adams", params)
        check_ahead([pull_at], (0, total_steps - 1))
        leaves = rule.leaves(params)
        check_params(params, leaves, pack_masks=pack_masks)
        flat = jax.tree.leaves(params, is_leaf=is_none)
        for leaf, weight in zip(leaves, flat, strict=True):
            if leaf is not None and jnp.finfo(weight.dtype).bits < 32:
                raise TypeError(
                    "AdamS needs float32 weights, in narrower ones its pull vanishes; "
                    f"got {weight.dtype} at {leaf.name}. Keep float32 master weights "
                    "and cast them in the forward."
                )
        settings = Settings(
            "adams",
            Plain(),
            leaves,
            sparsities=rule.settled(params, leaves),
            update_every=mask_period,
        )
        found = current_masks(params, settings, {})
        return SparseState(
            jnp.zeros([], jnp.int32),
            store_masks(found, params, pack_masks),
            optax.scale_by_adam().init(params),
            # the value stands in the name too: a jitted update and a checkpoint that is
            # restored into another template see names before values
            {_total_steps_key(total_steps): jnp.asarray(total_steps, jnp.int32)},
            settings,
        )

    def update_fn(
        updates: Any, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        grads = updates  # optax's name for what comes in and what goes out
        del extra
        params = check_update(
            *("adams", grads, state, params), options=options, period="mask_period"
        )
        _check_total_steps(state, total_steps)
        check_now([pull_at], state.step)
        stored = jax.lax.cond(
            is_due(state),
            lambda: store_masks(
                current_masks(params, state.settings, state.arrays),
                state.masks,
                is_packed(state.masks),
            ),
            lambda: state.masks,
        )
        found = loaded_masks(state._replace(masks=stored))
        alpha = state.step / state.arrays[_total_steps_key(total_steps)]
        if alpha_schedule is not None:
            alpha = alpha_schedule(state.step)
        alpha = jnp.clip(jnp.asarray(alpha, jnp.float32), 0, 1)
        pull = pull_at(state.step)

        def pulled(alpha):
            def pulled_leaf(mask, mu, weight):
                losing = (1 - alpha) * mu + alpha * pull * jnp.sign(weight)
                return jnp.where(mask, mu, losing)

            return masks.map_masked(pulled_leaf, found, mu, params)

        moments = state.inner_state
        count = optax.safe_increment(moments.count)
        mu = optax.tree.update_moment(grads, moments.mu, b1, 1)
        squared = grads
        if second_moment_of_pull:
            # plain Adam where not governed: there the second moment is the gradient's
            squared = masks.map_masked(lambda _, g, m: m, found, grads, pulled(alpha))
        nu = optax.tree.update_moment_per_elem_norm(squared, moments.nu, b2, 2)
        # computed once more, from what XLA cannot know to be the same alpha: shared by
        # the second moment and the step it would be written to memory and read twice
        pulled_mu = pulled(jax.lax.optimization_barrier(alpha))

        def step_of(grad, moment, m, v):
            # a NumPy number among the arguments may have widened it
            dtype = jnp.result_type(grad, moment)
            return _ratio(m, jnp.sqrt(v) + eps).astype(dtype)

        scaled = jax.tree.map(
            step_of,
            grads,
            moments.mu,
            optax.tree.bias_correction(pulled_mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return scaled, state._replace(
            step=optax.safe_increment(state.step),
            masks=stored,
            inner_state=settled(
                optax.ScaleByAdamState(count=count, mu=mu, nu=nu), moments
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """0 / 0 is 0: with `eps=0` a weight without any gradient does not move."""
    return jnp.where(
        denominator == 0, 0, numerator / jnp.where(denominator == 0, 1, denominator)
    )


def _total_steps_key(total_steps: int | str) -> str:
    return f"total_steps={total_steps}"


def _check_total_steps(state: SparseState, total_steps: int) -> None:
    ((name, leaf),) = state.arrays.items()
    found = name.removeprefix(_total_steps_key(""))
    if found == str(total_steps) and not isinstance(leaf, Tracer):
        found = str(int(leaf))  # its leaves may be restored without their names
    if found != str(total_steps):
        raise ValueError(
            "a run of AdamS must go on with the `total_steps` it began with, which "
            f"sets its ramp; the state has {found}, this optimizer {total_steps}. Pass "
            f"total_steps={found}, or begin anew with `init`."
        )

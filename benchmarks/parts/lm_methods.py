"""Methods that make a language model N:M while it trains, for `lm_study.Trainer`.

All clip the gradient of the loss to norm 1, have the betas below and the schedule of
`lm_study.warmup_cosine`; a setting has `lr` and, where weights are made sparse, `pull`
or `ramp`. `rule` says what is pruned: `pattern`, `stacked` and perhaps `where`, as
methods and `sj.prune` take it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from benchmarks.parts import lm_study
from benchmarks.parts.lm_study import Method, Plan
from benchmarks.parts.scanned_decoder import Loss, stacked_axes
from sparsejax.typing import Params

BETAS: dict[str, Any] = {"b1": 0.9, "b2": 0.95}
ETA = 1 / 3  # the teacher's share; in AST too, whose loss is 1 CE + 1/2 KL

Losses = Callable[..., Loss]  # (eta=0, temperature=1) -> a loss
Rule = Mapping[str, Any]


def plain(losses: Losses, plan: Plan) -> Method:
    """Adam alone; nothing is pruned."""

    def as_they_are(opt_state, params):
        del opt_state
        return params

    tx = clipped(adam(plan))
    return Method(tx, losses(), forward=as_they_are, finish=as_they_are)


def dense(losses: Losses, plan: Plan, *, rule: Rule) -> Method:
    """Adam; its prune at the end is magnitude pruning in one shot."""

    def finish(opt_state, params):
        del opt_state
        return sj.apply_masks(params, sj.prune(params, **rule))

    return dataclasses.replace(plain(losses, plan), finish=finish)


def sr_ste(losses: Losses, plan: Plan, *, rule: Rule) -> Method:
    tx = sj.sr_ste(adam(plan), decay=plan.setting["pull"], **rule)
    return Method(clipped(tx), losses())


def mask_decay(losses: Losses, plan: Plan, *, rule: Rule, exponential: bool) -> Method:
    """MdGf, masked gradients; the setting `ramp` is that of `mask_factor`."""

    def factor(step):
        return mask_factor(
            step / plan.num_steps, plan.setting["ramp"], exponential=exponential
        )

    return Method(clipped(sj.mask_decay(adam(plan), factor, **rule)), losses())


def mask_factor(share: Any, ramp: Any, *, exponential: bool) -> jax.Array:
    """Of pruned weights, when a share of the run is done.

    The exponential one is at exp(-5) and the linear one at 0 after the share `ramp`;
    both are exactly 0 for the last tenth.
    """
    schedules = sj.schedules
    decay = (
        schedules.exponential_decay(5.0) if exponential else schedules.linear_decay(1.0)
    )
    return jnp.where(share < 0.9, decay(share / ramp), 0)


def structure_decay(
    losses: Losses,
    plan: Plan,
    *,
    rule: Rule,
    frames: Callable[[sj.NM], Sequence[sj.NM]],
) -> Method:
    """SdGf, masked gradients; `frames` lead to the pattern of the rule."""
    patterns = frames(rule["pattern"])
    starts = frame_starts(len(patterns), plan.num_steps, plan.setting["ramp"])
    others = {name: value for name, value in rule.items() if name != "pattern"}
    tx = sj.structure_decay(adam(plan), patterns, list(starts), **others)
    return Method(clipped(tx), losses())


def frame_starts(num_frames: int, num_steps: Any, ramp: Any) -> jax.Array:
    """First steps of equal frames over the share `ramp`; the last one goes on."""
    return (jnp.arange(num_frames) * (ramp * num_steps / num_frames)).astype(jnp.int32)


def ast_like(losses: Losses, plan: Plan, *, rule: Rule) -> Method:
    """SR-STE whose decay grows over the first quarter of the steps, and a teacher.

    The decay is in the gradient, as in AST's script for LLaMA. Departures: masks are
    refreshed in every step in place of every tenth, and there are no low-rank branches
    (SLoRB).
    """

    def decay(step):
        return plan.setting["pull"] * jnp.minimum(4 * step / plan.num_steps, 1)

    tx = sj.sr_ste(adam(plan), decay=decay, **rule)
    return Method(clipped(tx), losses(eta=ETA, temperature=2.0))


def cast(
    losses: Losses,
    plan: Plan,
    *,
    rule: Rule,
    scaling: bool = True,
    eta: float = ETA,
) -> Method:
    """CAST, or with `scaling` and `eta` parts of it; AdamS alone without both."""

    def where(path, leaf):  # scales are left to plain Adam
        names = [getattr(entry, "key", None) for entry in path]
        stacked = stacked_axes(path, leaf)
        return "scales" not in names and sj.patterns.is_default_governed(
            path, leaf, stacked
        )

    tx = sj.adams(
        lm_study.warmup_cosine(plan),
        1,  # static, where the length is traced; the ramp below takes its place
        plan.setting["pull"],
        alpha_schedule=lambda step: step / plan.num_steps,
        where=where,
        **rule,
        **BETAS,
    )
    if not scaling:
        return Method(clipped(tx), losses(eta=eta))

    def start(weights):
        scales = sj.weight_scaling.init(weights, stacked=rule["stacked"])
        return {"weights": weights, "scales": scales}

    def forward(opt_state, params):
        params = sj.forward_params(opt_state, params)
        return sj.weight_scaling.apply(params["weights"], params["scales"])

    def finish(opt_state, params):
        masks = sj.prune(params["weights"], **rule)
        return sj.weight_scaling.fold(params["weights"], params["scales"], masks)

    return Method(clipped(tx), losses(eta=eta), start, forward, finish)


@jax.jit(static_argnames="m")
def most_kept(kernels: Params, m: int) -> tuple[jax.Array, jax.Array]:
    """The most weights left in a group of `m` inputs, and the share of zeros.

    Leaves that are no stacked kernels, `[num_layers, d_in, d_out]`, do not count.
    """
    kernels = [kernel for kernel in jax.tree.leaves(kernels) if kernel.ndim == 3]
    groups = [
        jnp.count_nonzero(kernel.reshape(len(kernel), -1, m, kernel.shape[-1]), axis=2)
        for kernel in kernels
    ]
    most = jnp.stack([jnp.max(group) for group in groups]).max()
    left = jnp.stack([jnp.sum(group, dtype=jnp.float32) for group in groups]).sum()
    return most, 1 - left / sum(kernel.size for kernel in kernels)


def clipped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def adam(plan: Plan) -> optax.GradientTransformation:
    return optax.adam(lm_study.warmup_cosine(plan), **BETAS)

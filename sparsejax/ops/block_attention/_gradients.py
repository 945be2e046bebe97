"""One differentiable function out of the kernels of a device.

With P the softmax weights, dP = dO V^T and delta = sum(O * dO) - d lse of each query,
dS = P * (dP - delta): a gradient of the log-sum-exp needs no kernel of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparsejax.formats import BlockMask
from sparsejax.ops._once import differentiated_once
from sparsejax.ops._platform import jit_kernel
from sparsejax.ops.block_attention._rules import Rules, lengthened, split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lists:
    """What a kernel walks.

    Attributes:
      whole: blocks of which every pair is seen.
      partial: blocks in which the rules are looked at; None if there are none.
      rules: on positions, lengthened.
      bias: float32 of each block, `[batch|1, heads|kv_heads|1, rows, columns]`, or
        None; in units of the scores, after scaling.
    """

    whole: BlockMask
    partial: BlockMask | None
    rules: Rules
    bias: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a device; shapes as in the reference.

    Attributes:
      forward: `(q, k, v, lists, scale)` gives the outputs and float32 lse `[batch,
        heads, queries]`, -inf for a query that sees no key.
      backward: `(q, k, v, do, lse, delta, lists, scale)` gives dq, dk and dv. There lse
        is +inf for such a query, so that its weights are 0.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def differentiable(kernels: Kernels) -> Callable[..., Any]:
    """Gives a function with the signature of the reference.

    The kernels are jitted: one for Hopper takes half a second to lower, and layers of
    equal shapes then share it.

    Outputs and log-sum-exp are named "block_attention", for a policy of
    `jax.checkpoint` that keeps them. The mask and the bias get no gradient.
    """
    kernels = Kernels(
        jit_kernel(kernels.forward, static_argnums=4),
        jit_kernel(kernels.backward, static_argnums=7),
    )

    def block_attention(q, k, v, block_mask, rules, bias, *, scale):
        rules = lengthened(rules, block_mask)
        whole, partial = split(block_mask, rules)
        return _call(kernels, scale, q, k, v, Lists(whole, partial, rules, bias))

    return block_attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _call(kernels, scale, q, k, v, lists):
    return kernels.forward(q, k, v, lists, scale)


def _fwd(kernels, scale, q, k, v, lists):
    q, k, v = differentiated_once((q, k, v))
    out, lse = kernels.forward(q, k, v, lists, scale)
    out, lse = (checkpoint_name(a, "block_attention") for a in (out, lse))
    return (out, lse), (q, k, v, out, lse, lists)


def _bwd(kernels, scale, residuals, gradients):
    q, k, v, out, lse, lists = residuals
    gradients = differentiated_once(gradients)
    do, dlse = gradients
    product = out.astype(jnp.float32) * do.astype(jnp.float32)
    delta = jnp.sum(product, axis=-1).swapaxes(1, 2) - dlse
    sees_none = lse == -jnp.inf
    delta = jnp.where(sees_none, 0, delta)  # of an lse that is constant; 0 * NaN
    lse = jnp.where(sees_none, jnp.inf, lse)
    dq, dk, dv = kernels.backward(q, k, v, do, lse, delta, lists, scale)
    return dq, dk, dv, None


_call.defvjp(_fwd, _bwd)

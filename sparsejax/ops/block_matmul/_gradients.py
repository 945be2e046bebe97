"""One differentiable function out of the three products of a kernel.

The forward walks the lists by column, the gradient of x the lists by row of the same
mask, and the gradient of w the kept blocks: a kernel brings these three, and what
surrounds them is written here once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.ops.block_matmul._reference import Activation, epilogue


@dataclasses.dataclass(frozen=True)
class Products:
    """The three products, each of one kernel call; `w` as in the reference.

    Attributes:
      forward: `(x, w, block_mask, bias, activation)` gives y, `[num_rows, d_out]`; bias
        and activation may be None.
      grad_x: `(dy, w, block_mask)` gives dx, `[num_rows, d_in]`.
      grad_w: `(x, dy, block_mask, w)` gives dw of the shape and dtype of `w`, zero at
        blocks that are not kept; of `w` shape and dtype are read.
    """

    forward: Callable[..., jax.Array]
    grad_x: Callable[..., jax.Array]
    grad_w: Callable[..., jax.Array]


def differentiable(products: Products) -> Callable[..., Any]:
    """Gives a function with the signature of the reference.

    The products are jitted: a kernel for Hopper takes half a second to lower, and
    layers of equal shapes then share it.

    The bias and the activation are part of the kernel where no gradient is asked for.
    Else the sums before the activation are kept, and XLA applies it.
    """
    products = Products(
        jax.jit(products.forward, static_argnums=4),
        jax.jit(products.grad_x),
        jax.jit(products.grad_w),
    )

    def block_matmul(x, w, block_mask, bias=None, full_dw=False, *, activation=None):
        known = bool(full_dw) if isinstance(full_dw, bool) else None
        traced = full_dw if known is None else None
        return _call(products, activation, known, x, w, block_mask, bias, traced)

    return block_matmul


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _call(products, activation, known_full, x, w, block_mask, bias, full_dw):
    del known_full, full_dw
    return products.forward(x, w, block_mask, bias, activation)


def _fwd(products, activation, known_full, x, w, block_mask, bias, full_dw):
    del known_full
    z = products.forward(x, w, block_mask, bias, None)
    y, kept = z, None
    if activation is not None:
        y, kept = _activated(activation, z), z
    return y, (x, w, block_mask, bias, full_dw, kept)


def _bwd(products, activation, known_full, residuals, dy):
    x, w, block_mask, bias, full_dw, z = residuals
    if activation is not None:
        dy = jax.vjp(functools.partial(_activated, activation), z)[1](dy)[0]
    dx = products.grad_x(dy, w, block_mask)

    def kept_dw():
        return products.grad_w(x, dy, block_mask, w)

    def all_dw():
        dw = jnp.dot(x.T, dy, preferred_element_type=jnp.float32)
        return dw.astype(w.dtype)

    if known_full is None:
        dw = jax.lax.cond(full_dw, all_dw, kept_dw)
    else:
        dw = all_dw() if known_full else kept_dw()
    db = None
    if bias is not None:
        db = jnp.sum(dy, axis=0, dtype=jnp.float32).astype(bias.dtype)
    return dx, dw, None, db, None


_call.defvjp(_fwd, _bwd)


def _activated(activation: Activation, z: jax.Array) -> jax.Array:
    return epilogue(z.astype(jnp.float32), None, activation).astype(z.dtype)

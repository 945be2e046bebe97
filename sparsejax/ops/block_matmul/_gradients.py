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

from sparsejax.ops._activations import unsupported_activation
from sparsejax.ops._once import differentiated_once
from sparsejax.ops._platform import jit_kernel
from sparsejax.ops.block_matmul._reference import epilogue


@dataclasses.dataclass(frozen=True)
class Products:
    """The three products, each of one kernel call; `w` as in the reference.

    Attributes:
      forward: `(x, w, block_mask, bias, activation, dtype)` gives y of that dtype,
        `x.dtype` or float32, `[num_rows, d_out]`; bias and activation may be None.
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

    The activation is part of the kernel where it can be, and no gradient is asked for.
    Else the kernel gives the sums before it, as they are, float32: what is rounded
    twice would be another value. XLA applies the activation, and the sums are held for
    the backward.
    """
    products = Products(
        jit_kernel(products.forward, static_argnums=(4, 5)),
        jit_kernel(products.grad_x),
        jit_kernel(products.grad_w),
    )

    def block_matmul(x, w, block_mask, bias=None, full_dw=False, *, activation=None):
        known = bool(full_dw) if isinstance(full_dw, bool) else None
        traced = full_dw if known is None else None
        operands = x, w, block_mask, bias, traced
        if activation is None:
            return _sums(products, x.dtype, known, *operands)
        if unsupported_activation(activation, with_derivative=False):
            return _activated(products, activation, known, *operands)
        return _fused(products, activation, known, *operands)

    return block_matmul


def _activated(products, activation, known_full, x, *operands):
    # of the activation nothing is held: its derivative computes it again
    @jax.checkpoint
    def activated(z):
        return epilogue(z, None, activation).astype(x.dtype)

    dtype = jnp.dtype(jnp.float32)
    return activated(_sums(products, dtype, known_full, x, *operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused(products, activation, known_full, x, w, block_mask, bias, full_dw):
    del known_full, full_dw
    return products.forward(x, w, block_mask, bias, activation, x.dtype)


def _fused_fwd(*args):
    return jax.vjp(functools.partial(_activated, *args[:3]), *args[3:])


def _fused_bwd(products, activation, known_full, pull, dy):
    del products, activation, known_full
    return pull(dy)


_fused.defvjp(_fused_fwd, _fused_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(products, dtype, known_full, x, w, block_mask, bias, full_dw):
    del known_full, full_dw
    return products.forward(x, w, block_mask, bias, None, dtype)


def _fwd(products, dtype, known_full, x, w, block_mask, bias, full_dw):
    y = _sums(products, dtype, known_full, x, w, block_mask, bias, full_dw)
    return y, (x, w, block_mask, bias, full_dw)


def _bwd(products, dtype, known_full, residuals, dy):
    del dtype
    x, w, block_mask, bias, full_dw = residuals
    x, w, dy = differentiated_once((x, w, dy))
    db = None
    if bias is not None:
        db = jnp.sum(dy, axis=0, dtype=jnp.float32).astype(bias.dtype)
    dy = dy.astype(x.dtype)  # from float32 where XLA applies an activation
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
    return dx, dw, None, db, None


_sums.defvjp(_fwd, _bwd)

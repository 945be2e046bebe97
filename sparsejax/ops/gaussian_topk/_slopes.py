"""What is done with each entry, in operations that every kernel language has."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from sparsejax.ops.gaussian_topk._reference import Activation, glu

# by their names in a jaxpr; `add_any` and `one_minus_square` come from derivatives
_OPERATIONS = frozenset(
    "abs add add_any and broadcast_in_dim convert_element_type div eq exp ge gt "
    "integer_pow le log logistic lt max min mul ne neg one_minus_square or rsqrt "
    "select_n square sub tanh".split()
)
_CALLS = ("jit", "custom_jvp_call", "custom_vjp_call")


def survivors(excess: jax.Array, huber_delta: float) -> jax.Array:
    """`max(u, 0)`, or its Huber form; NaN stays NaN.

    Args:
      excess: u = x - theta.
      huber_delta: 0, or the width of the quadratic part.

    Returns:
      As `excess`.

    Example:
      >>> survivors(jnp.array([-1.0, 1.0, 3.0]), 2.0)
      Array([0.  , 0.25, 2.  ], dtype=float32)
    """
    excess = jnp.maximum(excess, 0.0)
    if huber_delta == 0:
        return excess
    clipped = jnp.minimum(excess, huber_delta)
    return clipped * (excess - 0.5 * clipped) * (1 / huber_delta)


def passed_back(grad: jax.Array, excess: jax.Array, huber_delta: float) -> jax.Array:
    """`grad` times the slope of `survivors` at `excess`, which is 0 at u = 0.

    Args:
      grad: gradient of the output.
      excess: u = x - theta.
      huber_delta: 0, or the width of the quadratic part.

    Returns:
      As `grad`.

    Example:
      >>> passed_back(jnp.ones(3), jnp.array([0.0, 1.0, 3.0]), 2.0)
      Array([0. , 0.5, 1. ], dtype=float32)
    """
    if huber_delta != 0:
        grad = grad * jnp.minimum(excess * (1 / huber_delta), 1.0)
    return jnp.where(excess > 0.0, grad, 0.0)


def glu_back(
    grad: jax.Array, s: jax.Array, up: jax.Array | None, activation: Activation | None
) -> tuple[jax.Array, jax.Array | None]:
    """The gradients of `s` and `up` for that of `glu(s, up, activation)`.

    Args:
      grad: gradient of the output.
      s: what survives.
      up: what it is multiplied by, or None.
      activation: of `s`, or None.

    Returns:
      As `s` and `up`.

    Example:
      >>> s, up = jnp.array([0.0, 2.0]), jnp.array([3.0, 3.0])
      >>> glu_back(jnp.ones(2), s, up, jnp.square)
      (Array([ 0., 12.], dtype=float32), Array([0., 4.], dtype=float32))
    """
    return jax.vjp(functools.partial(glu, activation=activation), s, up)[1](grad)


def unsupported_activation(
    activation: Activation | None, *, with_derivative: bool = True
) -> str | None:
    """Why kernels cannot hold this activation and its derivative; None if they can.

    Args:
      activation: elementwise, or None.
      with_derivative: False if they need not hold that.

    Returns:
      The reason, or None.

    Example:
      >>> unsupported_activation(jnp.sin)
      '`activation` must use none but operations of kernels; got cos, sin'
    """
    if activation is None:
        return None

    def both(x, grad):
        out, pull = jax.vjp(activation, x)
        return out, pull(grad)

    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    if with_derivative:
        closed = jax.make_jaxpr(both)(x, x)
    else:
        closed = jax.make_jaxpr(activation)(x)
    if closed.consts:
        return "`activation` must not close over arrays"
    missing = ", ".join(sorted({*_operations(closed.jaxpr)} - _OPERATIONS))
    if missing:
        return f"`activation` must use none but operations of kernels; got {missing}"
    return None


def _operations(jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _CALLS:
            inner = eqn.params.get("call_jaxpr") or eqn.params["jaxpr"]
            yield from _operations(inner.jaxpr)
        elif name == "integer_pow" and eqn.params["y"] < 2:
            yield f"{name} of {eqn.params['y']}"
        else:
            yield name

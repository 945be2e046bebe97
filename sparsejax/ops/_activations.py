"""The activations of operations, and which of them kernels can hold."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp

Activation: TypeAlias = Callable[[jax.Array], jax.Array]
"""An elementwise function. Kernels take one that closes over no array, of the
operations that they have: GELU in its tanh form, SiLU and ReLU, but neither GELU in its
erf form nor softplus."""

# by their names in a jaxpr; `add_any` and `one_minus_square` come from derivatives
_OPERATIONS = frozenset(
    "abs add add_any and broadcast_in_dim convert_element_type div eq exp ge gt "
    "integer_pow le log logistic lt max min mul ne neg one_minus_square or rsqrt "
    "select_n square sub tanh".split()
)
_CALLS = ("jit", "custom_jvp_call", "custom_vjp_call")


def unsupported_activation(
    activation: Activation | None,
    *,
    with_derivative: bool = True,
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

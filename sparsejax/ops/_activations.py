"""The activations of operations: which of them kernels can hold, and in which form."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sparsejax._jaxpr import bind, called, evaluate

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
            yield from _operations(called(eqn).jaxpr)
        elif name == "integer_pow" and eqn.params["y"] < 2:
            yield f"{name} of {eqn.params['y']}"
        else:
            yield name


def without_custom_rules(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays without the derivative rules that it carries.

    A Mosaic GPU kernel of jax 0.10 cannot hold a function with a rule of its own, as
    `jax.nn.relu` is one. Inside a kernel nothing is differentiated. Nor can a kernel of
    any version hold the `add_any` by which derivatives add up; it becomes `add`.

    Args:
      fn: takes trees of arrays and gives one.

    Returns:
      The function.

    Example:
      >>> float(without_custom_rules(jax.nn.relu)(2.0))
      2.0
    """

    def run(eqn, operands):
        if eqn.primitive.name == "add_any":
            return [jax.lax.add(*operands)]
        inner = called(eqn)
        return bind(eqn, operands) if inner is None else evaluate(inner, operands, run)

    def without_rules(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        out = evaluate(closed, jax.tree.leaves(args), run)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return without_rules

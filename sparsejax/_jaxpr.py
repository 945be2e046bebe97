"""Functions evaluated equation by equation, each as the caller wants it.

Every room may import this module; it imports none of them.
"""

from collections.abc import Callable, Sequence
from typing import Any


def evaluate(
    closed: Any, args: Sequence[Any], run: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Evaluates what `jax.make_jaxpr` gave.

    Args:
      closed: a closed jaxpr.
      args: its arguments.
      run: takes an equation and its operands, and gives its results; see `bind`.

    Returns:
      The results.

    Example:
      >>> closed = jax.make_jaxpr(lambda x: 2.0 * x + 1.0)(3.0)
      >>> print(*evaluate(closed, [3.0], bind))
      7.0
    """
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, args, strict=True)

    def read(atom):
        return atom.val if is_literal(atom) else values[atom]

    for eqn in closed.jaxpr.eqns:
        outs = run(eqn, [read(atom) for atom in eqn.invars])
        values |= zip(eqn.outvars, outs, strict=True)
    return [read(atom) for atom in closed.jaxpr.outvars]


def bind(eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """Runs an equation as it stands.

    Args:
      eqn: of a jaxpr.
      operands: as many as it takes.

    Returns:
      Its results.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*operands, **params)
    return found if eqn.primitive.multiple_results else [found]


def called(eqn: Any) -> Any:
    """The closed jaxpr that an equation calls, as one of `jit` does; else None."""
    return eqn.params.get("call_jaxpr") or eqn.params.get("jaxpr")


def is_literal(atom: Any) -> bool:
    """Whether an operand is a constant; asking `jax.extend` would load pallas."""
    return hasattr(atom, "val")

"""Differences between the versions of JAX that sparsejax runs on, and nothing else.

This module imports no pallas: what needs it is given the module as an argument.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax


def mosaic_gpu_params(plgpu: Any, **settings: Any) -> Any:
    """The compiler parameters of a kernel that is written for lane semantics.

    `plgpu.CompilerParams` lowers by lane in jax 0.10 and by warpgroup in jax 0.12. The
    two differ in which layouts and reductions they take, so a kernel names its own.

    Args:
      plgpu: the module `jax.experimental.pallas.mosaic_gpu`.
      settings: further fields of `plgpu.CompilerParams`.

    Returns:
      A `plgpu.CompilerParams`.

    Example:
      >>> from jax.experimental.pallas import mosaic_gpu as plgpu
      >>> mosaic_gpu_params(plgpu, approx_math=True).lowering_semantics.name
      'Lane'
    """
    lane = plgpu.LoweringSemantics.Lane
    return plgpu.CompilerParams(lowering_semantics=lane, **settings)


def can_interpret_mosaic_gpu(plgpu: Any) -> bool:
    """Whether Mosaic GPU kernels can be run on a CPU, which jax 0.10 cannot.

    Args:
      plgpu: the module `jax.experimental.pallas.mosaic_gpu`.

    Returns:
      True if `plgpu.force_gpu_interpret_mode` is there.
    """
    return hasattr(plgpu, "force_gpu_interpret_mode")


def mosaic_gpu_load(plgpu: Any, ref: Any, layout: Any) -> Any:
    """Loads a reference to registers of a given layout.

    jax 0.10 takes the indices apart from the reference, later ones had better not.

    Args:
      plgpu: the module `jax.experimental.pallas.mosaic_gpu`.
      ref: of shared or device memory.
      layout: of `plgpu.Layout`, maybe reduced.

    Returns:
      The array.
    """
    apart = inspect.signature(plgpu.load).parameters.get("idx")
    indices = ((),) if apart and apart.default is apart.empty else ()
    return plgpu.load(ref, *indices, layout=layout, optimized=False)


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
      >>> import jax
      >>> float(without_custom_rules(jax.nn.relu)(2.0))
      2.0
    """

    def evaluate(jaxpr, consts, *args):
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, args, strict=True)

        def read(atom):
            # a literal has its value; to ask for its class would load pallas
            return atom.val if hasattr(atom, "val") else values[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            inner = eqn.params.get("call_jaxpr") or eqn.params.get("jaxpr")
            if eqn.primitive.name == "add_any":
                out = jax.lax.add(*operands)
            elif inner is None:
                out = eqn.primitive.bind(*operands, **eqn.params)
            else:
                out = evaluate(inner.jaxpr, inner.consts, *operands)
            several = eqn.primitive.multiple_results or inner is not None
            values |= zip(eqn.outvars, out if several else [out], strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def without_rules(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        out = evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return without_rules

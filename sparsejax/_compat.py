"""Differences between the versions of JAX that sparsejax runs on, and nothing else.

This module imports no pallas: what needs it is given the module as an argument.
"""

import inspect
from typing import Any


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

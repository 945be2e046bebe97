"""What the larger kernels for Hopper share: one warpgroup copies, two compute.

A program is three warpgroups. The third copies what is needed into slots of shared
memory, as far ahead as there are free slots; the other two compute with what is there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsejax import _compat

COMPUTING = 2  # warpgroups
SWIZZLED = 64  # values of 16 bits in the bytes of a swizzle
_SWIZZLE = 128  # bytes
_REGISTERS = 504  # of a thread in each of the three, together


def smem(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory that the tensor cores read and bulk copies write."""
    tiling = plgpu.TilingTransform((8, _SWIZZLE // jnp.dtype(dtype).itemsize))
    transforms = (tiling, plgpu.SwizzleTransform(_SWIZZLE))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def launch(
    copying: Callable[[dict[str, Any]], None],
    computing: Callable[[dict[str, Any], jax.Array], None],
    *,
    operands: dict[str, jax.Array],
    results: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    programs: int,
    copying_registers: int = 24,
    approx_math: bool = False,
) -> dict[str, jax.Array]:
    """Runs a kernel of one warpgroup that copies and two that compute.

    Args:
      copying: takes all references, by name.
      computing: likewise, and the number of the warpgroup; its copies to device memory
        are waited for at the end.
      operands: in device memory.
      results: likewise.
      scratch: shared memory and barriers of a program.
      programs: the length of the grid, whose axis is called "program".
      copying_registers: of a thread that copies; the others share what is left.
      approx_math: whether exponentials and divisions may be off by a few bits.

    Returns:
      The results, by name.
    """
    names = [*operands, *results, *scratch]
    computing_registers = (_REGISTERS - copying_registers) // COMPUTING // 8 * 8

    def body(*refs):
        refs = dict(zip(names, refs, strict=True))
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup == COMPUTING)
        def _():
            plgpu.set_max_registers(copying_registers, action="decrease")
            copying(refs)

        @pl.when(warpgroup < COMPUTING)
        def _():
            plgpu.set_max_registers(computing_registers, action="increase")
            computing(refs, warpgroup)
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=tuple(scratch.values()),
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=_compat.mosaic_gpu_params(plgpu, approx_math=approx_math),
    )
    return dict(zip(results, kernel(*operands.values()), strict=True))

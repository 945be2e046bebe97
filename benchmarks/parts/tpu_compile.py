"""Compiles programs for TPUs without one, by the compiler in libtpu."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {
    "v4": {
        "topology_name": "v4:2x2x1",
        "chip_config_name": "megacore",
    },  # as JAX has it
    "v5e": {"topology_name": "v5e:2x2"},
    "v5p": {"topology_name": "v5p:2x2x1"},
    "v6e": {"topology_name": "v6e:2x2"},
}
"""Generations, and four chips of each, a device for each chip."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What came out.

    Attributes:
      ok: whether it compiles, kernels included.
      kernels: calls of Mosaic kernels in the program; None if it does not compile.
      temp_mb: memory beside operands and results, of a device, in units of 10**6 bytes.
      error: the first line of the compiler's message, or None.
    """

    ok: bool
    kernels: int | None = None
    temp_mb: float | None = None
    error: str | None = None


def find_libtpu() -> str:
    """Makes libtpu load without a TPU, and gives its version.

    Raises:
      RuntimeError: if it is not installed; says how to get it.
    """
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        pip = f'pip install "jax[tpu]=={jax.__version__}"'
        raise RuntimeError(f"compiling for a TPU needs libtpu: {pip}") from None
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # asks no machine of a cloud what it is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes compile at a time
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return version


def compile_for(
    generation: str,
    fn: Callable[..., Any],
    operands: Sequence[Any],
    specs: Sequence[PartitionSpec] | None = None,
) -> Report:
    """Compiles `jit(fn)`, for one chip or for four.

    Args:
      generation: one of `TOPOLOGIES`; `find_libtpu` comes before.
      fn: calls kernels by name.
      operands: `jax.ShapeDtypeStruct`s, or trees of them.
      specs: how each operand is cut over the axis "x" of four chips, inside of
        `jax.shard_map`; None for one chip.
    """
    settings = TOPOLOGIES[generation]
    devices = topologies.get_topology_desc(platform="tpu", **settings).devices
    chips = devices if specs else devices[:1]
    mesh = Mesh(np.array(chips), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    by_operand = specs or [PartitionSpec()] * len(operands)
    if specs:
        out = PartitionSpec("x")
        fn = jax.shard_map(fn, mesh=mesh, in_specs=tuple(specs), out_specs=out)
    placed = [
        jax.tree.map(
            lambda a, spec=spec: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=NamedSharding(mesh, spec)
            ),
            operand,
        )
        for operand, spec in zip(operands, by_operand, strict=True)
    ]
    try:
        traced = jax.jit(fn).trace(*placed)
        program = traced.lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:  # of any kind: lowering runs the kernel's own Python
        return Report(False, error=f"{error}".strip().split("\n")[0])
    memory, text = program.memory_analysis(), program.as_text()
    assert memory and text, "libtpu gives both"
    kernels = text.count('custom_call_target="tpu_custom_call"')
    return Report(True, kernels, round(memory.temp_size_in_bytes / 1e6, 2))

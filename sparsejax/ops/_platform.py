"""Which implementation of an operation runs: the one named, or the fastest here."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax

from sparsejax.ops._varying import axes_of, varying

Implementation: TypeAlias = Literal["reference", "xla", "pallas_tpu", "mosaic_gpu"]
"""The names that `implementation` takes, of which each operation has some."""

_PLATFORM = {"pallas_tpu": "tpu", "mosaic_gpu": "cuda"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One fast implementation of an operation.

    Attributes:
      run: takes the operands, gives what the reference gives.
      unsupported_reason: takes the operands, of which it reads shapes and dtypes only;
        says why `run` cannot take them, or None if it can.
    """

    run: Callable[..., Any]
    unsupported_reason: Callable[..., str | None]


def dispatch(
    operands: Sequence[Any],
    implementation: Implementation | None,
    *,
    reference: Callable[..., Any],
    others: Mapping[str, Callable[..., Any]] | None = None,
    kernels: Mapping[str, Callable[[], Kernel]],
) -> Any:
    """Runs an operation by the implementation that is named, or by the fastest.

    None always works. It takes a kernel if a device that can run it is visible, the
    kernel supports the operands, and no compiler has to cut it for several devices; it
    is chosen at lowering, so that the arrays' own platform decides. Else it takes the
    reference, directly. A named implementation never looks at the devices, so
    a program for a GPU or a TPU can be exported from a CPU, and never falls back.

    Args:
      operands: arrays, the arguments of every implementation.
      implementation: a name, or None.
      reference: the plain implementation.
      others: by name what is no kernel either, and runs only where it is named.
      kernels: for each other name a function that imports and gives the kernel. It is
        called only where the kernel may run: pallas is loaded there and not before.

    Returns:
      What the implementation returns.

    Raises:
      ValueError: if no operation has the name.
      NotImplementedError: if this operation does not have it, or the named kernel
        cannot take these operands; with the reason.

    Example:
      >>> float(dispatch([jnp.ones(3)], None, reference=jnp.sum, kernels={}))
      3.0
    """
    if implementation is None:
        branches = {}
        for name in visible_kernels() & kernels.keys():
            kernel = kernels[name]()
            if kernel.unsupported_reason(*operands) is None:
                branches[_PLATFORM[name]] = kernel.run
        if not branches:
            return reference(*operands)
        # a derivative holds what any branch needs: for the reference its operands
        default = jax.checkpoint(reference)
        operands = varying(operands, axes_of(operands))
        return jax.lax.platform_dependent(*operands, default=default, **branches)
    plain = {"reference": reference, **(others or {})}
    if implementation in plain:
        return plain[implementation](*operands)
    if implementation not in kernels:
        names = ", ".join([*plain, *kernels])
        if implementation in get_args(Implementation):
            raise NotImplementedError(
                f"implementation={implementation!r}: this operation has no such "
                f"implementation. Pass None or one of {names}."
            )
        raise ValueError(
            f"`implementation` must be None or one of {names}; got {implementation!r}."
        )
    kernel = kernels[implementation]()
    reason = kernel.unsupported_reason(*operands)
    if reason is not None:
        raise NotImplementedError(
            f"implementation={implementation!r}: {reason}. Pass None or 'reference'."
        )
    return kernel.run(*varying(operands, axes_of(operands)))


def jit_kernel(fn: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """`jax.jit` for what calls a kernel.

    Layers of equal shapes then share what it is lowered to. Python numbers have 32 bits
    in it, as kernels compute with, also where `jax_enable_x64` is set. Inside of
    `jax.shard_map` its results vary as its arguments do: kernels for Hopper do not say.

    Args:
      fn: takes arrays of 32 bits or fewer, and what is static.
      **static: `static_argnums` or `static_argnames`.

    Returns:
      The function.

    Example:
      >>> with jax.enable_x64(True):
      ...     print(jit_kernel(lambda x: jnp.arange(2) + 0.5 * x)(jnp.float32(2)).dtype)
      float32
    """
    jitted = jax.jit(fn, **static)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(False):
            results = jitted(*args, **kwargs)
        return varying(results, axes_of((args, kwargs)))

    return run


def visible_kernels() -> set[str]:
    """The names of the kernels that the visible devices can run.

    Mosaic GPU kernels here use instructions of Hopper (sm_90), which no other GPU has.
    All visible GPUs must be of that kind: a program does not know on which it will run.
    With several devices a kernel is chosen only inside of `jax.shard_map` over all axes
    of the mesh: elsewhere the compiler cuts the arrays, and it cannot cut a kernel.
    """
    devices = jax.devices()
    if len(devices) > 1 and not jax.sharding.get_abstract_mesh().are_all_axes_manual:
        return set()
    if all(d.platform == "tpu" for d in devices):
        return {"pallas_tpu"}
    capability = {str(getattr(d, "compute_capability", "")) for d in devices}
    if all(d.platform == "gpu" for d in devices) and capability == {"9.0"}:
        return {"mosaic_gpu"}
    return set()

"""Compiles Mosaic GPU kernels for Hopper without a GPU, and reads what came out.

JAX lowers for "cuda" on a CPU too; each kernel in the result is a custom call that
holds an MLIR module. Where there is a GPU, `MosaicGpuCompile` of JAX's CUDA plugin
compiles it: it asks the driver what kind of device there is, and hands it the binary.
So a child process loads a small stand-in for the driver's library, which says Hopper
and takes what it is given, and calls that function. The real driver is never loaded.
"""

import dataclasses
import functools
import importlib.metadata
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.mlir import ir

_STAND_IN = r"""
#include <stdio.h>
#define CALL(name, parameters, ...) int name parameters { __VA_ARGS__; return 0; }
CALL(cuCtxGetDevice, (int *device), *device = 0)
CALL(cuDeviceGetAttribute, (int *value, int attribute, int device),
     *value = attribute == 75 ? 9 : 0)  /* 75 and 76: compute capability 9.0 */
CALL(cuModuleLoadData, (void **module, void *image), *module = image)
CALL(cuModuleGetFunction, (void **fn, void *module, char *name), *fn = module)
CALL(cuModuleGetGlobal_v2, (void **at, size_t *size, void *module, char *name),
     return 500)  /* not found: there in kernels for several devices alone */
CALL(cuFuncSetAttribute, (void *fn, int attribute, int value),
     if (attribute == 8) printf("\ndynamic shared memory: %d bytes\n", value))
"""

# The stand-in comes first, so that the plugin finds a library of that name loaded.
_CHILD = """
import ctypes, os, sys
stand_in, plugin, module, *registrations = sys.argv[1:]
ctypes.CDLL(stand_in, mode=ctypes.RTLD_GLOBAL)
compile = ctypes.CDLL(plugin).MosaicGpuCompile
for offset in registrations:
    address = ctypes.cast(compile, ctypes.c_void_p).value + int(offset)
    ctypes.CFUNCTYPE(None)(address)()
compile.argtypes, compile.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
code = open(module, "rb").read()
compiled = compile(code, len(code))
ctypes.CDLL(None).fflush(None)
os._exit(0 if compiled else 1)  # without clean-up, which would call the driver
"""


class CompileError(RuntimeError):
    """A kernel does not compile."""


@dataclasses.dataclass(frozen=True)
class Tools:
    """What compiles, by path.

    Attributes:
      plugin: JAX's CUDA plugin, a shared library.
      gcc: for the stand-in.
      ptxas: NVIDIA's assembler.
      nvdisasm: its disassembler, or None.
    """

    plugin: pathlib.Path
    gcc: str
    ptxas: str
    nvdisasm: str | None

    @classmethod
    def find(cls) -> "Tools":
        """Looks on PATH, as the plugin does, then in this Python's packages.

        Raises:
          RuntimeError: if one is missing; says which, and how to get it.
        """
        jaxlib = importlib.metadata.version("jaxlib")
        plugin, path = _plugin(jaxlib), os.environ.get("PATH", "")
        if plugin:
            path += f":{plugin.parents[2]}/nvidia/cu13/bin"
        gcc, ptxas, nvdisasm = (
            shutil.which(name, path=path) for name in ("gcc", "ptxas", "nvdisasm")
        )
        if plugin and gcc and ptxas:
            return cls(plugin, gcc, ptxas, nvdisasm)
        pip = f'pip install "jax[cuda13]=={jaxlib}"'
        needed = {
            f"JAX's CUDA plugin, of version {jaxlib} as jaxlib is: {pip}": plugin,
            "gcc: from the system's package manager": gcc,
            f"ptxas on PATH: from a CUDA toolkit, or {pip}": ptxas,
        }
        missing = [f"\n- {name}" for name, found in needed.items() if not found]
        raise RuntimeError("compiling for a GPU needs" + "".join(missing))

    def ptxas_version(self) -> str:
        text = subprocess.check_output([self.ptxas, "--version"], text=True)
        return text.split("release ")[-1].splitlines()[0]


@dataclasses.dataclass(frozen=True)
class Report:
    """What one kernel takes.

    Attributes:
      registers: of a thread; the mean over its warpgroups where they differ.
      spill_bytes: stores and loads of a thread, as ptxas counts them in its code.
      stack_bytes: of a thread.
      shared_bytes: of a program; all of it but a byte is dynamic.
      threads: of a program.
      serialized: warnings that `wgmma` instructions wait for each other.
      hgmma: tensor core instructions; None without nvdisasm.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    serialized: int
    hgmma: int | None = None

    @property
    def programs_per_sm(self) -> int:
        """How many share a multiprocessor of Hopper; 0 if one does not fit.

        A warp takes registers by 256, and a quarter of them is for a quarter of the
        warps; a program takes shared memory by 128 bytes, and 1 KiB for the system.
        """
        warps = -(-self.threads // 32)
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // of_warp // 4 * 4 // warps
        by_shared = 228 * 1024 // (-(-self.shared_bytes // 128) * 128 + 1024)
        return min(by_registers, by_shared, 64 // warps, 32)


def kernel_modules(fn: Callable[..., Any], *operands: Any) -> list[bytes]:
    """The MLIR bytecode of each Mosaic GPU kernel of `jit(fn)`, in order.

    Args:
      fn: calls kernels by name.
      operands: arrays or `jax.ShapeDtypeStruct`s, or trees of them.
    """
    traced = jax.jit(fn).trace(*operands)
    lowered = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    found = []

    def visit(op):
        is_call = "call_target_name" in op.attributes
        if is_call and op.attributes["call_target_name"].value == "mosaic_gpu_v2":
            found.append(op.attributes["mhlo.backend_config"]["module"].value_bytes)
        return ir.WalkResult.ADVANCE

    with lowered.context:
        lowered.operation.walk(visit)
    return found


def compile_kernel(module: bytes, tools: Tools) -> Report:
    """Compiles one of the `kernel_modules`.

    Raises:
      CompileError: if it does not compile; with what the compiler printed.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("MOSAIC_GPU_DUMP")}
    env |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}  # to stdout
    env["PATH"] = f"{pathlib.Path(tools.ptxas).parent}:{env.get('PATH', '')}"
    if tools.nvdisasm:
        env["MOSAIC_GPU_DUMP_SASS"] = "1"
        env["MOSAIC_GPU_CUDA_ROOT"] = str(pathlib.Path(tools.nvdisasm).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        source, library, code = (pathlib.Path(folder, n) for n in ("c", "so", "module"))
        source.write_text(_STAND_IN)
        code.write_bytes(module)
        flags = "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c"
        subprocess.run([tools.gcc, *flags, source, "-o", library], check=True)
        operands = library, tools.plugin, code, *_registrations(tools.plugin)
        child = subprocess.run(
            [sys.executable, "-S", "-c", _CHILD, *map(str, operands)],
            env=env,
            capture_output=True,
            text=True,
        )
    if child.returncode:
        printed = child.stderr.strip() or "it printed nothing"
        raise CompileError(f"the compiler failed ({child.returncode}): {printed}")
    return parse(child.stdout, disassembled=tools.nvdisasm is not None)


def parse(text: str, *, disassembled: bool) -> Report:
    """Reads what the compiler printed.

    Args:
      text: PTX, the log of `ptxas -v`, the stand-in's line on shared memory, SASS.
      disassembled: whether SASS is there.

    Raises:
      CompileError: if PTX or the log is not.
    """
    registers = re.search(r"Used (\d+) registers", text)
    threads = re.search(r"\.(?:max|req)ntid (\d+), (\d+), (\d+)", text)
    functions = re.findall(r"(\d+) bytes stack frame, (\d+) .* (\d+) bytes spill", text)
    shared = re.findall(r"(\d+) bytes smem|dynamic shared memory: (\d+) bytes", text)
    if not (registers and threads and functions):
        raise CompileError("the compiler printed no PTX, or no log of `ptxas -v`")
    return Report(
        registers=int(registers[1]),
        spill_bytes=sum(int(n) for _, *spills in functions for n in spills),
        stack_bytes=sum(int(stack) for stack, *_ in functions),
        shared_bytes=sum(int(static or dynamic) for static, dynamic in shared),
        threads=math.prod(map(int, threads.groups())),
        serialized=len(re.findall(r"\(C75\d\d\).*serialized", text)),
        hgmma=len(re.findall(r"\bHGMMA\.", text)) if disassembled else None,
    )


def _plugin(jaxlib: str) -> pathlib.Path | None:
    """The plugin, if both of its packages are there and fit."""
    try:
        pjrt, kernels = (
            importlib.metadata.distribution(f"jax-cuda13-{part}")
            for part in ("pjrt", "plugin")
        )
    except importlib.metadata.PackageNotFoundError:
        return None
    if not pjrt.version == kernels.version == jaxlib:
        return None
    library = pjrt.locate_file("jax_plugins/xla_cuda13/xla_cuda_plugin.so")
    return pathlib.Path(str(library))


@functools.cache
def _registrations(plugin: pathlib.Path) -> tuple[int, ...]:
    """The functions that register LLVM's target, as offsets from `MosaicGpuCompile`.

    That of jax 0.10 asks for the target before it registers it; later ones do not mind
    if it is registered already.
    """
    symbols = subprocess.check_output(["nm", plugin], text=True)
    found = re.findall(r"^(\w+) \w (MosaicGpuC|LLVMInitializeNVPTX)\w+$", symbols, re.M)
    [start] = [int(at, 16) for at, name in found if name == "MosaicGpuC"]
    return tuple(int(at, 16) - start for at, name in found if name != "MosaicGpuC")

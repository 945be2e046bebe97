"""Do kernels for Hopper compile without spilling, and how many programs share an SM?

Every Mosaic GPU kernel of the library is compiled for sm_90a with its default tiles, at
the shapes it is meant for. A program is a block of threads, an SM a multiprocessor.
Needed are JAX's CUDA plugin, gcc and ptxas, but no GPU; one that is there is left
alone. `pip install nvidia-cuda-nvdisasm` adds the count of tensor core instructions
(HGMMA). The exit status is 1 if a kernel does not compile, spills registers or does not
fit on an SM. `--repeats` has no meaning here.
"""

import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks.parts import common, mosaic_compile

SIDE = 8192  # of the matrices of a product, and of the scores of attention
D_MODEL, D_FF, ACTIVE = 4096, 32768, 2624  # of a decode step, 8 % of its neurons active


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of operands, and what its kernels compute, in order."""

    operation: str
    kernels: tuple[str, ...]
    fn: Callable[..., Any]
    operands: tuple[Any, ...]


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def mask(block: int) -> sj.BlockMask:
    blocks = array(SIDE // block, SIDE // block, dtype=jnp.bool_)
    build = functools.partial(sj.BlockMask.from_blocks, block_shape=(block, block))
    return jax.eval_shape(build, blocks)


def decode_operands(batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    x, gate, w = array(batch, D_MODEL), array(batch, ACTIVE), array(D_FF, D_MODEL)
    indices, num_active = array(ACTIVE, dtype=jnp.int32), array(dtype=jnp.int32)
    return x, gate, indices, num_active, w, w


def gated_operands(batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    w = array(D_FF, D_MODEL)
    return array(batch, D_MODEL), array(batch, D_FF), w, w


def by_threshold(x, scores, up, down, threshold) -> jax.Array:
    """A Spark FFN but for its predictor and the statistics of that."""
    return sj.ops.gated_ffn(
        *(x, scores, up, down),
        threshold=threshold,
        activation=jax.nn.gelu,
        implementation="mosaic_gpu",
    )


def weights_operands(keys: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    scores = array(8, SIDE, 2, keys, dtype=jnp.float32)
    z = array(1, SIDE, 1, dtype=jnp.float32)
    return scores, z, array(1, SIDE, keys, dtype=jnp.bool_)


def attention_operands(head_dim: int) -> tuple[Any, ...]:
    q, k = (array(1, SIDE, heads, head_dim) for heads in (32, 8))
    return q, k, k, mask(128)


def listed_operands() -> tuple[Any, ...]:
    """One query a sequence, and a sixteenth of the pages of its cache."""
    q, k = array(1, 1, 32, 128), array(1, 65536, 8, 128)
    kept = array(1, 8, 512, dtype=jnp.bool_)
    build = functools.partial(sj.formats.KeyLists.from_mask, page_size=128, capacity=32)
    return q, k, k, jax.eval_shape(build, kept), array(dtype=jnp.int32)


def pages_operands() -> tuple[Any, ...]:
    """Bounds of 512 pages, as of a cache of 65536 tokens."""
    bound = array(1, 512, 8, 128)
    return array(1, 32, 128), bound, bound, array(1, dtype=jnp.int32)


def with_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The result, and the gradients of the first two operands."""

    def both(a, b, *others):
        out, pull = jax.vjp(lambda a, b: fn(a, b, *others), a, b)
        return out, pull(out)

    return both


def cases() -> list[Case]:
    """All kernels; a new one is one more entry."""
    topk = functools.partial(sj.ops.gaussian_topk, implementation="mosaic_gpu")
    ffn = functools.partial(sj.ops.active_ffn, implementation="mosaic_gpu")
    gated = functools.partial(sj.ops.gated_ffn, implementation="mosaic_gpu")
    matmul = functools.partial(sj.ops.block_matmul, implementation="mosaic_gpu")
    silu = functools.partial(matmul, activation=jax.nn.silu)
    attention = functools.partial(sj.ops.block_attention, implementation="mosaic_gpu")
    causal = functools.partial(attention, causal=True)
    listed = functools.partial(sj.ops.listed_attention, implementation="mosaic_gpu")
    pages = functools.partial(
        sj.ops.highest_pages,
        page_size=128,
        num_kept=32,
        implementation="mosaic_gpu",
    )
    weights = functools.partial(
        sj.ops.spark_weights, dtype=jnp.bfloat16, implementation="mosaic_gpu"
    )
    rows, scalar = array(SIDE, 16384), array(dtype=jnp.float32)
    square = array(SIDE, SIDE)
    dw = "dw, tiles that are cut", "dw"
    products = "y", "dx", *dw
    return [
        Case("gaussian_topk", ("forward",), topk, (rows, scalar)),
        Case(
            "gaussian_topk in training",
            ("forward", "backward"),
            with_gradients(topk),
            (rows, scalar),
        ),
        *(
            Case(
                f"gaussian_topk, gelu and up, {width}",
                ("forward", "backward"),
                with_gradients(functools.partial(topk, activation=jax.nn.gelu)),
                (array(SIDE, width), scalar, array(SIDE, width)),
            )
            for width in (6144, 16384)
        ),
        *(
            Case(
                f"spark_weights, {keys} keys",
                ("forward", "backward"),
                with_gradients(weights),
                weights_operands(keys),
            )
            for keys in (512, 1024, 4096, 8192)
        ),
        *(
            Case(
                f"active_ffn, batch {batch}",
                ("forward",),
                ffn,
                decode_operands(batch),
            )
            for batch in (1, 2, 4, 8, 16)
        ),
        *(
            Case(
                f"gated_ffn, batch {batch}",
                ("forward",),
                gated,
                gated_operands(batch),
            )
            for batch in (1, 2, 4, 8)
        ),
        *(
            Case(
                f"gated_ffn, threshold and gelu, batch {batch}",
                ("forward",),
                by_threshold,
                (*gated_operands(batch), array(batch, 1)),
            )
            for batch in (1, 2, 4, 8)
        ),
        *(
            Case(
                f"block_matmul, blocks of {block}",
                products,
                with_gradients(matmul),
                (square, square, mask(block)),
            )
            for block in (128, 64)
        ),
        Case(
            "block_matmul, kept blocks alone",
            products,
            with_gradients(
                lambda x, values, mask: matmul(x, sj.BlockSparse(values, mask))
            ),
            (square, array(400, 128, 128), mask(128)),
        ),
        Case(
            "block_matmul, 5 rows",
            ("y", "dx", "dw"),
            with_gradients(matmul),
            (array(5, SIDE), square, mask(128)),
        ),
        Case(
            "block_matmul, bias and silu",
            ("y",),
            lambda x, w, mask, bias: silu(x, w, mask, bias=bias),
            (square, square, mask(128), array(SIDE)),
        ),
        *(
            Case(
                f"block_attention, {name}heads of {head_dim}",
                ("forward", "dq", "dk and dv"),
                with_gradients(fn),
                attention_operands(head_dim),
            )
            for head_dim in (128, 64)
            for name, fn in (("", attention), ("causal, ", causal))
        ),
        Case("listed_attention", ("forward",), listed, listed_operands()),
        Case("highest_pages", ("lists",), pages, pages_operands()),
        Case(
            "attention_peaks",
            ("forward",),
            functools.partial(
                sj.ops.attention_peaks, block=64, implementation="mosaic_gpu"
            ),
            (array(1, SIDE, 16, 128), array(1, SIDE, 16, 128)),
        ),
        Case(
            "keep_highest",
            ("search",),
            functools.partial(
                sj.ops.keep_highest, num_kept=13, implementation="mosaic_gpu"
            ),
            (array(SIDE, 256, dtype=jnp.float32),),
        ),
    ]


def run(case: Case, tools: mosaic_compile.Tools) -> list[dict]:
    """Lowers a function and compiles its kernels; one row for each."""
    try:
        modules = mosaic_compile.kernel_modules(case.fn, *case.operands)
        assert len(modules) == len(case.kernels), (len(modules), case.kernels)
    except Exception:  # of any kind: lowering runs the kernel's own Python
        traceback.print_exc()
        return [row(case, kernel, None) for kernel in case.kernels]
    rows = []
    for kernel, module in zip(case.kernels, modules, strict=True):
        try:
            report = mosaic_compile.compile_kernel(module, tools)
        except mosaic_compile.CompileError as error:
            print(f"{case.operation}, {kernel}: {error}", file=sys.stderr)
            report = None
        rows.append(row(case, kernel, report))
    return rows


def row(case: Case, kernel: str, report: mosaic_compile.Report | None) -> dict:
    names = {"operation": case.operation, "kernel": kernel}
    if report is None:
        return names | {"ok": False}
    ok = report.programs_per_sm > 0 and not report.spill_bytes
    programs = {"programs_per_sm": report.programs_per_sm, "ok": ok}
    return names | dataclasses.asdict(report) | programs


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles all kernels; the exit status."""
    args = common.parse_args(__doc__, argv=argv)
    jax.config.update("jax_platforms", "cpu")  # a GPU would be taken, and not used
    try:
        tools = mosaic_compile.Tools.find()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    rows = []
    for case in cases()[:1] if args.quick else cases():
        print(f"{case.operation} ...", flush=True)
        rows += run(case, tools)
    bad = [f"{r['operation']}, {r['kernel']}" for r in rows if not r["ok"]]
    notes = [
        f"{len(rows) - len(bad)} of {len(rows)} kernels compile, fit and do not spill"
    ]
    notes += [f"not so: {name}" for name in bad]
    common.print_table(rows, notes)
    env = common.environment(target="sm_90a", ptxas=tools.ptxas_version())
    common.write_json(args.json, env, rows, notes)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""Do the kernels for TPU compile for each generation, at the shapes they are meant for?

The compiler is that of libtpu (`pip install "jax[tpu]"`); no TPU is needed, and one
that is there is left alone. It refuses what Mosaic does not take, and what does not fit
into the vector or scalar memory of a chip: the interpreter and `jax.export` do neither.
How fast a kernel is shows on a TPU alone. The exit status is 1 if one does not compile.
`--repeats` has no meaning here.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from benchmarks.compiled import SIDE, array, mask, with_gradients
from benchmarks.parts import common, tpu_compile

NAME = "pallas_tpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of operands, how many kernels it is, and how four chips share it."""

    operation: str
    case: str
    kernels: int
    fn: Callable[..., Any]
    operands: tuple[Any, ...]
    specs: tuple[P, ...] | None = None


def precisely(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Under the highest precision of products."""

    def run(*operands):
        with jax.default_matmul_precision("highest"):
            return fn(*operands)

    return run


def topk_cases() -> list[Case]:
    topk = functools.partial(sj.ops.gaussian_topk, implementation=NAME)
    glu = functools.partial(topk, activation=jax.nn.gelu)
    smooth = functools.partial(topk, activation=jax.nn.silu, huber_delta=0.1)
    scalar = array(dtype=jnp.float32)
    rows = {d: array(SIDE, d) for d in (128, 2048, 16384)}
    column = array(SIDE, 1, dtype=jnp.float32)
    exact = {d: array(SIDE, d, dtype=jnp.float32) for d in (128, 16384)}
    name = "gaussian_topk"
    return [
        Case(name, "forward", 1, topk, (rows[16384], scalar)),
        *(
            Case(name, f"gradients, {d}", 2, with_gradients(topk), (x, scalar))
            for d, x in rows.items()
        ),
        *(
            Case(
                name,
                f"gradients, smooth, a z for each row, float32, {d}",
                2,
                with_gradients(smooth),
                (x, column),
            )
            for d, x in exact.items()
        ),
        *(
            Case(
                name, f"gradients, gelu and up, {d}", 2, with_gradients(glu), (x, z, x)
            )
            for d, x, z in ((d, x, scalar) for d, x in rows.items())
        ),
        Case(
            name,
            "gradients, gelu and up, in shard_map",
            2,
            lambda x, up: with_gradients(lambda x, up: glu(x, 1.0, up))(x, up),
            (rows[2048], rows[2048]),
            (P("x"), P("x")),
        ),
    ]


def matmul_cases() -> list[Case]:
    matmul = functools.partial(sj.ops.block_matmul, implementation=NAME)
    silu = functools.partial(matmul, activation=jax.nn.silu)
    square, exact = array(SIDE, SIDE), array(SIDE, SIDE, dtype=jnp.float32)
    both = with_gradients(matmul)
    name = "block_matmul"
    return [
        *(
            Case(name, f"gradients, blocks of {n}", 3, both, (square, square, mask(n)))
            for n in (128, 512)
        ),
        *(
            Case(
                name,
                f"gradients, float32, blocks of {n}{how}",
                3,
                fn,
                (exact, exact, mask(n)),
            )
            for n in (128, 512)
            for how, fn in (("", both), (", highest", precisely(both)))
        ),
        Case(
            name,
            "gradients, highest, blocks of 128",
            3,
            precisely(both),
            (square, square, mask(128)),
        ),
        Case(
            name,
            "gradients, kept blocks alone",
            3,
            with_gradients(
                lambda x, values, mask: matmul(x, sj.BlockSparse(values, mask))
            ),
            (square, array(400, 128, 128), mask(128)),
        ),
        Case(name, "gradients, 5 rows", 3, both, (array(5, SIDE), square, mask(128))),
        Case(
            name,
            "bias and silu",
            1,
            lambda x, w, mask, bias: silu(x, w, mask, bias=bias),
            (square, square, mask(128), array(SIDE)),
        ),
        Case(
            name,
            "gradient of x, in shard_map",
            2,
            lambda x, w, mask: with_gradients(lambda x, _: matmul(x, w, mask))(x, x),
            (square, square, mask(128)),
            (P("x"), P(), P()),
        ),
    ]


def attention_cases() -> list[Case]:
    attention = functools.partial(sj.ops.block_attention, implementation=NAME)
    causal = functools.partial(attention, causal=True)
    name = "block_attention"

    def arrays(head_dim=128, dtype=jnp.bfloat16, block=128):
        q, k = (array(1, SIDE, heads, head_dim, dtype=dtype) for heads in (32, 8))
        return q, k, k, mask(block)

    def all_rules(q, k, v, mask, ids, bias):
        rules = dict(causal=True, window=999, prefix=50, segment_ids=ids, bias=bias)
        return with_gradients(functools.partial(attention, **rules))(q, k, v, mask)

    def long(batch, heads, capacity):
        """Lists of each key head, of 32768 tokens."""
        q, k = (array(batch, 32768, n, 128) for n in (32, 8))
        blocks = array(batch, heads, 256, 256, dtype=jnp.bool_)
        build = functools.partial(
            sj.BlockMask.from_blocks, block_shape=(128, 128), capacity=capacity
        )
        return q, k, k, jax.eval_shape(build, blocks)

    ids = array(1, SIDE, dtype=jnp.int32)
    bias = array(1, 32, SIDE // 128, SIDE // 128, dtype=jnp.float32)
    exact = arrays(dtype=jnp.float32, block=512)
    return [
        *(
            Case(
                name,
                f"gradients, {rule}heads of {head_dim}",
                3,
                with_gradients(fn),
                arrays(head_dim),
            )
            for head_dim in (64, 128, 256)
            for rule, fn in (("", attention), ("causal, ", causal))
        ),
        Case(name, "gradients, every rule", 3, all_rules, (*arrays(), ids, bias)),
        Case(
            name,
            "gradients, causal, blocks of 512",
            3,
            with_gradients(causal),
            arrays(block=512),
        ),
        Case(
            name,
            "gradients, causal, float32, blocks of 512",
            3,
            with_gradients(causal),
            exact,
        ),
        Case(
            name,
            "gradients, causal, float32, blocks of 512, highest",
            3,
            precisely(with_gradients(causal)),
            exact,
        ),
        Case(
            name,
            "gradients, causal, highest",
            3,
            precisely(with_gradients(causal)),
            arrays(),
        ),
        Case(
            name,
            "gradients, causal, 4 x 32768 tokens, a tenth of the blocks",
            3,
            with_gradients(causal),
            long(4, 8, 26),
        ),
        Case(
            name,
            "gradients, causal, 32768 tokens, all blocks of each key head",
            3,
            with_gradients(causal),
            long(1, 8, None),
        ),
        Case(
            name,
            "gradients, causal, in shard_map",
            3,
            lambda q, k: with_gradients(lambda q, k: causal(q, k, k))(q, k),
            (array(4, 2048, 8, 128), array(4, 2048, 2, 128)),
            (P("x"), P("x")),
        ),
    ]


def cases() -> list[Case]:
    """All kernels; a new one is one more entry."""
    return [*topk_cases(), *matmul_cases(), *attention_cases()]


def run(case: Case, generation: str) -> dict[str, Any]:
    report = tpu_compile.compile_for(generation, case.fn, case.operands, case.specs)
    row = {"operation": case.operation, "case": case.case, "generation": generation}
    if report.ok and report.kernels != case.kernels:
        error = f"{report.kernels} kernels, not {case.kernels}"
        report = dataclasses.replace(report, ok=False, error=error)
    return row | dataclasses.asdict(report)


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles all kernels for all generations; the exit status."""
    args = common.parse_args(__doc__, argv=argv)
    jax.config.update("jax_platforms", "cpu")  # a TPU would be taken, and not used
    try:
        libtpu = tpu_compile.find_libtpu()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    chosen, generations = cases(), list(tpu_compile.TOPOLOGIES)
    if args.quick:
        chosen, generations = chosen[:1], ["v5e"]
    rows = []
    for case in chosen:
        print(f"{case.operation}, {case.case} ...", flush=True)
        rows += [run(case, generation) for generation in generations]
    bad = [row for row in rows if not row["ok"]]
    notes = [f"{len(rows) - len(bad)} of {len(rows)} programs compile"]
    names = "operation", "case", "generation"
    notes += [f"not so: {', '.join(row[name] for name in names)}" for row in bad]
    common.print_table(rows, notes)
    env = common.environment(target=generations, libtpu=libtpu)
    common.write_json(args.json, env, rows, notes)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""What does the statistical top-k cost, against a ReLU and against an exact top-k?

A ReLU reads each activation once and writes it once, which is the least that any
selector can do. Timed: the fused kernel with several ways to cut the work, the same
operator in plain XLA, `lax.top_k` and `lax.approx_max_k` (the k values alone, no mask),
and forward with backward where there is one. Results are checked before they are timed.
The gated cases do the same for what a Spark FFN does between its products,
`gelu(statistical_topk(x)) * up`, against `gelu(relu(x)) * up`, and time it with the
top-k alone in a kernel too.

Bytes a second count two arrays forward, and five forward and backward: x and the
result, then x and both gradients; with `up` three, and eight. A ReLU moves four, or
six, since one pass can do both.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks.parts import common, timing


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of pre-activations and how many of each survive."""

    rows: int
    width: int
    k: int
    dtype: str = "bfloat16"
    gated: bool = False


CASES = [
    Case(8192, 6144, 492, gated=True),  # 8%
    Case(8192, 16384, 1311, gated=True),
    Case(8192, 16384, 1311),
    Case(8192, 13824, 1106),
]
QUICK = [
    Case(64, 1024, 82),
    Case(64, 1024, 82, "float32"),
    Case(64, 1024, 82, gated=True),
]
# (slots, blocks on a multiprocessor, chunk) of the kernel for Hopper
TILES = [
    *((3, blocks, 4096) for blocks in (1, 2)),
    *((slots, 3, 4096) for slots in (1, 2)),
    *((2, 3, chunk) for chunk in (1024, 16384)),
    (1, 6, 4096),
]
GATED_TILES = [
    *((2, blocks, 2048) for blocks in (2, 3, 4)),
    *((1, blocks, 2048) for blocks in (3, 4, 5)),
    *((slots, blocks, 1024) for slots, blocks in ((2, 2), (1, 4), (1, 5))),
]


def gelu_product(x: jax.Array, *up: jax.Array) -> jax.Array:
    """`gelu(x) * up`, rounded once; `x` itself without `up`."""
    if not up:
        return x
    wide = jax.nn.gelu(x.astype(jnp.float32)) * up[0].astype(jnp.float32)
    return wide.astype(x.dtype)


def kernels(case: Case) -> Iterator[tuple[str, Callable]]:
    """The kernel as it is called, and on a GPU with other tiles."""
    name = common.KERNELS.get(jax.default_backend())
    if name is None:
        return
    options = {"k": case.k, "implementation": name}
    topk = functools.partial(sj.statistical_topk, **options)
    if case.gated:
        yield "kernel", functools.partial(sj.statistical_glu, **options)
        yield "kernel, then XLA", lambda x, up: gelu_product(topk(x), up)
    else:
        yield "kernel", topk
    if name != "mosaic_gpu":
        return
    from sparsejax.ops.gaussian_topk import _mosaic_gpu

    z = -statistics.NormalDist().inv_cdf(case.k / case.width)
    activation = jax.nn.gelu if case.gated else None

    def tiled(x, *up, tiles):
        return _mosaic_gpu.gaussian_topk(
            x, z, *up, activation=activation, tiles=tiles, grad_tiles=tiles
        )

    for slots, blocks, chunk in GATED_TILES if case.gated else TILES:
        fn = functools.partial(tiled, tiles=_mosaic_gpu.Tiles(slots, blocks, chunk))
        yield f"kernel, {slots} slots, {blocks} blocks, chunk {chunk}", fn


def with_backward(fn: Callable) -> Callable:
    """The value, and the gradients for a given gradient of the output."""

    @jax.jit
    def both(grad, *operands):
        out, pull = jax.vjp(fn, *operands)
        return out, pull(grad)

    return both


def run(case: Case, repeats: int) -> list[dict]:
    """Checks, then times every operator; one row for each."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (case.rows, case.width)
    x, grad, up = (jax.random.normal(key, shape).astype(case.dtype) for key in keys)
    operands = (x, up) if case.gated else (x,)
    array_bytes = x.size * x.dtype.itemsize

    reference = functools.partial(
        sj.statistical_glu if case.gated else sj.statistical_topk,
        k=case.k,
        implementation="reference",
    )
    want = jax.jit(reference)(*operands)
    want_grads = with_backward(reference)(grad, *operands)[1]
    kept_percent = 100 * float(jnp.mean(want != 0))
    assert abs(kept_percent - 100 * case.k / case.width) < 0.5, kept_percent

    differentiable = {
        "relu": lambda x, *up: gelu_product(jax.nn.relu(x), *up),
        "plain XLA": reference,
        **dict(kernels(case)),
    }
    forward_only = {}
    if not case.gated:
        forward_only = {
            "lax.top_k": lambda x: jax.lax.top_k(x, case.k)[0],
            "lax.approx_max_k": lambda x: jax.lax.approx_max_k(x, case.k)[0],
        }
        exact = jax.jit(forward_only["lax.top_k"])(x)
        assert bool(jnp.all(exact[:, 0] == x.max(-1)))

    def works(name: str, fn: Callable, *operands: jax.Array) -> bool:
        try:
            jax.block_until_ready(fn(*operands))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if " slots, " not in name:
                raise
            # the tiles may not fit into shared memory
            print(f"{name}: left out: {str(error).splitlines()[0][:100]}", flush=True)
            return False
        return True

    forward, both, found = {}, {}, {}
    for name, fn in (differentiable | forward_only).items():
        only, pair = jax.jit(fn), with_backward(fn)
        if not works(name, only, *operands):
            continue
        forward[name] = functools.partial(only, *operands)
        found[name] = {}
        if name.startswith("kernel"):
            found[name]["error"] = common.relative_error(only(*operands), want)
        if name in differentiable and works(name, pair, grad, *operands):
            both[name] = functools.partial(pair, grad, *operands)
            if name.startswith("kernel"):
                found[name]["grad_error"] = max(
                    map(common.relative_error, pair(grad, *operands)[1], want_grads)
                )
        assert max(found[name].values(), default=0) < 0.02, (name, found[name])

    least = 3 if case.gated else 2  # arrays of a forward

    def columns(which: str, fns: dict[str, Callable]) -> None:
        times = timing.time_in_turn(fns, repeats=repeats)
        for name, time in times.items():
            arrays = 2 * least if name == "relu" else 3 * least - 1
            arrays = least if which == "forward" else arrays
            found[name] |= {
                f"{which}_ms": time.ms,
                f"{which}_iqr_ms": time.iqr_ms,
                f"{which}_gb_per_s": arrays * array_bytes / time.ms / 1e6,
                f"{which}_times_relu": time.ms / times["relu"].ms,
            }

    columns("forward", forward)
    columns("both", both)
    return [
        dataclasses.asdict(case)
        | {"operator": name, "kept_percent": kept_percent}
        | of_name
        for name, of_name in found.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, argv=argv)
    cases = QUICK if args.quick else CASES
    rows = (row for case in cases for row in run(case, args.repeats))
    common.report(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

"""At which density does block-sparse attention beat cuDNN and FlexAttention?

Forward, and forward with backward, under random blocks of 128 for each head, against
dense attention by cuDNN (through `jax.nn.dot_product_attention`) and, where torch is
there, FlexAttention with the same blocks and FlashAttention. TFLOP/s count the products
of kept blocks, two forward and five backward (ours executes seven). What the mask costs
is in `keep_highest`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

# torch needs room on the same device
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from benchmarks.parts import common, timing

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention; masks of one shape share what is compiled."""

    seq: int
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    causal: bool = False
    dtype: str = "bfloat16"


CASES = [
    (Shape(32768), (1.0, 0.5, 0.25, 0.1, 0.05)),
    (Shape(32768, causal=True), (0.25, 0.1)),
    (Shape(8192), (0.5, 0.1)),
    (Shape(32768, kv_heads=4), (0.1,)),
    (Shape(32768, heads=32, kv_heads=32, head_dim=64), (0.1,)),
    (Shape(131072, heads=4, kv_heads=4), (0.05,)),
]
QUICK = [(Shape(256, 2, 1, 16, dtype="float32"), (1.0, 0.5))]


def operands(shape: Shape) -> list[jax.Array]:
    """q, k, v and the gradient of the outputs."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return [
        jax.random.normal(key, (1, shape.seq, n, shape.head_dim)).astype(shape.dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


def make_kept(shape: Shape, density: float) -> np.ndarray:
    """Random blocks of each key head; the first of each row always."""
    blocks = shape.seq // BLOCK
    rng = np.random.default_rng(0)
    kept = rng.random((1, shape.kv_heads, blocks, blocks)) < density
    kept[..., 0] = True
    return kept


def pair(fn: Callable) -> dict[str, Callable]:
    """Jitted: the outputs; and the gradients for a given gradient of the outputs."""

    def backward(q, k, v, do, *rest):
        out, vjp = jax.vjp(lambda q, k, v: fn(q, k, v, *rest), q, k, v)
        return out, vjp(do)

    return {
        "forward": jax.jit(lambda q, k, v, do, *rest: fn(q, k, v, *rest)),
        "both": jax.jit(backward),
    }


def torch_forms(shape: Shape, kept: np.ndarray) -> dict[str, dict[str, Callable]]:
    """FlexAttention with these blocks, and FlashAttention; none without torch's GPU."""
    if jax.default_backend() != "gpu":
        return {}
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention import flex_attention as flex
    except ImportError:
        return {}
    make = functools.partial(
        torch.randn, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    q = make(1, shape.heads, shape.seq, shape.head_dim)
    k, v = (make(1, shape.kv_heads, shape.seq, shape.head_dim) for _ in range(2))
    do = torch.randn_like(q)
    of_heads = np.repeat(kept, shape.heads // shape.kv_heads, axis=1)
    if shape.causal:
        of_heads &= np.tri(of_heads.shape[-1], dtype=bool)
    num = torch.tensor(of_heads.sum(-1), dtype=torch.int32, device="cuda")
    order = np.argsort(~of_heads, axis=-1, kind="stable")
    indices = torch.tensor(order, dtype=torch.int32, device="cuda")

    def causal(b, h, i, j):
        return i >= j

    mask = flex.BlockMask.from_kv_blocks(
        num,
        indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=causal if shape.causal else flex.noop_mask,
    )
    torch.compiler.reset()  # it gives up compiling after a few shapes
    attend = torch.compile(flex.flex_attention)
    gqa = {"enable_gqa": shape.heads != shape.kv_heads}

    def flash(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=shape.causal, **gqa
            )

    def forms(call):
        def forward():
            with torch.no_grad():
                call(q, k, v)
            torch.cuda.synchronize()

        def both():
            torch.autograd.grad(call(q, k, v), (q, k, v), do)
            torch.cuda.synchronize()

        return {"forward": forward, "both": both}

    return {
        "flex": forms(lambda q, k, v: attend(q, k, v, block_mask=mask, **gqa)),
        "flash 2": forms(flash),
    }


def run_shape(
    shape: Shape, densities: tuple[float, ...], repeats: int
) -> Iterator[dict]:
    """Checks, then times each density; one row for each and each direction."""
    *qkv, do = operands(shape)
    block = (BLOCK, BLOCK)
    options = {"causal": shape.causal}
    kernel = common.KERNELS.get(jax.default_backend())
    ours = pair(
        lambda q, k, v, mask: sj.ops.block_attention(
            q, k, v, mask, implementation=kernel, **options
        )
    )
    library = "cudnn" if kernel == "mosaic_gpu" else None
    dense = pair(
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=shape.causal, implementation=library
        )
    )
    for density in densities:
        kept = make_kept(shape, density)
        mask = sj.BlockMask.from_blocks(jnp.asarray(kept), block)
        error = check(shape, ours, qkv, do, mask, options)
        seen = kept & np.tri(kept.shape[-1], dtype=bool) if shape.causal else kept
        pairs = seen.mean() * shape.seq**2 * shape.heads
        fns = {}
        for which in ("forward", "both"):
            fns[f"ours {which}"] = functools.partial(ours[which], *qkv, do, mask)
            fns[f"dense {which}"] = functools.partial(dense[which], *qkv, do)
        for name, forms in torch_forms(shape, kept).items():
            for which, fn in forms.items():
                try:
                    fn()
                except RuntimeError as problem:  # out of memory, or no such kernel
                    print(f"{name} {which}: left out: {str(problem)[:100]}")
                    continue
                fns[f"{name} {which}"] = fn
        times = timing.time_in_turn(fns, repeats=repeats)
        for which, products in (("forward", 2), ("both", 7)):
            flops = products * 2 * shape.head_dim * pairs
            row = dataclasses.asdict(shape) | {"density": density, "which": which}
            row |= {
                "ms": times[f"ours {which}"].ms,
                "iqr_ms": times[f"ours {which}"].iqr_ms,
                "tflops": flops / times[f"ours {which}"].ms / 1e9,
                "error": error,
            }
            for name in ("dense", "flex", "flash 2"):
                if f"{name} {which}" in times:
                    ms = times[f"{name} {which}"].ms
                    column = name.replace(" ", "_")
                    row[f"{column}_ms"] = ms
                    row[f"times_{column}"] = ms / row["ms"]
            yield row


def check(shape: Shape, ours, qkv, do, mask, options) -> float:
    """The largest relative error of outputs and gradients on the first 2048 tokens.

    The reference keeps all scores; of a long sequence it sees the head alone.
    """
    seq = min(shape.seq, 2048)
    blocks = seq // BLOCK
    kept = mask.to_blocks()[..., :blocks, :blocks]
    short = sj.BlockMask.from_blocks(kept, mask.block_shape)
    *qkv, do = (a[:, :seq] for a in (*qkv, do))
    reference = pair(
        lambda q, k, v, mask: sj.ops.block_attention(
            q, k, v, mask, implementation="reference", **options
        )
    )["both"]
    wide = [a.astype(jnp.float32) for a in (*qkv, do)]
    with jax.default_matmul_precision("highest"):
        want = jax.tree.leaves(reference(*wide, short))
    got = jax.tree.leaves(ours["both"](*qkv, do, short))
    error = max(map(common.relative_error, got, want))
    assert error < 0.02, (shape, error)
    return error


def main(argv: list[str] | None = None) -> None:
    """Runs all cases."""
    args = common.parse_args(__doc__, repeats=9, argv=argv)
    cases = QUICK if args.quick else CASES
    rows = (row for case in cases for row in run_shape(*case, repeats=args.repeats))
    common.report(args.json, common.environment(repeats=args.repeats), rows)


if __name__ == "__main__":
    main()

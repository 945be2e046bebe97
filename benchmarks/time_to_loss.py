"""Do block-sparse FFNs reach a dense decoder's loss in less time of training?

A decoder with 111M weights in its blocks, nine tenths of them in gated FFNs of 8
d_model neurons, as in Gemma 7B, learns the bytes of real text from nothing, on one
device, bfloat16 over float32 weights. FFNs are `sj.nn.BlockSparseFFN` with blocks of
128, whose kernels read the masks of the optimizer; attention is dense. All arms have
Adam, equal batches, clipping, schedule and grid of rates, and equal seconds:

- dense, and dense with a quarter of the neurons: as many FLOPs and kept weights as at
  75 %, without any sparsity, a control.
- static random blocks, 75 %.
- RigL by blocks, 50, 75 and 87.5 %: masks change every 50 steps, dense gradients then
  and only then; 50 % of twice the neurons, the FLOPs of the dense model; and 75 % with
  400 steps between masks, in which new blocks, that begin at 0, may grow.
- gradual magnitude pruning to 50 and 75 % in the first half of the time, dense before.

Kernels of static and RigL begin divided by the root of what is kept, so that outputs
have the variance of dense ones; those of gradual pruning as dense ones.

    python -m benchmarks.time_to_loss --minutes 9 --json PATH  # again, until all done
    python -m benchmarks.time_to_loss --seconds 480 --repeats 1 --minutes 9 \
        --as-in PATH --json LONGER  # the best of them for eight minutes each

Finished runs are read back from the JSON file, of the same GPU alone; a picture is
written beside it if matplotlib is installed. JAX_COMPILATION_CACHE_DIR, a folder, saves
the next call the compiling.

A step has 16 x 1024 bytes: 11 TFLOP dense and 3.6 at 75 %, on an H200 23 and 14 ms. 30
runs of 10 s to tune, 10 of 60 s, 6 more for two seeds of dense, control and best, and
3 of 48 s of the best: 29 minutes with compiling and judging. 10 GB of memory.

Papers: https://arxiv.org/abs/1911.11134 (RigL), https://arxiv.org/abs/1710.01878
(gradual), https://arxiv.org/abs/2303.11525 (wider at equal FLOPs).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import sparsejax as sj
from benchmarks import block_training
from benchmarks.parts import lm_methods, lm_race, lm_text, spark_models
from benchmarks.parts.lm_race import Arm, Losses, Sizes
from benchmarks.parts.lm_study import Method, Plan
from benchmarks.parts.scanned_decoder import ScannedDecoder, stacked_axes
from benchmarks.parts.spark_models import Size
from sparsejax.typing import KeyPath, plain_path

KERNELS = ("gate", "up", "down")
NEVER = 10**9  # steps: RigL's masks come to rest by its drop fraction

FULL = Sizes(
    16,
    1024,
    num_judged=512,
    steps_per_call=10,
    seconds=60.0,
    tuning_seconds=10.0,
    learning_rates=(2.5e-4, 5e-4, 1e-3),
)
QUICK = Sizes(
    2,
    16,
    num_judged=4,
    steps_per_call=2,
    seconds=0.05,
    tuning_seconds=0.01,
    learning_rates=(1e-3,),
)


@dataclasses.dataclass(frozen=True)
class Sparse:
    """How the FFNs of an arm are sparse."""

    kind: str  # static, rigl, gradual
    sparsity: float
    block: int = 128
    update_every: int = 50  # steps between masks

    @property
    def rule(self) -> dict[str, Any]:
        return {
            "pattern": sj.Block((self.block, self.block)),
            "stacked": stacked_axes,
            "where": is_ffn_kernel,
        }


def is_ffn_kernel(path: KeyPath, leaf: Any) -> bool:
    del leaf
    return plain_path(path)[-2] in KERNELS


def arms(size: Size, **options: int) -> dict[str, Arm]:
    """All of them; `options` are those of `Sparse`."""
    dense = spark_models.dense(size, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    dense = dataclasses.replace(dense, d_ff=8 * size.d_model)
    narrow = dataclasses.replace(dense, d_ff=dense.d_ff // 4)
    kernel: Any = block_training.implementation()

    def sparse(kind: str, sparsity: float, width: int = 1, **own: int) -> Arm:
        how = Sparse(kind, sparsity, **{**options, **own})
        ffn = functools.partial(
            sj.nn.BlockSparseFFN,
            block_shape=(how.block, how.block),
            implementation=kernel,
        )
        config = dataclasses.replace(dense, d_ff=width * dense.d_ff, ffn=ffn)
        make = functools.partial(by_blocks, how)
        return Arm(config, make, functools.partial(kept_blocks, how))

    return {
        "dense": Arm(dense, lm_race.plain, is_sparse=False),
        "dense, d_ff / 4": Arm(narrow, lm_race.plain, is_sparse=False),
        "static 75 %": sparse("static", 0.75),
        "rigl 50 %": sparse("rigl", 0.5),
        "rigl 75 %": sparse("rigl", 0.75),
        "rigl 87.5 %": sparse("rigl", 0.875),
        "rigl 50 %, 2 x d_ff": sparse("rigl", 0.5, width=2),
        "rigl 75 %, every 400 steps": sparse("rigl", 0.75, update_every=400),
        "gradual 50 %": sparse("gradual", 0.5),
        "gradual 75 %": sparse("gradual", 0.75),
    }


def by_blocks(
    how: Sparse, decoder: ScannedDecoder, losses: Losses, plan: Plan
) -> Method:
    """Adam inside of a method whose masks the FFNs' kernels read."""
    inner = lm_methods.adam(plan)

    def progress(step):
        return step / plan.num_steps

    if how.kind == "static":
        tx = sj.static_sparse(inner, how.sparsity, key=plan.key, **how.rule)
    elif how.kind == "rigl":

        def drop_fraction(step):  # a cosine over the first three quarters
            done = jnp.minimum(progress(step) / 0.75, 1)
            return 0.15 * (1 + jnp.cos(jnp.pi * done))

        tx = sj.rigl(
            inner,
            how.sparsity,
            update_every=how.update_every,
            stop_step=NEVER,
            drop_fraction=drop_fraction,
            key=plan.key,
            **how.rule,
        )
    else:
        ramp = sj.schedules.cubic(how.sparsity, begin=0, end=1)
        tx = sj.magnitude_prune(
            inner,
            lambda step: ramp(2 * progress(step)),
            update_every=how.update_every,
            **how.rule,
        )

    def start(weights):
        if how.kind == "gradual":
            return weights
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf * (1 - how.sparsity) ** -0.5 if is_ffn_kernel(path, leaf) else leaf
            ),
            weights,
        )

    def with_masks(weights, opt_state):
        return weights | {"masks": decoder.block_masks(weights, opt_state)}

    return Method(
        lm_methods.clipped(tx),
        losses(),
        start=start,
        forward=lambda opt_state, params: with_masks(params, opt_state),
        finish=lambda opt_state, params: with_masks(
            sj.sparse_params(opt_state, params), opt_state
        ),
    )


def kept_blocks(how: Sparse, decoder: ScannedDecoder) -> lm_race.Tell:
    """The sparsity of the kernels, which must be that of every layer of each.

    It raises an AssertionError if it is not, or if a weight outside of the kept blocks
    is not 0.
    """
    del decoder

    def tell(weights, batch):
        del batch
        for name in KERNELS:
            kernel = weights["blocks"]["ffn"][name]["kernel"][...]
            mask = weights["masks"]["ffn"][name]["block_mask"].get_value()
            kept = mask.to_blocks()
            *_, rows, columns = kept.shape
            used = sj.BlockMask.from_dense(kernel != 0, mask.block_shape)
            outside = int(jnp.sum(used.to_blocks() & ~kept))
            wanted = rows * columns - round(how.sparsity * rows * columns)
            counts = set(jnp.sum(kept, axis=(1, 2)).tolist())
            if outside or counts != {wanted}:
                raise AssertionError(
                    f"`{name}` must keep {wanted} blocks in each layer and be 0 "
                    f"outside; got {counts}, and {outside} blocks outside that are not "
                    "0"
                )
        return {"sparsity": how.sparsity}

    return tell


def full_arms() -> dict[str, Arm]:
    return arms(Size(1024, 4, 16, 4, 64, lm_text.VOCAB_SIZE))


def quick_arms() -> dict[str, Arm]:
    tiny = arms(Size(16, 2, 2, 1, 8, lm_text.VOCAB_SIZE), block=8, update_every=2)
    return {name: tiny[name] for name in ("dense", "rigl 75 %")}


def main(argv: Sequence[str] | None = None) -> None:
    lm_race.main(
        __doc__,
        argv,
        full=(full_arms, FULL),
        quick=(quick_arms, QUICK),
        columns=("sparsity",),
        title="Block-sparse FFNs: loss over time",
    )


if __name__ == "__main__":
    main()

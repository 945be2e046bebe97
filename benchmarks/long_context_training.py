"""Does block-sparse attention reach a dense decoder's loss in less time at 32k bytes?

A decoder of 8 layers learns the bytes of real text from nothing, one sequence of 32768
a step, on one device, bfloat16 over float32 weights: d_model 512, 4 heads of 128, gated
FFNs of 2048. Four fifths of its FLOPs are attention, by cuDNN where it is dense. Else
128 queries attend to blocks of 128 keys by `sj.ops.block_attention`, in training and
when it is judged, and may choose afresh in each step:

- the last blocks, 10 % of the pairs in sight: a window without a choice, a control.
- block statistical top-k, about 25 and 10 %: `sj.attention.statistical_topk_blocks`.
- SeerAttention, 25 and 10 %: a gate, distilled in every fourth step from the peaks of
  the layer's own attention over all blocks, which is part of the time.

All arms have Adam, equal batches, clipping, schedule and grid of rates, and equal
seconds. `density` is the share of the pairs in sight that is attended, at the end.

    python -m benchmarks.long_context_training --minutes 9 --json PATH  # until all done
    python -m benchmarks.long_context_training --seconds 480 --repeats 1 --minutes 9 \
        --as-in PATH --json LONGER  # the best of them for eight minutes each

Finished runs are read back from the JSON file, of the same GPU alone; a picture is
written beside it if matplotlib is installed. JAX_COMPILATION_CACHE_DIR, a folder, saves
the next call the compiling.

A dense step is 37 TFLOP; at 10 %, 10. On an H200 it takes 75 and 26 ms: 800 and 2300
steps in the 60 s of a run. 18 runs of 20 s to tune, 6 of 60 s, 6 more for two seeds of
dense, window and best, and 3 of 48 s of the best: 25 minutes with compiling and
judging. 10 GB of memory.

Papers: https://arxiv.org/abs/2506.06644 (statistical top-k of single keys),
https://arxiv.org/abs/2410.13276 (SeerAttention; not shown from scratch there).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from benchmarks.parts import lm_methods, lm_race, lm_text, spark_models
from benchmarks.parts.lm_race import Arm, Losses, Sizes
from benchmarks.parts.lm_study import Method, Plan
from benchmarks.parts.scanned_decoder import ScannedDecoder
from benchmarks.parts.spark_models import Size
from sparsejax import attention, nn
from sparsejax.typing import plain_path

DISTIL_EVERY = 4  # steps
GATES = ("gate_key", "gate_query")

FULL = Sizes(
    1,
    32768,
    num_judged=16,
    steps_per_call=10,
    seconds=60.0,
    tuning_seconds=20.0,  # in 10 a dense model takes 130 steps, which is no guide
    learning_rates=(2e-4, 4e-4, 8e-4),
)
QUICK = Sizes(
    1,
    128,
    num_judged=2,
    steps_per_call=2,
    seconds=0.05,
    tuning_seconds=0.01,
    learning_rates=(1e-3,),
)


def arms(size: Size, seq_len: int, block: int) -> dict[str, Arm]:
    numerics: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    dense = spark_models.dense(size, rope_base=1e6, **numerics)  # for long contexts

    def arm(kind: Any, make: Any = lm_race.plain, **options: Any) -> Arm:
        config = dataclasses.replace(dense, attention=kind)
        return Arm(config, make, density, **options)

    def by_blocks(select: Any, **options: Any) -> Arm:
        return arm(functools.partial(nn.BlockAttention, select=select), **options)

    few, more = (
        attention.blocks_for_density(share, seq_len // block) for share in (0.1, 0.25)
    )

    def statistical(num_kept: int) -> Arm:
        return by_blocks(
            functools.partial(
                attention.statistical_topk_blocks,
                k=num_kept,
                block_shape=(block, block),
            )
        )

    def seer(num_kept: int) -> Arm:
        select = functools.partial(
            attention.seer_topk, num_kept=num_kept, dense_last_rows=0
        )
        kind = functools.partial(nn.SeerAttention, block=block, select=select)
        return arm(kind, with_gates)

    window = functools.partial(last_blocks, num_kept=few, block=block)
    return {
        "dense": arm(dense.attention, is_sparse=False),
        "window 10 %": by_blocks(window, is_sparse=False),
        "statistical top-k 25 %": statistical(more),
        "statistical top-k 10 %": statistical(few),
        "seer 25 %": seer(more),
        "seer 10 %": seer(few),
    }


def last_blocks(
    query: jax.Array, key: jax.Array, *, causal: bool, num_kept: int, block: int
) -> sj.BlockMask:
    """The block of the queries and those before it; of every head."""
    assert causal and query.shape[1] == key.shape[1]
    index = jnp.arange(query.shape[1] // block)
    behind = index[:, None] - index
    kept = (behind >= 0) & (behind < num_kept)
    return sj.BlockMask.from_blocks(kept[None, None], (block, block), capacity=num_kept)


def with_gates(decoder: ScannedDecoder, losses: Losses, plan: Plan) -> Method:
    """Adam; in some steps the gates, and they alone, learn from the attention."""
    method = lm_methods.plain(losses, plan)

    def gate_loss(weights, batch):
        weights = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf if plain_path(path)[-1] in GATES else jax.lax.stop_gradient(leaf)
            ),
            weights,
        )
        return jnp.sum(decoder.hidden_and_gate_losses(weights, batch[:, :-1])[1])

    def loss(weights, batch, teacher=None):
        is_due, weights = weights["is_due"], weights["weights"]
        no_loss = lambda weights, batch: jnp.zeros([])  # noqa: E731
        of_gates = jax.lax.cond(is_due, gate_loss, no_loss, weights, batch)
        return method.loss(weights, batch, teacher) + of_gates

    def forward(opt_state, params):
        [(_, step), *_] = optax.tree.get_all_with_path(opt_state, "count")
        return {"weights": params, "is_due": step % DISTIL_EVERY == 0}

    return dataclasses.replace(method, loss=loss, forward=forward)


def density(decoder: ScannedDecoder) -> lm_race.Tell:
    """The share of the pairs in sight that are attended, a mean over all layers."""

    @jax.jit
    def of_pairs(weights, batch):
        _, shares = decoder.hidden(weights, batch[:, :-1], with_density=True)
        in_sight = 1.0 + jnp.arange(batch.shape[1] - 1)
        return jnp.mean(shares["attention"] @ in_sight) / jnp.sum(in_sight)

    return lambda weights, batch: {"density": float(of_pairs(weights, batch))}


def full_arms() -> dict[str, Arm]:
    size = Size(512, 8, 4, 4, 128, lm_text.VOCAB_SIZE)
    return arms(size, FULL.seq_len, 128)


def quick_arms() -> dict[str, Arm]:
    tiny = arms(Size(16, 2, 2, 2, 8, lm_text.VOCAB_SIZE), QUICK.seq_len, 16)
    return {name: tiny[name] for name in ("dense", "seer 25 %")}


def main(argv: Sequence[str] | None = None) -> None:
    lm_race.main(
        __doc__,
        argv,
        full=(full_arms, FULL),
        quick=(quick_arms, QUICK),
        columns=("density",),
        title="Attention to blocks, 32768 bytes a sequence: loss over time",
    )


if __name__ == "__main__":
    main()

"""How much faster is a training step on long sequences with block-sparse attention?

Decoders of `spark_models`, their FFNs dense, bfloat16 compute over float32 weights,
AdamW, random tokens, as many in a step at each length. Attention is dense and causal,
by cuDNN on a GPU, or each 128 queries choose blocks of 128 keys by
`sj.attention.topk_blocks` in each layer and step, forward and backward by
`sj.ops.block_attention`. Kept is a share of the pairs in sight, rounded down to blocks.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.parts import common, spark_models, timing
from benchmarks.parts.decoder_training import Training, compiled, random_tokens
from benchmarks.parts.spark_models import Size
from sparsejax import attention, models, nn


@dataclasses.dataclass(frozen=True)
class Case:
    """The decoder, the tokens of a step, and how long their sequences are."""

    size: Size
    tokens: int
    lengths: tuple[int, ...]
    block: int
    kept: tuple[float, ...] = (0.25, 0.1)


CASE = Case(Size(1024, 4, 8, 8, 128, 32000), 32768, (32768, 16384, 8192), block=128)
QUICK = Case(Size(32, 1, 2, 1, 16, 64), 64, (32,), block=8, kept=(0.5,))


def configs(case: Case, length: int) -> dict[str, models.DecoderConfig]:
    dense = spark_models.dense(case.size, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    found = {"dense": dense}
    for kept in case.kept:
        num_kept = attention.blocks_for_density(kept, length // case.block)
        select = functools.partial(
            attention.topk_blocks,
            num_kept=num_kept,
            block_shape=(case.block, case.block),
            per_head=True,
        )
        kind = functools.partial(nn.BlockAttention, select=select)
        found[f"blocks, {100 * kept:g} %"] = dataclasses.replace(dense, attention=kind)
    return found


def run(case: Case, length: int, repeats: int) -> Iterator[dict[str, Any]]:
    """All models of one length, each in turn with the dense one."""
    batch = case.tokens // length
    tokens = random_tokens(batch, length, case.size.vocab_size)
    make = functools.partial(Training, tokens=tokens, tx=optax.adamw(1e-4))
    configured = configs(case, length)
    found = dict(zip(configured, compiled(make, configured.values()), strict=True))
    dense = found["dense"]
    dense.start()
    for name, training in found.items():
        if training is not dense:
            training.start()
        loss = float([training() for _ in range(3)][-1])
        if not np.isfinite(loss):
            raise AssertionError(f"{name}: the loss is {loss}")
        fns = {"dense": dense, "step": training}
        times = timing.time_in_turn(fns, repeats=repeats, sample_ms=100.0)
        step = times["step"]
        yield {
            "seq": length,
            "batch": batch,
            "model": name,
            "params_million": training.num_params / 1e6,
            "ms_per_step": step.ms,
            "iqr_ms": step.iqr_ms,
            "speedup": times["dense"].ms / step.ms,
            "tokens_per_s": case.tokens / step.ms * 1e3,
            "memory_gb": training.memory_gb,
            "loss_after_3_steps": loss,
        }
        if training is not dense:
            training.stop()


def main(argv: list[str] | None = None) -> None:
    """Runs all lengths, the longest first."""
    args = common.parse_args(__doc__, repeats=7, quick_repeats=2, argv=argv)
    case = QUICK if args.quick else CASE
    rows = (row for length in case.lengths for row in run(case, length, args.repeats))
    env = common.environment(repeats=args.repeats, **dataclasses.asdict(case))
    notes = ["Medians; `speedup` is the dense step, timed in turn, over the step."]
    common.report(args.json, env, rows, notes)


if __name__ == "__main__":
    main()

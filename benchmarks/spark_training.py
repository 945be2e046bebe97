"""What does a training step of a Spark model cost, against a dense one?

Decoders of `spark_models`, bfloat16 compute over float32 weights, AdamW, random tokens;
Spark attention on top is reported apart, as its row statistics come before the softmax.
Forward, backward and update in one program.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.parts import common, spark_models, timing
from benchmarks.parts.decoder_training import Training, compiled, random_tokens
from benchmarks.parts.spark_models import Size
from sparsejax import models


@dataclasses.dataclass(frozen=True)
class Case:
    """The models, and the tokens of a step."""

    size: Size
    batch: int
    seq: int


CASE = Case(Size(1024, 6, 16, 8, 64, 32000), batch=8, seq=1024)
QUICK = Case(Size(64, 2, 2, 1, 32, 256), batch=2, seq=32)


def configs(case: Case) -> dict[str, models.DecoderConfig]:
    numerics = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    spark = functools.partial(spark_models.spark, case.size, **numerics)
    return {
        "dense": spark_models.dense(case.size, **numerics),
        "spark ffn": spark(),
        "spark ffn, plain XLA": spark(implementation="reference"),
        "spark ffn and attention": spark(attended=max(1, case.seq // 8)),
    }


def run(case: Case, repeats: int) -> Iterator[dict]:
    """Each model in turn with the dense one, as not all fit in memory at once."""
    tokens = random_tokens(case.batch, case.seq, case.size.vocab_size)
    make = functools.partial(Training, tokens=tokens, tx=optax.adamw(1e-4))
    configured = configs(case)
    found = dict(zip(configured, compiled(make, configured.values()), strict=True))
    dense, losses = found.pop("dense"), {}
    dense.start()
    for name, training in found.items():
        training.start()
        steps = {"dense": dense, name: training}
        for kind, step in steps.items():
            losses[kind] = float([step() for _ in range(3)][-1])
            if not np.isfinite(losses[kind]):
                raise AssertionError(f"{kind}: the loss is {losses[kind]}")
        times = timing.time_in_turn(steps, repeats=repeats, sample_ms=100.0)
        for kind, time in times.items():
            yield {
                "model": kind,
                "params_million": steps[kind].num_params / 1e6,
                "ms_per_step": time.ms,
                "iqr_ms": time.iqr_ms,
                "tokens_per_s": case.batch * case.seq / time.ms * 1e3,
                "to_dense": time.ms / times["dense"].ms,
                "memory_gb": steps[kind].memory_gb,
                "loss": losses[kind],
            }
        training.stop()
    # equal weights and data: another implementation gives another rounding, no more
    kernel, plain = losses["spark ffn"], losses["spark ffn, plain XLA"]
    if abs(kernel - plain) > 1e-2 * abs(plain):
        raise AssertionError(f"the kernel's loss is {kernel}, plain XLA's {plain}")


def main(argv=None):
    args = common.parse_args(__doc__, repeats=10, quick_repeats=2, argv=argv)
    case = QUICK if args.quick else CASE
    notes = [
        "Medians; `to_dense` is the quotient of step times, measured in turn.",
        "`loss`: after three steps, of the dense model when it is timed.",
    ]
    env = common.environment(repeats=args.repeats, **dataclasses.asdict(case))
    common.report(args.json, env, run(case, args.repeats), notes)


if __name__ == "__main__":
    main()

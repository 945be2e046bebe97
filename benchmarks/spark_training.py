"""What does a training step of a Spark model cost, against a dense one?

Decoders of as many parameters, bfloat16 compute over float32 weights, AdamW, random
tokens: dense gated FFNs of 4 d_model neurons; Spark FFNs of 6 d_model, in which half of
the input predicts and 8 % of the neurons are kept; Spark attention on top, reported
apart, as its row statistics come before the softmax. Forward, backward and update in
one program. The models take turns, so that a busy machine slows all alike.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import common
from sparsejax import models, nn


@dataclasses.dataclass(frozen=True)
class Size:
    """The models, and the tokens of a step."""

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    batch: int
    seq: int


SIZE = Size(1024, 12, 16, 8, 64, 32000, 16, 1024)
QUICK = Size(64, 2, 2, 1, 32, 256, 2, 32)
DENSITY = 0.08


def configs(size: Size) -> dict[str, models.DecoderConfig]:
    shared = dataclasses.asdict(size)
    del shared["batch"], shared["seq"]
    dense = models.DecoderConfig(
        **shared, d_ff=4 * size.d_model, dtype=jnp.bfloat16, param_dtype=jnp.float32
    )
    d_ff = 6 * size.d_model

    def spark(implementation):
        ffn = functools.partial(
            nn.SparkFFN,
            k=DENSITY * d_ff,
            split=size.d_model // 2,
            implementation=implementation,
        )
        return dataclasses.replace(dense, d_ff=d_ff, ffn=ffn)

    attention = functools.partial(
        nn.SparkAttention, k=max(1, size.seq // 8), split=size.head_dim // 2
    )
    return {
        "dense": dense,
        "spark ffn": spark(None),
        "spark ffn, plain XLA": spark("reference"),
        "spark ffn and attention": dataclasses.replace(
            spark(None), attention=attention
        ),
    }


def make_step(config: models.DecoderConfig):
    """A jitted step that donates its state, and the state."""
    graph, params = nnx.split(
        nnx.jit(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))(), nnx.Param
    )
    tx = optax.adamw(1e-4)

    def loss_fn(params, tokens):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        )
        return jnp.mean(losses)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step, (params, tx.init(params))


def run(size: Size, calls: int, repeats: int) -> list[dict]:
    shape = (size.batch, size.seq + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, size.vocab_size)
    steps, states, losses, counts = {}, {}, {}, {}
    for name, config in configs(size).items():
        steps[name], states[name] = make_step(config)
        counts[name] = sum(x.size for x in jax.tree.leaves(states[name][0]))
        for _ in range(3):  # compile, and warm up
            states[name], loss = steps[name](states[name], tokens)
        losses[name] = float(loss)
        if not np.isfinite(losses[name]):
            raise AssertionError(f"{name}: the loss is {losses[name]}")
    # equal weights and data: another implementation gives another rounding, no more
    kernel, plain = losses["spark ffn"], losses["spark ffn, plain XLA"]
    if abs(kernel - plain) > 1e-2 * abs(plain):
        raise AssertionError(f"the kernel's loss is {kernel}, plain XLA's {plain}")

    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(calls):
                states[name], loss = step(states[name], tokens)
            loss.block_until_ready()
            times[name].append((time.perf_counter() - begin) * 1e3 / calls)
    dense = np.median(times["dense"])
    rows = []
    for name, values in times.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        rows.append(
            {
                "model": name,
                "params_million": counts[name] / 1e6,
                "ms_per_step": float(median),
                "iqr_ms": float(high - low),
                "tokens_per_s": size.batch * size.seq / float(median) * 1e3,
                "to_dense": float(median / dense),
                "loss_after_3_steps": losses[name],
            }
        )
    return rows


def main(argv=None):
    args = common.parse_args(__doc__, repeats=10, quick_repeats=2, argv=argv)
    size = QUICK if args.quick else SIZE
    rows = run(size, calls=1 if args.quick else 5, repeats=args.repeats)
    notes = ["Medians; `to_dense` is the quotient of step times."]
    common.print_table(rows, notes)
    env = common.environment(repeats=args.repeats, **dataclasses.asdict(size))
    common.write_json(args.json, env=env, rows=rows, notes=notes)


if __name__ == "__main__":
    main()

"""Distills SeerAttention gates into a frozen decoder, and shows what they recall.

    python examples/distill_seer_attention.py          # about a minute on two cores
    python examples/distill_seer_attention.py --seq-len 1024 --distill-steps 500

First a small decoder learns the source of Python's standard library, byte by byte, with
dense attention. Then it is frozen, and a gate in each layer learns which blocks carry
that layer's attention. The table says how much of the attention lies in the blocks that
are kept: those that the trained gates select, the same gates before training, chance,
products of mean-pooled queries and keys, and the target that the gates learn. That is
the highest weight of a block and not its mass, so it is no bound: where attention is
nearly even, as in a model that has learned little, mean pooling may recall more. All
keep equally many, and always the block of the queries themselves.
"""

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax import attention, models, nn, ops, training

DENSITIES = (0.5, 0.25, 0.1)
COLUMNS = (
    "realised",
    "random",
    "untrained gate",
    "mean-pooled q.k",
    "trained gate",
    "the target",
)


def main(argv=None) -> list[dict]:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        text = training.standard_library_text()
        shape = {"batch_size": args.batch_size, "seq_len": args.seq_len}
        training.require_length(text, **shape)
        config = models.DecoderConfig(
            num_layers=args.num_layers,
            d_model=args.d_model,
            d_ff=3 * args.d_model,
            attention=functools.partial(nn.SeerAttention, block=args.block),
        )
        # Gates are one tree of weights, the model's own another.
        graph, gates, weights = nnx.split(
            models.Decoder(config, rngs=nnx.Rngs(args.seed)), nn.GateParam, nnx.Param
        )
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")

    def batch(step):
        return training.sample_batch(text.train, seed=args.seed, step=step, **shape)

    # --- The decoder learns; its gates are idle ---

    def language_loss(weights, gates, tokens):
        logits = nnx.merge(graph, gates, weights)(tokens[:, :-1])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        )
        return losses.mean() / math.log(2)

    weights, loss = train(
        functools.partial(language_loss, gates=gates),
        weights,
        batch,
        num_steps=args.steps,
        learning_rate=args.lr,
    )
    print(f"the decoder is at {loss:.2f} bits per byte after {args.steps} steps")

    # --- The gates learn; the decoder is frozen ---

    def gate_loss(gates, weights, tokens):
        model = nnx.merge(graph, gates, weights)
        model.set_attributes(distill=True)
        model(tokens[:, :-1])
        return nn.pop_gate_losses(model).sum()

    start = time.perf_counter()
    trained, loss = train(
        functools.partial(gate_loss, weights=weights),
        gates,
        batch,
        num_steps=args.distill_steps,
        learning_rate=args.gate_lr,
    )
    print(
        f"{sum(x.size for x in jax.tree.leaves(gates)):,} weights of gates are at "
        f"{loss / args.num_layers:.3f} nats a layer after {args.distill_steps} steps, "
        f"{time.perf_counter() - start:.0f} s"
    )

    # --- What they recall, on text that none has seen ---

    (held_out,) = training.validation_batches(text.validation, num_batches=1, **shape)
    measure = functools.partial(recalled, graph, weights, (gates, trained))
    measured = jax.jit(measure)(held_out[:, :-1], key=jax.random.key(args.seed))
    rows = [
        {"density": density}
        | {name: round(float(measured[density][name]), 3) for name in COLUMNS}
        for density in DENSITIES
    ]
    print("\nShare of the attention in the kept blocks, mean over layers and heads\n")
    print(training.markdown_table(rows))
    return rows


def train(loss_fn, params, batch, *, num_steps, learning_rate):
    """Trains all of `params`; also gives the mean loss of the last tenth of steps."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(20, num_steps // 4), num_steps
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def step_fn(params, opt_state, tokens):
        loss, grads = jax.value_and_grad(lambda p: loss_fn(p, tokens=tokens))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = tx.init(params), []
    for step in range(num_steps):
        params, opt_state, loss = step_fn(params, opt_state, batch(step))
        losses.append(loss)
    last = losses[-max(1, num_steps // 10) :]
    return params, float(sum(last) / len(last))


def recalled(graph, weights, gates, tokens, *, key):
    """The recalled mass by density and by what selects."""
    untrained, trained = (nnx.merge(graph, gate, weights) for gate in gates)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    masses = {density: [] for density in DENSITIES}
    x = trained.embed(tokens)
    for number, (block, idle) in enumerate(
        zip(trained.blocks, untrained.blocks, strict=True)
    ):
        layer, size = block.attention, block.attention.block
        h = block.attention_norm(x)
        query, key_, value = layer.project(h, positions)
        target = attention.seer_target(query, key_, block=size)
        in_sight = jnp.tri(target.shape[-1], dtype=bool)
        pooled = attention.block_scores(
            query, key_, block_shape=(size, size), per_head=True
        )
        noise = jax.random.uniform(jax.random.fold_in(key, number), target.shape)
        scores = {
            "trained gate": layer.scores(h, positions),
            "untrained gate": idle.attention.scores(h, positions),
            "random": jnp.where(in_sight, noise, -jnp.inf),
            "mean-pooled q.k": jnp.where(in_sight, pooled, -jnp.inf),
            "the target": jnp.where(in_sight, target, -jnp.inf),
        }
        attend = functools.partial(ops.block_attention, causal=True, with_lse=True)
        _, every = attend(query, key_, value)
        for density, found in masses.items():
            num_kept = attention.blocks_for_density(density, target.shape[-1])
            of_layer = {}
            for name, of_blocks in scores.items():
                mask = attention.seer_topk(
                    of_blocks, num_kept=num_kept, block=size, dense_last_rows=0
                )
                _, kept = attend(query, key_, value, mask)
                realised = attention.pair_density(mask, tokens.shape[1])
                of_layer[name] = jnp.exp(kept - every).mean()
                of_layer["realised"] = realised.mean()
            found.append(of_layer)
        x = block(x, positions)
    return {
        density: jax.tree.map(lambda *layers: sum(layers) / len(layers), *found)
        for density, found in masses.items()
    }


def check(args) -> None:
    if args.block > args.seq_len:
        raise ValueError(
            f"--block must be at most --seq-len; got {args.block} and {args.seq_len}"
        )
    for option, steps in (
        ("--steps", args.steps),
        ("--distill-steps", args.distill_steps),
    ):
        if steps < 1:
            raise ValueError(f"{option} must be at least 1; got {steps}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=120, help="of the decoder")
    add("--distill-steps", type=int, default=120, help="of the gates")
    add("--block", type=int, default=8, help="tokens of a block")
    add("--seq-len", type=int, default=512)
    add("--batch-size", type=int, default=4)
    add("--num-layers", type=int, default=2)
    add("--d-model", type=int, default=128)
    add("--lr", type=rate, default=3e-3)
    add("--gate-lr", type=rate, default=1e-2)
    add("--seed", type=int, default=0)
    return parser


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"a rate is above 0 and finite; got {text}")
    return value


if __name__ == "__main__":
    main()

"""Trains a tiny masked diffusion language model, and samples from it by SparseD.

    python examples/sparse_diffusion.py                # about a minute on two cores
    python examples/sparse_diffusion.py --seq-len 256 --steps 1500

Half of a sequence is a prompt of random symbols, the other half repeats it. The model
attends in both directions and learns to fill in masked symbols of the second half; a
sampler starts with all of them masked and keeps the surest in each step. The table
says how many of the symbols come out right, and how many of the blocks a sparse step
reads: by dense attention, SparseD, SparseD that chooses its blocks in the second step,
and a window of nearest blocks, as many in each row as SparseD keeps.
"""

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sparsejax as sj
from sparsejax import attention, models, ops, training

SYMBOLS = 31
MASK = SYMBOLS  # the symbol that stands for one not yet known


def main(argv=None) -> list[dict]:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check(args)
        config = models.DecoderConfig(
            vocab_size=SYMBOLS + 1,
            num_layers=args.num_layers,
            d_model=args.d_model,
            d_ff=3 * args.d_model,
            num_heads=4,
            num_kv_heads=2,
            head_dim=args.d_model // 4,
        )
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    graph, params = nnx.split(models.Decoder(config, rngs=nnx.Rngs(args.seed)))
    start = time.perf_counter()
    params, loss = train(graph, params, args)
    print(
        f"the model is at {loss:.3f} nats a masked symbol after {args.steps} steps, "
        f"{time.perf_counter() - start:.0f} s"
    )

    key = jax.random.key(args.seed + 1)
    tokens = sequences(key, args.samples, args.seq_len)
    runs = {
        "dense": {"skip": 1.0},
        "SparseD": {"skip": args.skip},
        "SparseD, chosen at once": {"skip": 0.0},
        "window": {"skip": args.skip, "select": window},
    }
    rows = []
    for name, options in runs.items():
        run = jax.jit(functools.partial(sample, graph, args=args, **options))
        right, density = run(params, tokens)
        row = {"attention": name, "right": round(float(right), 3)}
        rows.append(row | {"blocks read": round(float(density), 3)})
    print(f"\nSymbols of {args.samples} sequences, {args.denoise_steps} steps each\n")
    print(training.markdown_table(rows))
    return rows


def sequences(key, batch, seq_len):
    """Random symbols, and the same once more."""
    prompt = jax.random.randint(key, (batch, seq_len // 2), 0, SYMBOLS)
    return jnp.concatenate([prompt, prompt], axis=1)


def apply(model, tokens, masks=None, select=None):
    """Logits of every position, and the masks that `select` gives for each layer."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = model.embed(tokens)
    selected = []
    for layer, block in enumerate(model.blocks):
        query, key, value = block.attention.project(block.attention_norm(x), positions)
        if select is not None:
            selected.append(select(query, key))
        mask = None if masks is None else masks[layer]
        y = ops.block_attention(query, key, value, mask)  # in both directions
        x = x + block.attention.combine(y)
        x = x + block.ffn(block.ffn_norm(x))
    return model.logits(x), tuple(selected)


def train(graph, params, args):
    """Trains all of `params`; also gives the mean loss of the last tenth of steps."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.lr, min(20, args.steps // 4), args.steps
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss_fn(params, key):
        of_tokens, of_share, of_masked = jax.random.split(key, 3)
        tokens = sequences(of_tokens, args.batch_size, args.seq_len)
        share = jax.random.uniform(of_share, (args.batch_size, 1), minval=0.05)
        masked = jax.random.uniform(of_masked, tokens.shape) < share
        masked &= jnp.arange(args.seq_len) >= args.seq_len // 2
        logits, _ = apply(nnx.merge(graph, params), jnp.where(masked, MASK, tokens))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return jnp.sum(losses * masked) / jnp.maximum(masked.sum(), 1)

    @jax.jit
    def step_fn(params, opt_state, step):
        key = jax.random.fold_in(jax.random.key(args.seed), step)
        loss, grads = jax.value_and_grad(loss_fn)(params, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = tx.init(params), []
    for step in range(args.steps):
        params, opt_state, loss = step_fn(params, opt_state, step)
        losses.append(loss)
    last = losses[-max(1, args.steps // 10) :]
    return params, float(sum(last) / len(last))


def window(mask):
    """As many blocks in a row as `mask` keeps on average, nearest to the diagonal."""
    rows, columns = mask.blocks_shape[-2:]
    width = jnp.round(mask.num.mean()).astype(jnp.int32)
    distance = jnp.abs(jnp.arange(rows)[:, None] - jnp.arange(columns))
    rank = jnp.argsort(jnp.argsort(distance, axis=-1, stable=True), axis=-1)
    return sj.BlockMask.from_blocks((rank < width)[None, None], mask.block_shape)


def sample(graph, params, tokens, *, args, skip, select=lambda mask: mask):
    """The share of symbols that come out right, and of blocks in the sparse steps."""
    model = nnx.merge(graph, params)
    half = args.seq_len // 2
    sparsed = functools.partial(
        attention.sparsed,
        num_generated=half,
        density=args.density,
        block_shape=(args.block, args.block),
    )

    def denoise(step, tokens, masks=None, select=None):
        """Keeps the surest of what is masked, as many in each step."""
        logits, selected = apply(model, tokens, masks, select)
        logits = logits.at[..., MASK].set(-jnp.inf)
        sure = jax.nn.log_softmax(logits).max(axis=-1)
        sure = jnp.where(tokens == MASK, sure, jnp.inf)
        known = half + half * (step + 1) // args.denoise_steps
        order = jnp.argsort(-sure, axis=-1, stable=True)
        rank = jnp.argsort(order, axis=-1)
        filled = jnp.where(tokens == MASK, logits.argmax(axis=-1), tokens)
        return jnp.where(rank < known, filled, MASK), selected

    def build(step, state):
        tokens, _ = state
        tokens, masks = denoise(
            step, tokens, select=lambda query, key: select(sparsed(query, key))
        )
        density = jnp.mean(jnp.stack([mask.density().mean() for mask in masks]))
        return (tokens, density), masks

    start = jnp.where(jnp.arange(args.seq_len) < half, tokens, MASK)
    out, density = attention.sparsed_denoise(
        lambda step, state: (denoise(step, state[0])[0], state[1]),
        build,
        lambda step, state, masks: (denoise(step, state[0], masks)[0], state[1]),
        (start, jnp.float32(1)),
        num_steps=args.denoise_steps,
        skip=skip,
    )
    return jnp.mean(out[:, half:] == tokens[:, half:]), density


def check(args) -> None:
    if args.seq_len < 2 * args.block or args.seq_len % 2 or args.block < 1:
        raise ValueError(
            "--seq-len must be even and hold two blocks of --block, at least 1; got "
            f"{args.seq_len} and {args.block}"
        )
    if args.d_model < 8 or args.d_model % 8:
        raise ValueError(f"--d-model must be a multiple of 8; got {args.d_model}")
    for name in ("steps", "samples", "batch_size"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(
                f"--{option} must be at least 1; got {getattr(args, name)}"
            )
    if not 0 < args.density <= 1:
        raise ValueError(f"--density must be in (0, 1]; got {args.density}")
    attention.sparsed_dense_steps(args.denoise_steps, skip=args.skip)  # names them


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=500, help="of training")
    add("--denoise-steps", type=int, default=32, help="of the sampler")
    add("--skip", type=float, default=0.2, help="share of them that are dense")
    add("--density", type=float, default=0.3, help="share of blocks to keep")
    add("--block", type=int, default=8, help="tokens of a block")
    add("--seq-len", type=int, default=128)
    add("--batch-size", type=int, default=16)
    add("--samples", type=int, default=32)
    add("--num-layers", type=int, default=2)
    add("--d-model", type=int, default=64)
    add("--lr", type=rate, default=3e-3)
    add("--seed", type=int, default=0)
    return parser


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"a rate is above 0 and finite; got {text}")
    return value


if __name__ == "__main__":
    main()

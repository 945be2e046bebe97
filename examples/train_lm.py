r"""Trains a sparse transformer on real text: dense first, then sparse from its weights.

    python examples/train_lm.py              # CAST to exact 2:4, 2 to 8 minutes
    python examples/train_lm.py --resume     # after Ctrl-C, a crash or kill -9
    python examples/train_lm.py --name rigl --method rigl \
        --pattern unstructured --sparsity 0.8
    python examples/train_lm.py --name spark --method dense \
        --ffn spark --attention spark
    python examples/train_lm.py --name blocks --method rigl --dense-steps 0 \
        --pattern block:16x16 --sparsity 0.8 --ffn block

A small decoder learns the source of Python's standard library, byte by byte. At the
fork it goes on in two ways, on the same batches: dense, and by one of the library's
methods. The table at the end compares both, and one-shot pruning. `runs/NAME/` gets the
metrics, a picture, the checkpoints and the sparse weights.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sparsejax as sj
from sparsejax import models, nn, training

# --- One step, for every method ---


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train. Most methods need nothing but the defaults of the library."""

    tx: optax.GradientTransformationExtraArgs
    start: Callable = lambda weights: weights  # -> params: what is trained
    forward: Callable = sj.forward_params  # (opt_state, params) -> weights in the loss
    finish: Callable = sj.sparse_params  # (opt_state, params) -> exactly sparse weights
    masks: Callable = sj.masks_of  # opt_state -> masks of the weights
    place: Callable = lambda model, opt_state: None  # masks into block-sparse layers
    hard: bool = False  # the masks are of what is kept, zeros of just grown weights too
    eta: float = 0.0  # share of the dense teacher in the loss


def begin(method, weights, step=0):
    params = method.start(weights)
    return training.TrainState(jnp.int32(step), params, method.tx.init(params))


def try_begin(method, make_model, weights):
    """Raises what is wrong with the method, or with block-sparse layers under it."""
    method.place(make_model(weights), begin(method, weights).opt_state)


def train_step(method, apply, state, batch, teacher):
    inputs, labels = batch[:, :-1], batch[:, 1:]

    def loss_fn(params):
        weights = method.forward(state.opt_state, params)
        place = functools.partial(method.place, opt_state=state.opt_state)
        logits = apply(weights, inputs, place)
        nats = cross_entropy(logits, labels)
        if not method.eta:
            return nats, nats
        teacher_logits = apply(teacher, inputs)
        loss = sj.distillation_loss(logits, teacher_logits, labels, eta=method.eta)
        return loss, nats

    (loss, nats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = method.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    before, after = method.masks(state.opt_state), method.masks(opt_state)
    metrics = {
        "loss": loss,
        "bits_per_byte": nats / math.log(2),
        "sparsity": sj.metrics.mask_sparsity(after),
        "mask_changes": sj.sad(before, after),
    }
    return training.TrainState(state.step + 1, params, opt_state), metrics


def cross_entropy(logits, labels):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


# --- The run ---


def main(argv=None) -> list[dict]:
    parser = make_parser()
    args = parse_args(parser, argv)
    try:  # what is wrong with the input shows here, before anything is written
        text = read_text(args)
        sizes = model_sizes(args)
        decoder = models.DecoderConfig(**sizes, **layers(args))
        model = models.Decoder(decoder, rngs=nnx.Rngs(args.seed))
        graph, weights, rest = nnx.split(model, nnx.Param, ...)

        def make_model(weights):
            return nnx.merge(graph, weights, rest, copy=True)  # its masks are its own

        methods = {"dense": dense(args), args.method: METHODS[args.method](args)}
        if args.ffn == "block" and args.method != "dense":
            methods[args.method] = dataclasses.replace(
                methods[args.method], place=nn.set_block_masks
            )
        for method in methods.values():
            jax.eval_shape(functools.partial(try_begin, method, make_model), weights)
        jax.eval_shape(functools.partial(prune, args), weights)
        config = run_config(args, text, sizes)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    try:
        run = training.open_run(args.runs / args.name, config, resume=args.resume)
    except (OSError, ValueError) as error:
        words = "Here --resume is `resume=True`, and --name chooses the folder."
        parser.exit(2, f"error: {error}\n{words}\n")
    print(
        f"{sum(x.size for x in jax.tree.leaves(weights)):,} weights learn "
        f"{text.train.size:,} bytes of the {text.name}; results go to {run.folder}"
    )

    shape = {"batch_size": args.batch_size, "seq_len": args.seq_len}
    validation = training.validation_batches(text.validation, num_batches=128, **shape)

    def apply(weights, tokens, place=lambda model: None, **options):
        model = make_model(weights)
        place(model)
        return model(tokens, **options)

    @jax.jit
    def bits_per_byte(weights, batches):
        def nats(batch):
            return cross_entropy(apply(weights, batch[:, :-1]), batch[:, 1:])

        return jnp.mean(jax.lax.map(nats, batches)) / math.log(2)

    @jax.jit
    def densities(weights, batch):
        """The mean over tokens, for each kind of layer and each layer."""
        _, density = apply(weights, batch[:, :-1], with_density=True)
        return jax.tree.map(lambda x: jnp.mean(x, axis=(1, 2)), density)

    def train(phase, method, state, num_steps, teacher=None):
        step_fn = jax.jit(
            functools.partial(train_step, method, apply), donate_argnums=0
        )

        def evaluate(state):
            weights = method.forward(state.opt_state, state.params)
            loss = bits_per_byte(weights, validation[::8])
            masks = method.masks(state.opt_state)
            leaves = sj.metrics.leaf_metrics(masks, weights).items()
            metrics = {
                "validation_bits_per_byte": loss,
                "leaf_sparsity": {name: of.sparsity for name, of in leaves},
                "leaf_pruned_magnitude": {
                    name: of.pruned_magnitude for name, of in leaves
                },
            }
            if sparse_layers(args):
                density = densities(weights, validation[0])
                metrics["density"] = {
                    f"{kind} {layer}": value
                    for kind in sparse_layers(args)
                    for layer, value in enumerate(density[kind])
                }
            return metrics

        try:
            return training.fit(
                run,
                phase,
                state,
                lambda state, batch: step_fn(state, batch, teacher),
                lambda step: training.sample_batch(
                    text.train, seed=args.seed, step=step, **shape
                ),
                num_steps=num_steps,
                evaluate=evaluate,
                evaluate_every=args.evaluate_every,
                checkpoint_every=args.checkpoint_every,
                tokens_per_step=args.batch_size * args.seq_len,
            )
        except training.Stopped:
            print("Go on by --resume.", file=sys.stderr)
            raise

    # Each call goes on from its own newest checkpoint: a resumed run passes through the
    # parts that are done and does the rest.
    fork_step, last_step = args.dense_steps, args.dense_steps + args.steps
    state = begin(methods["dense"], weights)
    fork = train("dense", methods["dense"], state, fork_step)
    dense_on = train("dense-continued", methods["dense"], fork, last_step)

    kept = prune(args, dense_on.params)
    final = sj.apply_masks(dense_on.params, kept)
    compared = [
        ("dense at the fork", fork_step, fork.params, None),
        ("dense, trained on", last_step, dense_on.params, None),
        ("... pruned in one shot", last_step, final, kept),
    ]
    if args.method != "dense":
        method = methods[args.method]
        state = begin(method, fork.params, fork_step)
        state = train(args.method, method, state, last_step, teacher=fork.params)
        before = method.forward(state.opt_state, state.params)
        final = method.finish(state.opt_state, state.params)
        kept = method.masks(state.opt_state) if method.hard else None
        compared += [
            (f"{args.method}, before the hard prune", last_step, before, kept),
            (f"{args.method}, after the hard prune", last_step, final, kept),
        ]
    rows = [
        {
            "model": name,
            "steps": steps,
            "sparsity": sj.sparsity_report(weights if kept is None else kept).sparsity,
            "bits per byte": float(bits_per_byte(weights, validation)),
        }
        for name, steps, weights, kept in compared
    ]
    for row in rows:
        row["to dense, %"] = 100 * (row["bits per byte"] / rows[1]["bits per byte"] - 1)
    finish(run, rows, final, config)
    if sparse_layers(args):
        draw_density(run)
    return rows


def finish(run, rows, final, config) -> None:
    """Prints the table; writes it, the picture and the sparse weights."""
    table = training.markdown_table(rows)
    print(f"\n{table}\n")
    training.write_atomic(run.folder / "table.md", table + "\n")
    training.write_atomic(run.folder / "table.json", json.dumps(rows, indent=2))
    training.save_weights(
        run.folder / "sparse.safetensors", final, {"config": json.dumps(config)}
    )
    kernel = final["blocks"][0]["attention"]["query"]["kernel"][...]
    training.draw_report(
        run.folder / "report.png",
        run.rows(),
        title=f"{run.folder.name}: {config['method']}, {config['pattern']}",
        mask=kernel != 0,
        mask_name="blocks.0.attention.query",
    )
    print(f"{run.folder}: report.png, table.md, metrics.jsonl, sparse.safetensors")


def draw_density(run) -> None:
    """Draws the share of neurons and of tokens in sight that each layer uses."""
    rows = [row for row in run.rows() if row.get("density")]
    way = ("dense", rows[-1]["phase"])  # up to the fork, and one way after it
    rows = [row for row in rows if row["phase"] in way]
    figure = sj.metrics.plot_density(
        [row["step"] for row in rows],
        [list(row["density"].values()) for row in rows],
        names=list(rows[0]["density"]),
        title=f"{run.folder.name}: density of activations",
    )
    figure.savefig(run.folder / "density.png")
    last = rows[-1]["density"]
    print("density: " + ", ".join(f"{name} {x:.1%}" for name, x in last.items()))
    print(f"{run.folder}: density.png")


# --- The methods ---


def cosine(args, peak):
    """From `peak` to a tenth of it over the steps after the fork."""
    return optax.cosine_decay_schedule(peak, max(args.steps, 1), 0.1)


def clipped_adam(learning_rate):
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(learning_rate, b2=0.99)
    )


def prune(args, weights):
    """Masks of the largest weights, for what is judged after a prune."""
    return sj.prune(weights, args.sparsity, pattern=args.pattern)


def dense(args) -> Method:
    """The learning rate warms up, is constant until the fork, then falls."""
    constant = optax.warmup_constant_schedule(0.0, args.lr, 30)
    falling = cosine(args, args.lr)
    return Method(
        clipped_adam(optax.join_schedules([constant, falling], [args.dense_steps])),
        forward=lambda opt_state, params: params,
        finish=lambda opt_state, params: params,
        masks=lambda opt_state: {},
    )


def adams(args) -> Method:
    """AdamS alone, which pulls the weights to prune to zero; the forward is dense."""
    return Method(adams_for(args, where=None))


def adams_for(args, where):
    """The published run is far longer and starts from a converged model.

    Hence shorter memories, `b1` and `b2`, and a pull well above the gradients: weights
    go early, and the others have time to adapt.
    """
    adams = sj.adams(
        cosine(args, args.cast_lr),
        max(args.steps, 1),
        args.l1_decay,
        sparsity=args.sparsity,
        pattern=args.pattern,
        where=where,
        b1=0.8,
        b2=0.95,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), adams)


def cast(args) -> Method:
    """CAST: AdamS, and scales that repair lost magnitude, and the dense model teaches.

    The teacher counts a tenth and not the paper's third: it is the model at the fork,
    which the student soon overtakes.
    """

    def where(path, leaf):  # the scales are left to plain Adam
        return path[0].key == "weights" and sj.patterns.is_default_governed(path, leaf)

    def start(weights):
        return {"weights": weights, "scales": sj.weight_scaling.init(weights)}

    def forward(opt_state, params):
        params = sj.forward_params(opt_state, params)
        return sj.weight_scaling.apply(params["weights"], params["scales"])

    def finish(opt_state, params):
        weights, scales = params["weights"], params["scales"]
        return sj.weight_scaling.fold(weights, scales, prune(args, weights))

    def masks(opt_state):
        return sj.masks_of(opt_state)["weights"]

    tx = adams_for(args, where)
    return Method(tx, start, forward, finish, masks, eta=args.eta)


def sr_ste(args) -> Method:
    inner = clipped_adam(cosine(args, args.lr))
    return Method(sj.sr_ste(inner, sparsity=args.sparsity, pattern=args.pattern))


def mask_decay(args) -> Method:
    """The factor of the pruned weights is 1 % at 60 % of the steps, 0 from 90 % on."""
    inner = clipped_adam(cosine(args, args.lr))
    steps = max(args.steps, 1)
    decay = sj.schedules.exponential_decay(
        4.6 / (0.6 * steps), hard_after=steps * 9 // 10
    )
    return Method(
        sj.mask_decay(inner, decay, sparsity=args.sparsity, pattern=args.pattern)
    )


def structure_decay(args) -> Method:
    """Patterns that keep fewer and fewer of `m`; the last holds for half of the run."""
    if not isinstance(args.pattern, sj.NM):
        raise ValueError(
            f"structure_decay needs an N:M pattern; got {args.pattern}. Pass --pattern."
        )
    inner = clipped_adam(cosine(args, args.lr))
    frames = sj.patterns.stepwise_frames(args.pattern)
    starts = sj.schedules.frame_boundaries(
        len(frames), args.steps, hard_steps=args.steps // 3
    )
    return Method(sj.structure_decay(inner, frames, starts))


def magnitude(args) -> Method:
    """Gradual: a cubic ramp over half of the steps. N:M is pruned at once."""
    inner = clipped_adam(cosine(args, args.lr))
    sparsity = args.sparsity
    if sparsity is not None:
        sparsity = sj.schedules.cubic(sparsity, begin=0, end=max(args.steps // 2, 1))
    return Method(
        sj.magnitude_prune(inner, sparsity, pattern=args.pattern, update_every=10),
        hard=True,
    )


def static(args) -> Method:
    """Random masks from the start; give `--dense-steps 0`, as for SET and RigL."""
    inner = clipped_adam(cosine(args, args.lr))
    key = jax.random.key(args.seed)
    tx = sj.static_sparse(inner, args.sparsity, pattern=args.pattern, key=key)
    return Method(tx, hard=True)


def dynamic(args, method) -> Method:
    """About twenty mask updates in the first three quarters of the steps."""
    return Method(
        method(
            clipped_adam(cosine(args, args.lr)),
            args.sparsity,
            update_every=max(1, args.steps // 27),
            stop_step=max(1, args.steps * 3 // 4),
            pattern=args.pattern,
            key=jax.random.key(args.seed),
        ),
        hard=True,
    )


METHODS = {
    "cast": cast,
    "adams": adams,
    "sr_ste": sr_ste,
    "mask_decay": mask_decay,
    "structure_decay": structure_decay,
    "magnitude": magnitude,
    "static": static,
    "set": functools.partial(dynamic, method=sj.sparse_evolution),
    "rigl": functools.partial(dynamic, method=sj.rigl),
    "dense": dense,
}


# --- The command line ---


class Help(
    argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
):
    """The docstring above as it stands, and the default of each option."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--name", default="train_lm", help="the run's folder is RUNS/NAME")
    add("--runs", type=Path, default=Path("runs"), help="holds the folders of all runs")
    add("--resume", action="store_true", help="go on with the run NAME")
    add(
        "--text", type=Path, nargs="+", metavar="FILE", help="learn these files instead"
    )
    add("--method", choices=METHODS, default="cast", help="of training after the fork")
    add(
        "--pattern",
        type=parse_pattern,
        default="2:4",
        help="N:M, unstructured, block:HEIGHTxWIDTH or channel",
    )
    add("--sparsity", type=float, help="share of zeros; an N:M pattern has its own")
    add("--seed", type=count, default=0, help="of weights, batches and masks")
    add("--dense-steps", type=count, default=1000, help="steps before the fork")
    add("--steps", type=count, default=600, help="steps after it, on each way")
    add("--batch-size", type=positive, default=4, help="sequences of a step")
    add("--seq-len", type=positive, default=128, help="bytes to predict in each")
    add("--d-model", type=positive, default=128, help="width of the model")
    add("--num-layers", type=positive, default=4, help="blocks of the model")
    add("--num-heads", type=positive, default=4, help="query heads of a block")
    add("--ffn", choices=FFNS, default="gated", help="feed-forward part of a block")
    add(
        "--density",
        type=share,
        default=0.08,
        help="share of the neurons that a spark or gemma3n layer uses for a token",
    )
    add(
        "--attention",
        choices=("dense", "spark"),
        default="dense",
        help="attention of a block",
    )
    add(
        "--attended",
        type=positive,
        default=32,
        metavar="TOKENS",
        help="tokens that spark attention attends to",
    )
    add("--lr", type=number, default=2e-3, help="peak learning rate")
    add(
        "--cast-lr",
        type=number,
        default=8e-4,
        help="that of AdamS: its steps are longer",
    )
    add("--l1-decay", type=number, default=1e-2, help="pull of AdamS")
    add("--eta", type=share, default=0.1, help="share of the teacher in CAST's loss")
    add(
        "--evaluate-every",
        type=positive,
        default=100,
        metavar="STEPS",
        help="from one validation to the next",
    )
    add(
        "--checkpoint-every",
        type=positive,
        default=200,
        metavar="STEPS",
        help="from one checkpoint to the next",
    )
    return parser


READ_WITH = {  # other methods and layers would leave these aside
    "density": ("ffn", ("spark", "gemma3n")),
    "attended": ("attention", ("spark",)),
    "cast_lr": ("method", ("cast", "adams")),
    "l1_decay": ("method", ("cast", "adams")),
    "eta": ("method", ("cast",)),
}


def parse_args(parser, argv) -> argparse.Namespace:
    """An option that is given and would not be read is an error."""
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(READ_WITH)))
    for name, (by, values) in READ_WITH.items():
        chosen = getattr(args, by)
        if getattr(args, name) is None:  # not given
            setattr(args, name, parser.get_default(name))
        elif chosen not in values:
            parser.error(
                f"--{name.replace('_', '-')} is read with --{by} {' or '.join(values)} "
                f"alone; got --{by} {chosen}. Leave it out."
            )
    return args


def count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more; got {text!r}")
    return int(text)


positive = functools.partial(count, least=1)


def number(text: str, most: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and 0 <= value <= most):
        limit = "0 or more" if most == math.inf else f"in [0, {most:g}]"
        raise argparse.ArgumentTypeError(f"must be {limit}; got {text!r}")
    return value


share = functools.partial(number, most=1)


def parse_pattern(text: str):
    try:
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            return sj.NM(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"block:(\d+)x(\d+)", text):
            return sj.Block((int(found[1]), int(found[2])))
        return {"unstructured": sj.Unstructured(), "channel": sj.Channel(-1)}[text]
    except KeyError:
        known = "N:M, unstructured, block:HEIGHTxWIDTH or channel"
        raise argparse.ArgumentTypeError(f"must be {known}; got {text!r}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_text(args) -> training.ByteText:
    if args.text:
        text = training.text_from_files(args.text)
    else:
        text = training.standard_library_text()
    training.require_length(text, batch_size=args.batch_size, seq_len=args.seq_len)
    return text


def model_sizes(args) -> dict[str, int]:
    return {
        "d_model": args.d_model,
        "num_layers": args.num_layers,
        "num_heads": args.num_heads,
        "num_kv_heads": max(1, args.num_heads // 2),
        "head_dim": args.d_model // args.num_heads,
        "d_ff": d_ff(args),
    }


def d_ff(args) -> int:
    """A Spark FFN has as many weights as a gated one of two thirds its width."""
    return 3 * args.d_model * 3 // 2 if args.ffn == "spark" else 3 * args.d_model


FFNS = {
    "gated": lambda args: nn.GatedFFN,
    "spark": lambda args: functools.partial(
        nn.SparkFFN, k=args.density * d_ff(args), split=args.d_model // 2
    ),
    "gemma3n": lambda args: functools.partial(
        nn.SparkFFN, k=args.density * d_ff(args), split=None
    ),
    "block": lambda args: functools.partial(
        nn.BlockSparseFFN, block_shape=block_shape(args)
    ),
}


def block_shape(args) -> tuple[int, int]:
    """That of the pattern: the layers skip the blocks that the method prunes."""
    if not isinstance(args.pattern, sj.Block):
        raise ValueError(
            f"--ffn block needs --pattern block:HEIGHTxWIDTH; got {args.pattern}."
        )
    return args.pattern.shape


def layers(args) -> dict:
    """What the blocks of the decoder are made of."""
    attention = nn.Attention
    if args.attention == "spark":
        split = args.d_model // args.num_heads // 2
        attention = functools.partial(nn.SparkAttention, k=args.attended, split=split)
    return {"ffn": FFNS[args.ffn](args), "attention": attention}


def sparse_layers(args) -> list[str]:
    """The kinds of layers that use a part of their neurons or of the tokens."""
    kinds = {
        "ffn": args.ffn in ("spark", "gemma3n"),
        "attention": args.attention == "spark",
    }
    return [kind for kind, sparse in kinds.items() if sparse]


def run_config(args, text, sizes) -> dict:
    """What determines the result: a run is resumed with the same or not at all."""
    free = {"name", "runs", "resume", "checkpoint_every"}
    chosen = {name: value for name, value in vars(args).items() if name not in free}
    chosen |= {"pattern": str(args.pattern), "text": text.describe()}
    return chosen | {"model": sizes}


if __name__ == "__main__":
    main()

r"""Trains a sparse transformer on many devices and hosts: FSDP, and a safe restart.

    python examples/train_fsdp.py                  # one host, all of its devices
    srun python examples/train_fsdp.py --cluster   # Slurm, MPI, a TPU pod, Kubernetes
    python examples/train_fsdp.py --coordinator HOST:PORT --num-processes 2 \
        --process-id 0                             # machines without a scheduler

Start the same command once for each process; `--runs` is a folder that all of them see.
With `--resume` it goes on after a SIGTERM, a crash or kill -9, on as many processes as
there are then: the mesh is cut anew, the masks are the same bits.

Each process holds its part of the weights, masks and optimizer state, cuts its own rows
of a batch, and writes its part of a checkpoint. RigL trains at 80 % sparsity from the
first step and keeps exactly as many weights as on one device.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import models, training


def main(argv=None) -> training.TrainState:
    args = parse_args(argv)
    join_processes(args)
    say = print if jax.process_index() == 0 else lambda *_, **options: None

    # One axis over all devices of all processes.
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=axis_types)

    def begin():
        params = nnx.state(make_model(args), nnx.Param)
        return training.TrainState(jnp.int32(0), params, tx.init(params))

    try:  # what is wrong with the input shows here, before anything is written
        text = read_text(args, mesh)
        tx = make_optimizer(args)
        shapes = jax.eval_shape(begin)
        settings = run_config(args, text)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    try:
        run = training.open_run(args.runs / args.name, settings, resume=args.resume)
    except (OSError, ValueError) as error:
        words = "Here --resume is `resume=True`, and --name chooses the folder."
        raise SystemExit(f"error: {error}\n{words}") from error

    # --- The state: made in its shards, so that no host ever holds all of it ---

    shardings = jax.tree.map(functools.partial(fsdp_sharding, mesh), shapes)
    state = jax.jit(begin, out_shardings=shardings)()
    say(
        f"{jax.process_count()} processes, {mesh.size} devices; "
        f"{sum(x.size for x in jax.tree.leaves(state.params)):,} weights, "
        f"{device_bytes(state):,} bytes of state on a device; {run.folder}"
    )

    # --- One step. XLA gathers the weights of a layer where they are used ---

    graph = nnx.graphdef(nnx.eval_shape(lambda: make_model(args)))

    def loss_fn(params, opt_state, batch):
        weights = sj.forward_params(opt_state, params)
        logits = nnx.merge(graph, weights)(batch[:, :-1])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, batch[:, 1:]
        )
        return jnp.mean(losses) / math.log(2)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step_fn(state, batch):
        step, params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        sparsity = sj.metrics.mask_sparsity(sj.masks_of(opt_state))
        metrics = {"bits_per_byte": loss, "sparsity": sparsity}
        return training.TrainState(step + 1, params, opt_state), metrics

    # --- The data: each process cuts the rows that its own devices need ---

    def make_batch(data, step):
        def rows(index):  # those of one device
            return training.sample_batch(
                data,
                seed=args.seed,
                step=step,
                batch_size=args.batch_size,
                seq_len=args.seq_len,
                rows=index[0],
            )

        shape = (args.batch_size, args.seq_len + 1)
        by_row = NamedSharding(mesh, PartitionSpec("data"))
        return jax.make_array_from_callback(shape, by_row, rows)

    held_out = make_batch(text.validation, 0)
    held_out_loss = jax.jit(loss_fn)

    # --- The run: metrics, checkpoints, restarts; the same call in every process ---

    try:
        state = training.fit(
            run,
            "fsdp",
            state,
            step_fn,
            functools.partial(make_batch, text.train),
            num_steps=args.steps,
            evaluate=lambda state: {
                "validation_bits_per_byte": held_out_loss(
                    state.params, state.opt_state, held_out
                )
            },
            evaluate_every=args.evaluate_every,
            checkpoint_every=args.checkpoint_every,
            tokens_per_step=args.batch_size * args.seq_len,
        )
    except training.Stopped:
        say("Go on by --resume.", file=sys.stderr)
        raise
    report = sj.sparsity_report(sj.masks_of(state.opt_state))
    last = [row for row in run.rows() if "validation_bits_per_byte" in row][-1]
    say(
        f"step {last['step']}: {last['validation_bits_per_byte']} bits per byte on "
        f"held-out text, sparsity {report.sparsity:.4f}"
    )
    return state


def join_processes(args) -> None:
    """Comes before anything else of JAX, which then knows the devices of all."""
    if args.coordinator:
        jax.distributed.initialize(
            args.coordinator, args.num_processes, args.process_id
        )
    elif args.cluster:
        jax.distributed.initialize()  # asks Slurm, MPI, the TPU or Kubernetes


def fsdp_sharding(mesh, leaf) -> NamedSharding:
    """The last axis is cut into as many parts as there are devices.

    The groups of an N:M pattern lie along the axis before it and stay whole. What has
    one axis, or does not divide, is whole on every device.
    """
    divides = leaf.ndim > 1 and leaf.shape[-1] % mesh.size == 0
    axes = [None] * (leaf.ndim - 1) + ["data"] if divides else []
    return NamedSharding(mesh, PartitionSpec(*axes))


def make_model(args) -> models.Decoder:
    config = models.DecoderConfig(
        d_model=args.d_model, num_layers=args.num_layers, d_ff=3 * args.d_model
    )
    return models.Decoder(config, rngs=nnx.Rngs(args.seed))


def make_optimizer(args):
    adam = optax.adam(optax.warmup_constant_schedule(0.0, args.lr, 30), b2=0.99)
    return sj.rigl(
        optax.chain(optax.clip_by_global_norm(1.0), adam),
        args.sparsity,
        update_every=args.update_every,
        stop_step=args.stop_step,
        key=jax.random.key(args.seed),
    )


def device_bytes(state) -> int:
    """What one device holds of the state."""
    first = jax.local_devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def read_text(args, mesh) -> training.ByteText:
    if args.batch_size % mesh.size:
        raise ValueError(
            f"--batch-size must be a multiple of the {mesh.size} devices; got "
            f"{args.batch_size}."
        )
    if args.text:
        text = training.text_from_files(args.text)
    else:
        text = training.standard_library_text()
    training.require_length(text, batch_size=args.batch_size, seq_len=args.seq_len)
    return text


def run_config(args, text) -> dict:
    """What determines the result. How many processes share the work does not."""
    free = {"name", "runs", "resume", "steps", "checkpoint_every", "cluster"}
    free |= {"coordinator", "num_processes", "process_id"}
    chosen = {name: value for name, value in vars(args).items() if name not in free}
    return chosen | {"text": text.describe()}


def parse_args(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cluster", action="store_true", help="let JAX ask the scheduler")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    add("--num-processes", type=int)
    add("--process-id", type=int, help="0, 1, ... below --num-processes")
    add("--name", default="train_fsdp", help="the run's folder is RUNS/NAME")
    add("--runs", type=Path, default=Path("runs"))
    add("--resume", action="store_true", help="go on with the run NAME, or start it")
    add("--text", type=Path, nargs="+", metavar="FILE", help="learn these files")
    add("--steps", type=count, default=300)
    add("--sparsity", type=float, default=0.8)
    add("--update-every", type=positive, default=20, help="steps between mask updates")
    add("--stop-step", type=count, default=225, help="masks are fixed from there on")
    add("--lr", type=rate, default=2e-3)
    add("--seed", type=count, default=0)
    add("--batch-size", type=positive, default=8, help="rows, over all devices")
    add("--seq-len", type=positive, default=128)
    add("--d-model", type=positive, default=128)
    add("--num-layers", type=positive, default=4)
    add("--evaluate-every", type=positive, default=50, metavar="STEPS")
    add("--checkpoint-every", type=positive, default=100, metavar="STEPS")
    args = parser.parse_args(argv)
    plain = (args.coordinator, args.num_processes, args.process_id)
    if None in plain and any(value is not None for value in plain):
        parser.error(
            "--coordinator, --num-processes and --process-id go together; got "
            f"{args.coordinator}, {args.num_processes}, {args.process_id}"
        )
    return args


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"a rate is above 0 and finite; got {text}")
    return value


def count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more; got {text!r}")
    return int(text)


positive = functools.partial(count, least=1)


if __name__ == "__main__":
    main()

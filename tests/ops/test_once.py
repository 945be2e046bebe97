"""A second derivative of a kernel is an error that says what to do."""

import jax
import jax.numpy as jnp
import pytest

import sparsejax as sj

X = jnp.ones((16, 512), jnp.bfloat16)
Q = jnp.ones((1, 256, 2, 64), jnp.bfloat16)
KEPT = jnp.array([[True, False], [True, True]])
MASK = sj.BlockMask.from_blocks(KEPT, (128, 128))
OPERATIONS = {
    "topk": (sj.statistical_topk, (X, 8), {}),
    "glu": (sj.activations.statistical_glu, (X, X, 8), {}),
    "matmul": (
        sj.ops.block_matmul,
        (X[:, :256], jnp.ones((256, 256), X.dtype), MASK),
        {},
    ),
    "attention": (
        sj.ops.block_attention,
        (Q, Q, Q, sj.BlockMask.from_blocks(KEPT[None, None], (128, 128))),
        {"causal": True},
    ),
}


@pytest.mark.parametrize("kernel", ["pallas_tpu", "mosaic_gpu"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_second_derivative_is_named(name, kernel):
    fn, (x, *others), options = OPERATIONS[name]

    def loss(x):
        return jnp.sum(jnp.sin(fn(x, *others, implementation=kernel, **options)))

    def product(x):
        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x)))(x)

    platform = {"pallas_tpu": "tpu", "mosaic_gpu": "cuda"}[kernel]
    jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(x)
    with pytest.raises(NotImplementedError, match='implementation="reference"'):
        jax.export.export(jax.jit(product), platforms=[platform])(x)

"""Under `jax.shard_map` each device multiplies by its own blocks: nothing else changes.

Rows of x are sharded (data), columns of w (output features) and rows of w (the
contraction, summed over its axis), all at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax.ops import _platform
from sparsejax.ops.block_matmul import _gradients

BLOCK = (4, 2)
ROWS, BLOCK_ROWS, BLOCK_COLUMNS = 6, 4, 6


def as_a_kernel():
    """The products of a kernel in plain jnp, under the gradient that kernels share."""

    def masked(w, mask):
        return jnp.where(mask.to_dense(), w, 0)

    products = _gradients.Products(
        forward=lambda x, w, mask, bias, activation, dtype: x @ masked(w, mask),
        grad_x=lambda dy, w, mask: dy @ masked(w, mask).T,
        grad_w=lambda x, dy, mask, w: masked(x.T @ dy, mask),
    )
    run = _gradients.differentiable(products)
    kernel = _platform.Kernel(run, lambda *operands: None)

    def matmul(x, w, mask, *, full_dw):
        return _platform.dispatch(
            (x, w, mask, None, full_dw),
            "pallas_tpu",
            reference=run,
            kernels={"pallas_tpu": lambda: kernel},
        )

    return matmul


OPERATIONS = {"reference": sj.ops.block_matmul, "kernel": as_a_kernel()}


class ShardingTest(parameterized.TestCase):
    @parameterized.product(operation=list(OPERATIONS), full_dw=[False, True])
    def test_equals_the_unsharded(self, operation, full_dw):
        matmul = OPERATIONS[operation]
        rng = np.random.default_rng(0)
        kept = jnp.asarray(rng.random((BLOCK_ROWS, BLOCK_COLUMNS)) < 0.5)
        shape = (BLOCK_ROWS * BLOCK[0], BLOCK_COLUMNS * BLOCK[1])
        x, w, g = (
            jnp.asarray(rng.standard_normal(size), jnp.float32)
            for size in ((ROWS, shape[0]), shape, (ROWS, shape[1]))
        )

        def local(x, w, kept, full_dw):
            mask = sj.BlockMask.from_blocks(kept, BLOCK)
            return matmul(x, w, mask, full_dw=full_dw)

        def partial_sums(*operands):
            return jax.lax.psum(local(*operands), "contraction")

        names = ("data", "contraction", "columns")
        mapped = jax.shard_map(
            partial_sums,
            mesh=jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3),
            in_specs=(
                P("data", "contraction"),
                *[P("contraction", "columns")] * 2,
                P(),
            ),
            out_specs=P("data", "columns"),
        )

        @functools.partial(jax.jit, static_argnums=0)
        def value_and_gradients(fn, x, w):
            y, pullback = jax.vjp(lambda x, w: fn(x, w, kept, jnp.array(full_dw)), x, w)
            return y, *pullback(g)

        got = value_and_gradients(mapped, x, w)
        want = value_and_gradients(local, x, w)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        dropped = ~np.kron(kept, np.ones(BLOCK, bool))
        self.assertEqual(bool(got[2][dropped].any()), full_dw)

"""Models raced by the clock: sparse layers in scanned blocks, what is told of runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from benchmarks import scanned_decoder
from sparsejax import models
from sparsejax.typing import plain_path

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("compile_fast")]

TINY = {"vocab_size": 32, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24}
TINY |= {"num_kv_heads": 1, "head_dim": 8}


def test_scanned_blocks_read_the_masks_of_the_optimizer():
    ffn = functools.partial(sj.nn.BlockSparseFFN, block_shape=(8, 8))
    decoder, first = scanned_decoder.create(models.DecoderConfig(**TINY, ffn=ffn))
    dense, _ = scanned_decoder.create(models.DecoderConfig(**TINY))
    tx = sj.rigl(
        optax.sgd(0.1),
        0.5,
        update_every=2,
        stop_step=10,
        key=jax.random.key(0),
        pattern=sj.Block((8, 8)),
        stacked=scanned_decoder.stacked_axes,
        where=lambda path, leaf: plain_path(path)[-2] in ("gate", "up", "down"),
    )
    batch = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)
    weights = first(0)

    @functools.partial(jax.jit, static_argnums=0)
    def found(by_blocks, opt_state):
        def loss(weights):
            if by_blocks:
                masks = decoder.block_masks(weights, opt_state)
                return scanned_decoder.token_loss(decoder, rows=2)(
                    weights | {"masks": masks}, batch
                )
            weights = sj.forward_params(opt_state, weights)
            return scanned_decoder.token_loss(dense, rows=2)(weights, batch)

        return jax.value_and_grad(loss)(weights)

    opt_state = jax.jit(tx.init)(weights)
    grown, kept = (opt_state._replace(step=jnp.int32(step)) for step in (0, 1))
    want_loss, want = found(False, grown)
    for opt_state in (grown, kept):
        loss, grads = found(True, opt_state)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
        if opt_state is kept:  # between updates only kept blocks have a gradient
            want = sj.apply_masks(want, sj.masks_of(kept))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            grads,
            want,
        )

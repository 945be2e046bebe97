"""A batch that a mesh cuts, its axes explicit or not, and one of nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax as sj
from sparsejax import attention, nn, ops

HEADS, KV_HEADS, DIM = 4, 2, 8
BLOCKS = {"block_shape": (8, 8)}
LENGTHS = jnp.array([41, 14])  # of caches
rotate = functools.partial(nn.apply_rope, base=1e4)


def gate():
    key = jax.random.key(0)
    return attention.init_seer_gate(HEADS, KV_HEADS, DIM, d_gate=DIM, key=key)


def seer(q, k):
    scores = attention.seer_scores(gate(), q, k, block=8, rotate=rotate)
    return attention.seer_topk(scores, num_kept=2, block=8)


def pyramid(q, k):
    options = {**BLOCKS, "causal": True}
    ranks = attention.antidiagonal_importance(q, k, stride=4, **options)
    levels = attention.quota_levels(ranks)
    return attention.pyramid_attention(q, k, k, levels, **options)


def sampled(q, k):
    return attention.sampled_importance(q, k, random_key=jax.random.key(0), **BLOCKS)


def attended(q, k):
    """What is read by a mask that is cut as the batch is, and its gradients."""

    def of(q, k):
        mask = attention.topk_blocks(q, k, num_kept=3, causal=True, **BLOCKS)
        return ops.block_attention(q, k, k, mask & mask, causal=True)

    y, vjp = jax.vjp(of, q, k)
    return y, vjp(jnp.cos(y))


def lists_and_masks(q, k):
    del k
    kept = jnp.moveaxis(q[:, :16], 1, 2) > 0.5  # [batch, heads, 16, dim]
    mask = sj.BlockMask.from_blocks(kept, (2, 4))
    lists = attention.snapkv(q, q[:, :, :2], num_kept=9, window=4, local=2, sink=1)
    whole = mask.to_dense()
    again = sj.BlockMask.from_dense(whole, (2, 4))
    return mask, mask.T, mask.to_blocks(), whole, again, lists.to_mask(64)


def with_lists(q, k, lists):
    """What one query reads by them."""
    return lists, ops.listed_attention(q[:, :1], k, k, lists, length=LENGTHS)


def quest(q, k):
    bounds = attention.append_key(
        attention.page_bounds(k, lengths=LENGTHS - 1, page_size=8), k[:, :1]
    )
    return with_lists(q, k, attention.quest(q[:, :1], bounds, num_kept=3))


def double_sparsity(q, k, bits=4):
    channels = attention.select_channels(jnp.ones((KV_HEADS, 2, DIM)), num_channels=4)
    labels = attention.key_labels(k, channels, lengths=LENGTHS - 1, bits=bits)
    labels = attention.append_label(labels, k[:, :1])
    lists = attention.double_sparsity(q[:, :1], labels, num_kept=5)
    return with_lists(q, k, lists)


def seer_decode(q, k):
    key = jax.random.key(0)
    gate = attention.init_seer_decode_gate(HEADS, KV_HEADS, DIM, d_gate=DIM, key=key)
    lengths = jnp.array([40, 13])
    cache = attention.seer_cache(gate, k, block=8, rotate=rotate, lengths=lengths)
    cache = attention.append_to_seer_cache(gate, cache, k[:, :1], rotate=rotate)
    return attention.seer_cached_scores(gate, cache, q[:, :1], rotate=rotate)


CACHED = {
    "quest": quest,
    "double_sparsity": double_sparsity,
    "seer_decode": seer_decode,
}
CHOICES = {
    "topk_blocks": functools.partial(attention.topk_blocks, num_kept=3, **BLOCKS),
    "statistical": functools.partial(attention.statistical_topk_blocks, k=3, **BLOCKS),
    "block_sparse": functools.partial(attention.block_sparse, num_kept=3, **BLOCKS),
    "vertical_slash": functools.partial(
        attention.vertical_slash,
        num_vertical=6,
        num_slash=6,
        window=8,
        local=4,
        **BLOCKS,
    ),
    "flex_prefill": functools.partial(
        attention.flex_prefill, min_budget=6, window=8, local=4, sink=1, **BLOCKS
    ),
    "ada_snapkv": functools.partial(
        attention.ada_snapkv, num_kept=10, window=8, local=2, sink=1, pool_size=3
    ),
    "sparsed": functools.partial(attention.sparsed, num_generated=16, **BLOCKS),
    "seer": seer,
    "seer_target": functools.partial(attention.seer_target, block=8),
    "seer_decode_target": functools.partial(attention.seer_decode_target, block=8),
    "pyramid": pyramid,
    "sampled": sampled,
    "attended": attended,
    "formats": lists_and_masks,
}


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_sharded_batch(choice, axis_type):
    keys = jax.random.split(jax.random.key(0))
    shapes = (2, 64, HEADS, DIM), (2, 64, KV_HEADS, DIM)
    q, k = map(jax.random.normal, keys, shapes)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    there = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (q, k)]
    choose = jax.jit(CHOICES[choice])
    chex.assert_trees_all_close(choose(*there), choose(q, k), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", CACHED)
def test_a_sharded_cache(choice):
    """Of a mesh of explicit axes, which such code is to be told of."""
    keys = jax.random.split(jax.random.key(0))
    shapes = (2, 64, HEADS, DIM), (2, 64, KV_HEADS, DIM)
    q, k = map(jax.random.normal, keys, shapes)
    want = jax.jit(CACHED[choice])(q, k)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        there = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (q, k)]
        got = jax.jit(CACHED[choice])(*there)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
def test_an_empty_batch(choice):
    q, k = (jnp.zeros((0, 64, heads, DIM)) for heads in (HEADS, KV_HEADS))
    for leaf in jax.tree.leaves(jax.eval_shape(CHOICES[choice], q, k)):
        assert leaf.shape[0] == 0

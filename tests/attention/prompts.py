"""Prompts for selectors, and what their last queries attend to, in slow NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj

HEADS, KV_HEADS, DIM = 4, 2, 8
GROUP = HEADS // KV_HEADS

blocks_of = jax.jit(sj.BlockMask.to_blocks)


def prompt(length, batch=2, seed=0):
    """Queries and keys, float32, with a few keys that most queries like."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(batch, length, HEADS, DIM)) + 0.5
    key = rng.normal(size=(batch, length, KV_HEADS, DIM))
    key[:, rng.choice(length, length // 8, replace=False)] += 0.7
    return jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32)


def weights_oracle(query, key, window):
    """One query at a time, float64: `[batch, heads, window, keys]`."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    length = key.shape[1]
    weights = np.zeros((len(query), HEADS, window, length))
    for b, h, i in np.ndindex(weights.shape[:3]):
        at = length - window + i
        scores = key[b, : at + 1, h // GROUP] @ query[b, i - window, h] / np.sqrt(DIM)
        powers = np.exp(scores - scores.max())
        weights[b, h, i, : at + 1] = powers / powers.sum()
    return weights


def line_sums_oracle(weights):
    """Sums of one head's weights by key, and by distance from query to key."""
    window, length = weights.shape
    vertical, slash = np.zeros((2, length))
    for i, j in np.ndindex(window, length):
        vertical[j] += weights[i, j]
        distance = length - window + i - j
        if distance >= 0:
            slash[distance] += weights[i, j]
    return vertical, slash


def highest_oracle(scores, num_kept, always=()):
    """The kept indices as a set: `always`, then by score, then by index."""
    order = sorted(range(len(scores)), key=lambda j: (j not in always, -scores[j], j))
    return set(order[:num_kept])


def lines_oracle(columns, offsets, length, block_shape):
    """The blocks that hold a kept pair, pair by pair."""
    (height, width), pairs = block_shape, np.zeros((length, length), bool)
    for t in range(length):
        for j in range(t + 1):
            pairs[t, j] = j in columns or t - j in offsets
    kept = np.zeros((-(-length // height), -(-length // width)), bool)
    for t, j in np.argwhere(pairs):
        kept[t // height, j // width] = True
    return kept


def pair_density_oracle(kept, length, block_shape):
    """Pairs in sight in kept blocks, of all pairs in sight."""
    height, width = block_shape
    pairs = [(t, j) for t in range(length) for j in range(t + 1)]
    return np.mean([kept[t // height, j // width] for t, j in pairs])


def assert_filler_has_no_part(select, lengths, length):
    """Each prompt has the blocks that it has alone: `select(query, key, lengths=)`."""
    query, key = prompt(length, batch=len(lengths))
    filler = np.arange(length) >= np.array(lengths)[:, None]
    query, key = (jnp.where(filler[..., None, None], 9.0, x) for x in (query, key))
    got = np.asarray(blocks_of(select(query, key, lengths=jnp.array(lengths))))
    for b, n in enumerate(lengths):
        alone = blocks_of(select(query[b : b + 1, :n], key[b : b + 1, :n]))
        rows, columns = alone.shape[2:]
        np.testing.assert_array_equal(got[b, :, :rows, :columns], alone[0])


def assert_same_under_vmap(got, of_vmap):
    """Each leaf equals the one found under a `vmap` over one more axis, of size 1."""
    for leaf, other in zip(*map(jax.tree.leaves, (got, of_vmap)), strict=True):
        np.testing.assert_array_equal(leaf, other[0])

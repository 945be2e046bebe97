"""SparseD: blocks chosen once while a diffusion language model denoises, then reused.

Every step attends over the same sequence, in both directions, and from step to step the
maps hardly differ; between heads they do. The first steps decide most and stay dense.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.attention._arguments import check_square
from sparsejax.attention._ranking import keep_allowed
from sparsejax.attention._spark import scaled_scores
from sparsejax.formats import BlockMask

State = TypeVar("State")


def sparsed(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    *,
    num_generated: int,
    density: float = 0.3,
    block_shape: tuple[int, int] = (128, 128),
    isolated: bool = True,
    valid: Bool[Array, "batch seq"] | None = None,
) -> BlockMask:
    """Keeps the blocks of highest mean attention weight, head by head.

    Blocks of the prompt and of what is generated are chosen apart, so that neither
    crowds the other out. Of `p` and `g` blocks of keys, of which those of the
    generation begin at or after it, or are the last, each block of queries keeps

    - `ceil(density * p)` of the prompt; not `isolated`, those of the best
      `int(density * (p + g)) + 1` of all that lie in the prompt, as the released code
      does: fewer, where the generation takes the weight;
    - `int(density * g) + 1` of the generation, at most `g`, by weights of a softmax
      over its keys alone.

    The weights are computed a block of queries at a time, all heads together.

    Args:
      query: rotated queries, of prompt and generation; query head `i` uses key head
        `i // (heads / kv_heads)`.
      key: rotated keys of the same positions.
      num_generated: last positions, those that are generated, in `[1, seq]`.
      density: share of the blocks to keep, in (0, 1]. The paper has 0.3 for long
        prompts, and 0.5 with blocks of 32 for short ones.
      block_shape: `(height, width)`, queries and keys of a block.
      isolated: choose the prompt's blocks among themselves. If not, they are those of
        the released code, which also takes the mean over a ragged last block as if it
        were whole, and not over the keys that it has.
      valid: False where there is padding: as a key it gets no weight, as a query it has
        no say, and a block of nothing else is not kept. All by default.

    Returns:
      A mask `[batch, heads, seq, seq]`, rounded up to whole blocks, for attention that
      is not causal. Padding is left in kept blocks: tell the attention of it, by
      `segment_ids` say. No gradient.

    Raises:
      TypeError: if `isolated` is no bool.
      ValueError: if shapes disagree or an argument is out of range.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
      >>> mask = sj.attention.sparsed(
      ...     x, x, num_generated=16, density=0.3, block_shape=(8, 8)
      ... )
      >>> print(mask.num[0, 0], mask.indices[0, 0, 0, :3])
      [3 3 3 3 3 3 3 3] [0 2 6]

    References:
      Wang et al., 2025, https://arxiv.org/abs/2509.24014, and the code released with
      it, which for one of its models divides by the root of the number of heads; here
      it is always that of `head_dim`. `isolated` is ours.
    """
    _check(query, key, num_generated, density, block_shape, isolated, valid)
    valid = jnp.ones(key.shape[:2], jnp.bool_) if valid is None else valid
    query, key = jax.lax.stop_gradient((query, key))
    kept = _kept(query, key, valid, num_generated, density, block_shape, isolated)
    return BlockMask.from_blocks(kept, block_shape)


# jitted: a loop that is called eagerly is compiled each time
@jax.jit(static_argnums=(3, 4, 5, 6))
def _kept(query, key, valid, num_generated, density, block_shape, isolated):
    """Which blocks; arguments as of `sparsed`."""
    (height, width), seq = block_shape, key.shape[1]
    columns = math.ceil(seq / width)
    # blocks of the prompt, and of the generation
    before = min(math.ceil((seq - num_generated) / width), columns - 1)
    after = columns - before
    in_prompt = jnp.arange(seq) < before * width

    there = _sums(valid, width)  # keys of each block, [batch, columns]
    size = there if isolated else jnp.full_like(there, width)

    def importance(scores, asking, among):
        """The mean weight of each block in a softmax over the keys `among` alone."""
        seen = (valid & among[None])[:, None, None, None]
        top = jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=-1e30)
        powers = jnp.where(seen, jnp.exp(scores - top), 0)
        total = jnp.sum(powers, axis=-1, keepdims=True)
        weights = powers / jnp.where(total > 0, total, 1)
        weights = jnp.where(asking[:, None, None, :, None], weights, 0).sum(axis=3)
        counts = jnp.maximum(size, 1).astype(jnp.float32)[:, None, None]
        means = _sums(weights, width) / counts
        means = jnp.where(there[:, None, None] > 0, means, -jnp.inf)
        batch, kv_heads, group, _ = means.shape
        return means.reshape(batch, kv_heads * group, columns)

    def row(of_row):
        queries, asking = of_row
        scores = scaled_scores(queries, key)
        of_all = importance(scores, asking, jnp.ones_like(in_prompt))
        if isolated:
            # the nearest whole number, if the product only misses it by rounding
            best = _best(of_all[..., :before], math.ceil(density * before - 1e-9))
        else:
            best = _best(of_all, int(density * columns) + 1)[..., :before]
        of_generation = importance(scores, asking, ~in_prompt)[..., before:]
        best_generated = _best(of_generation, int(density * after) + 1)
        return jnp.concatenate([best, best_generated], axis=-1)

    rows = _tiles(query, height), _tiles(valid, height)
    return jnp.moveaxis(jax.lax.map(row, rows), 0, 2)


def sparsed_dense_steps(num_steps: int, *, skip: float = 0.2) -> int:
    """Counts the first steps of SparseD that attend to all.

    Steps 0 to `int(num_steps * skip) + 1`, and in the last of them the blocks are
    chosen: two more than the share says.

    Args:
      num_steps: of the whole denoising.
      skip: share of the steps, in [0, 1].

    Returns:
      At most `num_steps`; then no step is sparse.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> sj.attention.sparsed_dense_steps(128)
      27
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
    if not 0 <= skip <= 1:
        raise ValueError(f"`skip` must be in [0, 1]; got {skip}.")
    return min(int(num_steps * skip) + 2, num_steps)


def sparsed_denoise(
    dense: Callable[[jax.Array, State], State],
    build: Callable[[jax.Array, State], tuple[State, Any]],
    sparse: Callable[[jax.Array, State, Any], State],
    state: State,
    *,
    num_steps: int,
    skip: float = 0.2,
) -> State:
    """Runs the steps of a sampler: dense, one that chooses blocks, then sparse.

    Two loops, since it is known beforehand when the blocks are chosen: nothing dense
    is compiled into the sparse one.

    Args:
      dense: a step `(step, state) -> state` that attends to all.
      build: likewise, and returns the masks of all layers too, of `sparsed` say, as any
        pytree; the last dense step.
      sparse: a step `(step, state, masks) -> state`.
      state: what a step changes: tokens, random keys. Any pytree.
      num_steps: of the whole denoising.
      skip: see `sparsed_dense_steps`.

    Returns:
      The state after all steps. Where none is sparse, `build` is not called.

    Raises:
      ValueError: as `sparsed_dense_steps`.

    Example:
      >>> steps = sj.attention.sparsed_denoise(
      ...     lambda step, log: log.at[step].set(0),
      ...     lambda step, log: (log.at[step].set(1), step),
      ...     lambda step, log, built: log.at[step].set(10 + built),
      ...     jnp.zeros(10, jnp.int32),
      ...     num_steps=10,
      ... )
      >>> print(steps)
      [ 0  0  0  1 13 13 13 13 13 13]

    References:
      See `sparsed`.
    """
    num_dense = sparsed_dense_steps(num_steps, skip=skip)
    if num_dense == num_steps:
        return jax.lax.fori_loop(0, num_steps, dense, state)
    state = jax.lax.fori_loop(0, num_dense - 1, dense, state)
    state, masks = build(jnp.int32(num_dense - 1), state)
    return jax.lax.fori_loop(
        num_dense, num_steps, lambda step, state: sparse(step, state, masks), state
    )


def _tiles(x: jax.Array, size: int) -> jax.Array:
    """Blocks of axis 1, the last filled up by zeros, along a new first axis."""
    batch, seq, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -seq % size)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(batch, -(-seq // size), size, *rest), 1, 0)


def _sums(x: jax.Array, width: int) -> jax.Array:
    """Sums over blocks of the last axis, the last of which may be ragged."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % width)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // width, width).sum(axis=-1)


def _best(scores: jax.Array, num_kept: int) -> jax.Array:
    """True at the `num_kept` highest, as far as there are so many that may be kept."""
    num_kept = min(num_kept, scores.shape[-1])
    if num_kept == 0:
        return jnp.zeros(scores.shape, jnp.bool_)
    return keep_allowed(scores, num_kept)


def _check(query, key, num_generated, density, block_shape, isolated, valid) -> None:
    check_square(query, key, block_shape)
    seq = key.shape[1]
    if not 1 <= num_generated <= seq:
        raise ValueError(
            f"`num_generated` must be in [1, {seq}], the positions that there are; got "
            f"{num_generated}."
        )
    if not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1]; got {density}.")
    if not isinstance(isolated, bool):
        raise TypeError(f"`isolated` must be a bool; got {isolated!r}.")
    if valid is not None and (valid.shape != key.shape[:2] or valid.dtype != jnp.bool_):
        raise ValueError(
            f"`valid` must be bool {key.shape[:2]}, one a position; got "
            f"{jax.typeof(valid)}."
        )

"""The N:M mask: each group of `m` neighbours keeps its `n` highest scores."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparsejax.masks._check import check_floating, check_scores
from sparsejax.patterns import NM


def nm_mask(
    scores: Float[Array, "*shape"], n: int, m: int, axis: int = -2
) -> Bool[Array, "*shape"]:
    """Keeps the `n` highest scores of every `m` neighbours along `axis`.

    Exactly `n` are kept in each group, also under ties: the lower index wins.

    Args:
      scores: importance of each weight, any float dtype; higher is kept. Under jit NaN
        ranks lowest, with -inf. Subnormals tie with 0 where the device flushes them.
      n: kept in a group, `0 < n <= m`.
      m: size of a group; must divide the axis.
      axis: along which the neighbours lie.

    Returns:
      A mask of `scores.shape`; True = kept.

    Raises:
      ValueError: if `n`, `m` or `axis` is out of range, `m` does not divide the axis,
        or a concrete score is NaN.
      TypeError: if the scores are not floating, or `n`, `m` or `axis` is no whole
        number.

    Example:
      >>> nm_mask(jnp.array([1.0, 1.0, 3.0, 0.0]), 2, 4, axis=0)
      Array([ True, False,  True, False], dtype=bool)

    References:
      Zhou et al., 2021, https://arxiv.org/abs/2102.04010, section 3.1. The released
      code leaves ties to the order of a sort; here the lower index wins.
    """
    scores = jnp.asarray(scores)
    NM(n, m, axis)  # checks them
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(
            f"`axis` must be an axis of the scores; got {axis} for shape "
            f"{scores.shape}."
        )
    if scores.shape[axis] % m:
        raise ValueError(
            f"`m` must divide the pruned axis; got m={m} for axis {axis} of shape "
            f"{scores.shape}. Pad it or choose another axis."
        )
    check_floating(scores)
    check_scores(scores)
    return nm_select(scores, n, n, m, axis)


def nm_select(
    scores: jax.Array,
    num_kept: ArrayLike,
    most_kept: int,
    m: int,
    axis: int,
    among: jax.Array | None = None,
) -> jax.Array:
    """Keeps the `num_kept` highest scores of each group.

    Args:
      scores: float; NaN ranks lowest.
      num_kept: int, or int32 with one entry a group: the shape of `scores`, `axis`
        divided by `m`.
      most_kept: static upper bound of `num_kept`.
      m: size of a group.
      axis: along which the neighbours lie.
      among: bool like `scores`; False entries are never kept. At least `num_kept`
        entries of each group must be True.

    Returns:
      A mask of the same shape.
    """
    axis %= scores.ndim
    shape = scores.shape
    if scores.dtype.itemsize == 1:
        # most 8-bit floats have no -inf; bfloat16 has it, and all their values
        scores = scores.astype(jnp.bfloat16)
    # floats compare faster than their bits: NaN and -inf become the lowest number,
    # which leaves -inf for what must not be chosen
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.where(scores >= lowest, scores, lowest)
    if among is not None:
        scores = jnp.where(among, scores, -jnp.inf)
    groups = scores.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
    if m <= 8 or (m <= 16 and min(most_kept, m - most_kept) > 1):
        mask = _by_rank(groups, num_kept, axis + 1)
    else:
        mask = _by_extraction(groups, num_kept, most_kept, axis + 1)
    return mask.reshape(shape)


def _by_rank(groups: jax.Array, num_kept: ArrayLike, axis: int) -> jax.Array:
    """Counts, for each member, the members that beat it: m(m-1)/2 comparisons."""
    members = [
        jax.lax.index_in_dim(groups, i, axis, keepdims=False)
        for i in range(groups.shape[axis])
    ]
    ranks = [jnp.zeros(members[0].shape, jnp.int8) for _ in members]
    for i, first in enumerate(members):
        for j in range(i + 1, len(members)):
            later_wins = (members[j] > first).astype(jnp.int8)  # a tie: the earlier
            ranks[i] += later_wins
            ranks[j] += 1 - later_wins
    num_kept = jnp.asarray(num_kept, jnp.int8)  # at most as many as members
    return jnp.stack([rank < num_kept for rank in ranks], axis)


def _by_extraction(
    groups: jax.Array, num_kept: ArrayLike, most_kept: int, axis: int
) -> jax.Array:
    """Takes out the highest (or lowest) member of each group, again and again.

    The cheaper side is taken out: the kept ones, or the dropped ones.
    """
    m = groups.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, groups.shape, axis)
    drops = isinstance(num_kept, int) and 2 * num_kept > m
    wanted = m - num_kept if drops else num_kept
    if drops:  # the lowest, of equal ones the last, is the highest of the mirror image
        highest = jnp.finfo(groups.dtype).max
        groups = jnp.flip(-jnp.minimum(groups, highest), axis)

    def take_one(i, state):
        groups, taken = state
        best = index == jnp.expand_dims(_first_argmax(groups, axis), axis)
        if not isinstance(wanted, int):
            best &= jnp.expand_dims(i < wanted, axis)
        return jnp.where(best, -jnp.inf, groups), taken | best

    rounds = wanted if isinstance(wanted, int) else most_kept
    taken = jnp.zeros_like(groups, jnp.bool_)
    if rounds == 1:  # no loop: its carried arrays would double the memory traffic
        _, taken = take_one(0, (groups, taken))
    else:
        _, taken = jax.lax.fori_loop(0, rounds, take_one, (groups, taken))
    return jnp.flip(~taken, axis) if drops else taken


def _first_argmax(scores: jax.Array, axis: int) -> jax.Array:
    """Index of the largest entry along `axis`, the lowest under ties.

    XLA reduces up to 16 entries an order of magnitude faster than longer axes, so a
    longer one is halved first: winners of the halves, then the better winner.
    """
    size = scores.shape[axis]
    if size <= 16 or size % 2:
        return jnp.argmax(scores, axis).astype(jnp.int32)
    halves = scores.reshape(
        *scores.shape[:axis], 2, size // 2, *scores.shape[axis + 1 :]
    )
    low, high = (jax.lax.index_in_dim(halves, i, axis, keepdims=False) for i in (0, 1))
    low_index, high_index = _first_argmax(low, axis), _first_argmax(high, axis)
    high_wins = high.max(axis) > low.max(axis)
    return jnp.where(high_wins, high_index + size // 2, low_index)

"""The exact top-k of one array, of each layer of a stack, or of a whole tree.

No sort: the k-th largest key is found digit by digit, counting the keys above each
candidate. Each pass reads the scores once and reduces them to a few counts, so the
cost is memory traffic, a sharded leaf is never gathered, and `k` may be traced.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparsejax._promotion import common_dtype, to_rank
from sparsejax.masks._check import check_floating, check_scores
from sparsejax.masks._order import ordered_keys
from sparsejax.typing import MaskTree, ScoreTree


def topk_mask(
    scores: Float[Array, "*shape"], num_kept: ArrayLike
) -> Bool[Array, "*shape"]:
    """Keeps the `num_kept` highest scores.

    Exactly `num_kept` entries are kept, also under ties: of equal scores the one with
    the lower flat index wins. A traced `num_kept` lets a schedule run without
    recompiling.

    Args:
      scores: importance of each weight, any float dtype; higher is kept. Under jit NaN
        ranks below every number.
      num_kept: number of entries to keep, in `[0, scores.size]`.

    Returns:
      A mask of `scores.shape`; True = kept.

    Raises:
      ValueError: if a concrete `num_kept` lies outside its range, or a concrete score
        is NaN.
      TypeError: if the scores are not floating, or `num_kept` is no whole number.

    Example:
      >>> topk_mask(jnp.array([0.1, 3.0, 2.0]), 2)
      Array([False,  True,  True], dtype=bool)

    References:
      Han et al., 2015, https://arxiv.org/abs/1506.02626, section 3.
    """
    scores = jnp.asarray(scores)
    check_scores(scores)
    _check_count(num_kept, scores.size)
    return topk_of_keys([ordered_keys(scores)], num_kept, stacked=0)[0]


def global_topk(scores: ScoreTree, num_kept: ArrayLike) -> MaskTree:
    """Keeps the `num_kept` highest scores of a whole tree, ranked across its leaves.

    Args:
      scores: float arrays, higher is kept; None leaves stay None. Under jit
        NaN ranks lowest.
      num_kept: number of entries to keep in all, in `[0, total size]`.

    Returns:
      A tree of masks, exactly `num_kept` True in all. Of equal scores the one in the
      earlier leaf wins, then the one with the lower flat index.

    Raises:
      ValueError: if a concrete `num_kept` lies outside its range, a concrete score is
        NaN, or the tree has 2**31 entries or more (int32 counts).
      TypeError: if scores are not floating, or `num_kept` is no whole number.

    Example:
      >>> global_topk({"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 2.0])}, 2)
      {'a': Array([False,  True], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """
    check_scores(scores)
    for path, leaf in jax.tree_util.tree_flatten_with_path(scores)[0]:
        check_floating(leaf, at=jax.tree_util.keystr(path))
    leaves, treedef = jax.tree.flatten(scores)
    _check_count(num_kept, sum(leaf.size for leaf in leaves))
    if not leaves:
        return scores
    dtype = common_dtype(*(leaf.dtype for leaf in leaves))
    keys = [ordered_keys(leaf.astype(dtype)) for leaf in leaves]
    return treedef.unflatten(topk_of_keys(keys, num_kept, stacked=0))


def _check_count(num_kept: ArrayLike, size: int) -> None:
    is_whole = jnp.issubdtype(jnp.result_type(num_kept), jnp.integer)
    if not is_whole or jnp.ndim(num_kept):
        raise TypeError(
            f"`num_kept` must be one whole number; got {num_kept!r}. Of a share of the "
            f"{size} entries, take `round(share * {size})`."
        )
    if isinstance(num_kept, Tracer):
        return
    if not 0 <= int(num_kept) <= size:  # pyright: ignore[reportArgumentType] - real
        raise ValueError(
            f"`num_kept` must be in [0, {size}], the number of entries; got {num_kept}."
        )


def topk_of_keys(
    keys: Sequence[jax.Array], num_kept: ArrayLike, *, stacked: int
) -> list[jax.Array]:
    """Ranks several arrays together and keeps the `num_kept` largest keys.

    Args:
      keys: unsigned integers of one dtype from `ordered_keys`, at least one array.
      num_kept: int32, a scalar or of the shape of the stacked axes.
      stacked: leading axes, equal for all arrays, that are ranked each on its own.

    Returns:
      Masks of the same shapes, with exactly `num_kept` True for each stacked index.

    Raises:
      ValueError: if a ranking has 2**31 entries or more: counts are int32.
    """
    size = sum(math.prod(key.shape[stacked:]) for key in keys)
    if size >= 2**31:
        raise ValueError(
            f"one ranking must have fewer than 2**31 entries; got {size}. Rank leaf by "
            "leaf, or mark the axes of stacked layers as `stacked`."
        )
    return _top(list(keys), num_kept, stacked=stacked)


# Searches for three platforms are much to trace: done once for arrays of equal shape.
@jax.jit(static_argnames="stacked")
def _top(
    keys: list[jax.Array], num_kept: ArrayLike, *, stacked: int
) -> list[jax.Array]:
    """As `topk_of_keys`."""
    own_axes = tuple(range(stacked, keys[0].ndim))
    zero = jnp.sum(jnp.zeros_like(keys[0], jnp.int32), axis=own_axes)
    # a sum, not a broadcast: sharded as the layers are
    num_kept = zero + jnp.asarray(num_kept, jnp.int32)
    if all(key.size == 0 for key in keys):
        return [jnp.zeros(key.shape, jnp.bool_) for key in keys]
    search = functools.partial(_search, stacked=stacked)
    return jax.lax.platform_dependent(
        keys,
        num_kept,
        # a CPU pass costs its work, and XLA vectorizes two plain reductions better
        cpu=functools.partial(search, bits_per_pass=1, unroll=1, two_stage=True),
        # a GPU pass costs a launch, so it settles three bits, and a loop would wait for
        # the host on each
        cuda=functools.partial(search, bits_per_pass=3, unroll=True),
        # one number a layer travels between devices
        default=functools.partial(search, bits_per_pass=1, unroll=1),
    )


def _search(
    keys: list[jax.Array],
    num_kept: jax.Array,
    *,
    stacked: int,
    bits_per_pass: int,
    unroll: int | bool,
    two_stage: bool = False,
) -> list[jax.Array]:
    """Finds the `num_kept`-th largest key, then the index that splits its ties."""
    count = functools.partial(_count, stacked=stacked, two_stage=two_stage)
    largest = functools.partial(_largest, bits_per_pass=bits_per_pass, unroll=unroll)

    def count_all(compare, values):
        return sum(
            (count(compare(key[..., None], _spread(values, key.ndim))) for key in keys),
            jnp.zeros_like(values, jnp.int32),
        )

    threshold = largest(
        lambda values: count_all(jnp.greater_equal, values) >= num_kept[..., None],
        jnp.zeros_like(num_kept, keys[0].dtype),
        num_bits=keys[0].dtype.itemsize * 8,
    )
    wanted = num_kept - count_all(jnp.greater, threshold[..., None])[..., 0]
    masks = []
    for key in keys:  # ties: the earlier array first, in it the lower flat index
        bound = _spread(threshold[..., None], key.ndim)[..., 0]
        num_tied = count((key == bound)[..., None])[..., 0]
        here = jnp.minimum(wanted, num_tied)
        wanted = wanted - here

        def lowest(key, bound, here):
            tied, index = key == bound, _flat_index(key.shape, stacked)

            def few_enough(ends):
                before = index[..., None] < _spread(ends, key.ndim)
                return count(tied[..., None] & before) <= here[..., None]

            layer_size = math.prod(key.shape[stacked:])
            end = largest(
                few_enough,
                jnp.zeros_like(here, jnp.uint32),
                num_bits=layer_size.bit_length(),
            )
            return tied & (index < _spread(end[..., None], key.ndim)[..., 0])

        first = jax.lax.cond(
            jnp.any(here < num_tied),
            lowest,
            lambda key, bound, here: key == bound,
            *(key, bound, here),
        )
        masks.append((key > bound) | first)
    return masks


def _largest(
    feasible: Callable[[jax.Array], jax.Array],
    zero: jax.Array,
    *,
    num_bits: int,
    bits_per_pass: int,
    unroll: int | bool,
) -> jax.Array:
    """The largest unsigned value that is feasible; 0 is, and smaller ones with it.

    Args:
      feasible: says it of several candidates, which lie along the last axis.
      zero: 0 for each search that runs side by side.
      num_bits: no larger value is considered.
      bits_per_pass: bits settled at a time, by `2**bits_per_pass - 1` candidates.
      unroll: as in `jax.lax.fori_loop`.
    """
    num_passes = -(-num_bits // bits_per_pass)
    digits = jnp.arange(1, 2**bits_per_pass).astype(zero.dtype)

    def one_pass(i, value):
        shift = jnp.asarray((num_passes - 1 - i) * bits_per_pass).astype(zero.dtype)
        added = digits << shift
        fits = (added >> shift) == digits  # the first pass may have fewer bits
        ndim = value.ndim + 1
        good = feasible(value[..., None] | to_rank(added, ndim)) & to_rank(fits, ndim)
        digit = jnp.sum(good, axis=-1, dtype=zero.dtype)
        return value | (digit << shift)

    return jax.lax.fori_loop(0, num_passes, one_pass, zero, unroll=unroll)


def _count(true: jax.Array, *, stacked: int, two_stage: bool) -> jax.Array:
    """Counts True entries of each stacked index, for each candidate (last axis)."""
    if two_stage and true.ndim - stacked > 2:
        # two plain reductions: XLA vectorizes and threads the first one on a CPU
        partial = jnp.sum(true, axis=stacked, dtype=jnp.int32)
        true = jax.lax.optimization_barrier(partial)
    axes = tuple(range(stacked, true.ndim - 1))
    # one reduction for all candidates: each entry is read once
    counts = jax.lax.reduce(
        tuple(true[..., i].astype(jnp.int32) for i in range(true.shape[-1])),
        (jnp.int32(0),) * true.shape[-1],
        lambda a, b: tuple(map(jnp.add, a, b)),
        axes,
    )
    return jnp.stack(counts, axis=-1)


def _spread(values: jax.Array, ndim: int) -> jax.Array:
    """Inserts axes of size 1 before the last, to stand beside `ndim` axes and it."""
    *lead, candidates = values.shape
    return values.reshape(*lead, *(1,) * (ndim - len(lead)), candidates)


def _flat_index(shape: tuple[int, ...], stacked: int) -> jax.Array:
    """Row-major index within each stacked layer, built without a reshape."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(stacked, len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return index

"""From flags to a list of indices, without a sort and without a scatter.

The flags are packed into words of 32. Counts of words, summed up, tell by a search
which word holds the j-th active neuron; counts inside the word tell which bit it is.
Everything is elementwise or a small reduction. On a GPU it is a matter of how many
programs that takes, as each waits for the one before: here four.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparsejax._bits import WORD, bit_of_rank, count_bits, to_words
from sparsejax._ints import check_int
from sparsejax._pairs import count_if_few

_ROUNDS = 3  # of the search for a word


def active_indices(
    active: Bool[Array, " d_ff"], capacity: int
) -> tuple[Int[Array, " capacity"], Int[Array, ""], Bool[Array, ""]]:
    """Lists the active neurons, for `active_ffn`.

    For a batch, pass the union: `jnp.any(active, axis=0)`. The list has a static
    length, so that it works under jit; the cost is O(d_ff + capacity log d_ff).

    Args:
      active: True = the neuron takes part.
      capacity: length of the list, at least 1. The statistical top-k keeps about k
        neurons, so a quarter more than k is rarely exceeded at batch 1.

    Returns:
      `indices`, int32: the active neurons, ascending, then the last of them repeated
      (0 if there is none). `num_active`, int32: how many are listed, at most
      `capacity`. `overflowed`: True if there are more; the highest are then missing,
      and the caller must use a dense FFN or a larger capacity.

    Raises:
      TypeError: if `active` is not bool, or `capacity` is not an int.
      ValueError: if `active` has not one axis, or `capacity` is less than 1.

    Example:
      >>> active_indices(jnp.array([False, True, False, True]), capacity=3)
      (Array([1, 3, 3], dtype=int32), Array(2, dtype=int32), Array(False, dtype=bool))
    """
    active = jnp.asarray(active)
    _check(active, capacity)
    words, before = _pack(active)
    total = before[-1]
    slots = jnp.minimum(jnp.arange(capacity, dtype=jnp.int32), total - 1)

    word = _first_above(before[1:], slots)
    indices = WORD * word + bit_of_rank(words[word], slots - before[word])
    listed = total if capacity >= active.size else jnp.minimum(total, capacity)
    return indices, listed, total > capacity


def _check(active, capacity) -> None:
    if active.dtype != jnp.bool_:
        raise TypeError(
            f"`active` must be bool; got {jax.typeof(active)}. Compare: `gate > 0`."
        )
    if active.ndim != 1 or not active.size:
        raise ValueError(
            "`active` must have one axis, the neurons, and not be empty; got shape "
            f"{active.shape}. For a batch take `jnp.any(active, axis=0)`."
        )
    check_int("capacity", capacity, least=1, hint="It is a static length.")


def _pack(active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Words of flags, lowest bit first; the number set before each, and in all."""
    words = to_words(active)
    counts = count_bits(words)
    before = count_if_few(
        counts,
        counts.size**2,
        count=_sums,
        otherwise=lambda counts: jnp.cumsum(jnp.pad(counts, (1, 0))),
    )
    return words, before


def _sums(counts: jax.Array) -> jax.Array:
    """Sums of the first 0, 1, ..., all of the counts, as one reduction."""
    n = jnp.arange(counts.size + 1)
    counted = jnp.where(n[None, :-1] < n[:, None], counts, 0)
    return jnp.sum(counted, axis=1, dtype=counts.dtype)


def _first_above(ends: jax.Array, slots: jax.Array) -> jax.Array:
    """For each slot the first position whose end exceeds it.

    A round finds the part of the part before, of `radix` of them, by comparing with
    the ends of all. The radix is odd: sums over as many numbers as divide a warp are
    programs of their own on a GPU, others become loops within what surrounds them.
    """
    radix = 1
    while radix**_ROUNDS < ends.size:
        radix += 2
    padding = (0, radix**_ROUNDS - ends.size)
    ends = jnp.pad(ends, padding, constant_values=jnp.iinfo(jnp.int32).max)
    position = jnp.zeros_like(slots)
    for i in reversed(range(_ROUNDS)):
        of_parts = ends[radix**i - 1 :: radix**i].reshape(-1, radix)
        passed = of_parts[position] <= slots[:, None]
        position = radix * position + jnp.sum(passed, axis=1, dtype=jnp.int32)
    return position

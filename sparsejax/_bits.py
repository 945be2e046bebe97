"""Flags packed into words, and the search for a flag within a word.

Every room may import this module; it imports none of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

WORD = 32  # flags in a word


def to_words(flags: Bool[Array, "*lead n"]) -> UInt32[Array, "*lead words"]:
    """Packs flags, lowest bit first; the last word is filled up by False.

    Example:
      >>> to_words(jnp.array([True, False, True]))
      Array([5], dtype=uint32)
    """
    padding = [(0, 0)] * (flags.ndim - 1) + [(0, -flags.shape[-1] % WORD)]
    num = -(-flags.shape[-1] // WORD)
    bits = jnp.pad(flags, padding).reshape(*flags.shape[:-1], num, WORD)
    values = jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.sum(jnp.where(bits, values, 0), axis=-1, dtype=jnp.uint32)


def count_bits(words: UInt32[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Counts the flags that are set in each word, int32."""
    return jax.lax.population_count(words).astype(jnp.int32)


def bit_of_rank(
    words: UInt32[Array, "*shape"], rank: Int[Array, "*shape"]
) -> Int[Array, "*shape"]:
    """Finds in each word the flag that has `rank` set ones below it.

    Elementwise, so that it fuses into what it feeds. A negative rank gives 0.

    Example:
      >>> print(bit_of_rank(jnp.uint32(0b10100), jnp.int32(1)))
      4
    """
    position = jnp.zeros_like(rank)
    half = WORD // 2
    while half:
        lower = count_bits(words & jnp.uint32(2**half - 1))
        higher = rank >= lower
        position += jnp.where(higher, half, 0)
        rank -= jnp.where(higher, lower, 0)
        words = jnp.where(higher, words >> half, words)
        half //= 2
    return position

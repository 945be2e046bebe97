"""Packed flags against NumPy's."""

import jax
import numpy as np
import pytest

from sparsejax._bits import bit_of_rank, count_bits, to_words


@pytest.mark.parametrize("shape", [(1,), (2, 31), (3, 32), (2, 2, 70)])
def test_words_and_their_bits(shape):
    flags = np.random.default_rng(0).random(shape) < 0.4
    words = np.asarray(jax.jit(to_words)(flags))
    *lead, n = shape
    padded = np.zeros((*lead, -(-n // 32) * 32), bool)
    padded[..., :n] = flags
    octets = np.packbits(padded, axis=-1, bitorder="little")
    np.testing.assert_array_equal(words, octets.view("<u4"))
    counts = padded.reshape(*lead, -1, 32).sum(axis=-1)
    np.testing.assert_array_equal(count_bits(words), counts)


def test_every_bit_of_a_word_by_its_rank():
    flags = np.random.default_rng(0).random((20, 32)) < 0.5
    flags[:2] = [[True], [False]]
    words = np.packbits(flags, axis=-1, bitorder="little").view("<u4")
    ranks = np.broadcast_to(np.arange(-1, 32, dtype=np.int32), (20, 33))
    got = jax.jit(bit_of_rank)(np.broadcast_to(words, ranks.shape), ranks)
    for row, bits in zip(np.asarray(got), map(np.flatnonzero, flags), strict=True):
        np.testing.assert_array_equal(row[1 : 1 + len(bits)], bits)
        assert row[0] == 0

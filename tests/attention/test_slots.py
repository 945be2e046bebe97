"""Writing one slot of each sequence, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import attention


@pytest.mark.parametrize("at", [[0], [4], [5], [9], [3, 0, 7]])
def test_changes_one_slot_and_none_behind_the_last(at):
    array = np.random.default_rng(0).normal(size=(len(at), 5, 2)).astype(np.float32)
    want = array.copy()
    for row, slot in enumerate(at):
        if slot < 5:
            want[row, slot] = 2 * want[row, slot] + 1
    change = jax.jit(
        lambda array, at: attention.change_slots(array, at, lambda old: 2 * old + 1)
    )
    np.testing.assert_array_equal(change(array, jnp.array(at)), want)


def test_keeps_the_dtype():
    array = jnp.zeros((1, 3, 2), jnp.bfloat16)
    got = attention.change_slots(array, jnp.array([1]), lambda _: jnp.ones((1, 1, 2)))
    assert got.dtype == array.dtype

"""Lists of kept keys against loops over positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sparsejax.formats import KeyLists

from_mask = jax.jit(KeyLists.from_mask, static_argnames=("page_size", "capacity"))


class KeyListsTest(parameterized.TestCase):
    @parameterized.product(page_size=[1, 3])
    def test_equal_the_oracle(self, page_size):
        """Two sequences of unlike length; the last page of each is not full."""
        pages, lengths = 5, [5 * page_size, 3 * page_size - page_size // 2]
        kept = np.random.default_rng(1).random((2, 3, pages)) < 0.4
        kept[0, 0], kept[1, 1] = True, False

        @jax.jit
        def run(kept, lengths):
            lists = KeyLists.from_mask(kept, page_size=page_size)
            mask = lists.to_mask(pages * page_size)
            return lists, mask, lists.density(lengths), lists.positions(lengths)

        lists, mask, density, (positions, valid) = run(kept, jnp.asarray(lengths))
        self.assertFalse(lists.overflowed.any())
        for b, h in np.ndindex(2, 3):
            want = np.flatnonzero(kept[b, h])
            np.testing.assert_array_equal(lists.num[b, h], len(want))
            filled = [*want, *[want[-1] if len(want) else 0] * (pages - len(want))]
            np.testing.assert_array_equal(lists.indices[b, h], filled)
            keys = [j for j in range(pages * page_size) if kept[b, h, j // page_size]]
            np.testing.assert_array_equal(np.flatnonzero(mask[b, h]), keys)
            keys = [j for j in keys if j < lengths[b]]
            np.testing.assert_array_equal(positions[b, h][valid[b, h]], keys)
            np.testing.assert_allclose(density[b, h], len(keys) / lengths[b], rtol=1e-6)

    def test_too_little_room_is_told(self):
        kept = jnp.array([[True, True, False, True], [False, False, False, True]])
        lists = from_mask(kept, capacity=2)
        np.testing.assert_array_equal(lists.indices, [[0, 1], [3, 3]])
        np.testing.assert_array_equal(lists.num, [2, 1])
        np.testing.assert_array_equal(lists.overflowed, [True, False])

    def test_an_empty_cache_has_density_0(self):
        lists = from_mask(jnp.ones((1, 2), bool), page_size=4)
        np.testing.assert_array_equal(jax.jit(KeyLists.density)(lists, 0), [0.0])


def test_bad_arguments_raise():
    with pytest.raises(TypeError, match="a mask must be bool; got int32"):
        KeyLists.from_mask(jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match="`capacity` must be at least 1; got 0"):
        KeyLists.from_mask(jnp.ones(3, bool), capacity=0)
    with pytest.raises(ValueError, match="`page_size` must be at least 1; got 0"):
        KeyLists.from_mask(jnp.ones(3, bool), page_size=0)

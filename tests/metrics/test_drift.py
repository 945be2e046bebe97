"""sad and mask_drift, update_explored and exploration_rate."""

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import metrics, transforms

MASK = hnp.arrays(bool, (3, 4))
TREE = st.fixed_dictionaries({"a": MASK, "b": st.none(), "c": hnp.arrays(bool, (5,))})
sad = jax.jit(metrics.sad)


def sad_oracle(a, b):
    """Zhou et al., 2021, section 3: the L1 distance of the masks."""
    pairs = ((np.ravel(a[k]), np.ravel(b[k])) for k in a if a[k] is not None)
    return sum(
        abs(int(x) - int(y)) for p, q in pairs for x, y in zip(p, q, strict=True)
    )


@given(a=TREE, b=TREE, c=TREE)
def test_sad_is_a_distance(a, b, c):
    assert int(sad(a, b)) == sad_oracle(a, b) == int(sad(b, a))
    assert int(sad(a, a)) == 0
    assert int(sad(a, c)) <= int(sad(a, b)) + int(sad(b, c))


class DriftTest(parameterized.TestCase):
    def test_a_swap_counts_two(self):
        got = sad(jnp.array([True, False]), jnp.array([False, True]))
        self.assertEqual((int(got), got.dtype, got.shape), (2, jnp.int32, ()))

    def test_per_leaf(self):
        a = {
            "x": jnp.array([True, False, True, False]),
            "y": None,
            "z": jnp.ones((0, 2), bool),
        }
        b = {
            "x": jnp.array([True, True, False, False]),
            "y": None,
            "z": jnp.ones((0, 2), bool),
        }
        got = jax.jit(metrics.mask_drift)(a, b)
        chex.assert_trees_all_equal(got, {"x": 0.5, "y": None, "z": 0.0})

    def test_leaves_align_by_order(self):
        a = {"x": jnp.array([True]), "y": None, "z": jnp.array([True, True])}
        b = [jnp.array([False]), None, jnp.array([True, False])]
        self.assertEqual(int(metrics.sad(a, b)), 2)
        chex.assert_trees_all_equal(
            metrics.mask_drift(a, b), {"x": 1.0, "y": None, "z": 0.5}
        )

    def test_no_masks(self):
        self.assertEqual(int(metrics.sad({"a": None}, {"a": None})), 0)

    @parameterized.product(fn=[metrics.sad, metrics.mask_drift])
    def test_errors(self, fn):
        a = {"x": jnp.ones((2, 2), bool), "y": jnp.ones(3, bool)}
        with self.assertRaisesRegex(ValueError, "got 2 and 1 leaves"):
            fn(a, {"x": a["x"]})
        with self.assertRaisesRegex(ValueError, r"None in `masks_b` only at \['y'\]"):
            fn(a, a | {"y": None})
        with self.assertRaisesRegex(ValueError, r"got \(3,\).* \(4,\) .*at \['y'\]"):
            fn(a, a | {"y": jnp.ones(4, bool)})
        with self.assertRaisesRegex(TypeError, r"got uint8 at \['x'\].*`masks_of`"):
            fn(a, a | {"x": jnp.ones((2, 1), jnp.uint8)})

    def test_masks_of_an_optimizer(self):
        params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
        key = jax.random.key(1)
        tx = transforms.sparse_evolution(
            optax.sgd(0.1),
            0.5,
            update_every=1,
            stop_step=10,
            drop_fraction=0.5,
            key=key,
        )
        state, update = tx.init(params), jax.jit(tx.update)
        before = explored = transforms.masks_of(state)
        for _ in range(3):
            masks = transforms.masks_of(state)
            _, state = update(params, state, params)
            after = transforms.masks_of(state)
            changed = int(metrics.sad(masks, after))
            self.assertEqual(changed % 2, 0)
            explored = metrics.update_explored(explored, after)
        self.assertGreater(int(metrics.sad(before, after)), 0)
        self.assertGreater(float(metrics.exploration_rate(explored)), 0.5)
        self.assertLessEqual(float(metrics.exploration_rate(explored)), 1)


class ExplorationTest(parameterized.TestCase):
    def test_matches_loop(self):
        rng = np.random.default_rng(0)
        shapes = {"a": (4, 5), "c": (7,)}
        steps = [
            {name: rng.random(shape) < 0.2 for name, shape in shapes.items()}
            | {"b": None}
            for _ in range(5)
        ]
        explored, rates = steps[0], []
        update = jax.jit(chex.assert_max_traces(metrics.update_explored, n=1))
        for i, masks in enumerate(steps):
            explored = update(explored, masks)
            rate = jax.jit(metrics.exploration_rate)(explored)
            ever = [
                any(step[name][index] for step in steps[: i + 1])
                for name, shape in shapes.items()
                for index in np.ndindex(shape)
            ]
            self.assertAlmostEqual(float(rate), sum(ever) / 27, delta=1e-6)
            rates.append(float(rate))
        self.assertEqual(rates, sorted(rates))
        self.assertIsNone(explored["b"])

    def test_more_weights_than_int32_counts(self):
        leaf = jax.ShapeDtypeStruct((2**30,), jnp.bool_)
        rate = jax.eval_shape(metrics.exploration_rate, {"a": leaf, "b": leaf})
        self.assertEqual(rate.dtype, jnp.float32)

    def test_nothing_governed_is_dense(self):
        self.assertEqual(float(metrics.exploration_rate({"a": None})), 1)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "mirror"):
            metrics.update_explored({"a": jnp.ones(2, bool)}, {})
        with self.assertRaisesRegex(ValueError, r"one shape; got \(1,\).*\(2,\)"):
            metrics.update_explored({"a": jnp.ones(1, bool)}, {"a": jnp.ones(2, bool)})

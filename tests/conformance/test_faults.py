"""Numbers at the ends of a float's range: masks stay exact, weights stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from tests.conformance import suite

STEPS = 4


def filled(value, dtype):
    """Params of the small problem with entries `value` times -3, -2, ..., 3."""

    def of(leaf):
        factors = np.arange(leaf.size).reshape(leaf.shape) % 7 - 3
        return jnp.asarray(np.asarray(factors * np.float64(value)), dtype)

    return jax.tree.map(of, suite.make_params())


def extremes(dtype):
    """Values by name: of the weights, and of the gradients."""
    info = jnp.finfo(dtype)
    least, small = float(info.smallest_subnormal), float(info.smallest_normal)
    huge = float(info.max) / 8
    return {
        "all zero": (0.0, 0.0),
        "zero weights": (0.0, 0.1),
        "zero gradients": (0.1, 0.0),
        "denormal weights": (least, 0.1),
        "denormal gradients": (0.1, least),
        "all denormal": (least, least),
        "smallest normal": (small, small),
        "squares underflow": (0.1, 1e-30),
        "squares overflow": (0.1, 1e30),
        "huge weights": (huge, 0.1),
    }


F32, BF16 = jnp.float32, jnp.bfloat16
CASES = [(method, F32) for method in suite.METHODS]
CASES += [(method, BF16) for method in suite.WRAPPING]  # AdamS refuses bfloat16


@pytest.mark.parametrize(
    ("method", "dtype"), CASES, ids=lambda x: getattr(x, "__name__", x)
)
def test_extreme_numbers(method, dtype):
    tx = suite.build(method, optax.adam(1e-2))

    @suite.fast_jit
    def run(params, grads):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            sparse = sj.sparse_params(state, params)
            return (params, state), (params, sj.masks_of(state), sparse)

        return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[1]

    for case, (weight, gradient) in extremes(dtype).items():
        seen = run(filled(weight, dtype), filled(gradient, dtype))
        every = [suite.flat(tree) for tree in seen]
        for step in range(STEPS):
            params, masks, sparse = (
                {name: leaf[step] for name, leaf in leaves.items()} for leaves in every
            )
            for name, leaf in params.items():
                here = f"{method}, {case}, {name}, step {step}"
                assert leaf.dtype == dtype, here
                assert np.isfinite(leaf).all(), here
                if name not in suite.NAMES:
                    continue
                if method != "structure_decay" or step >= suite.BOUNDARIES[1]:
                    pattern = suite.mixed(None, leaf)
                    suite.check_pattern(masks[name], leaf.shape, pattern, here)
                assert np.count_nonzero(sparse[name]) <= leaf.size // 2, here
                if method in suite.HARD:
                    assert not leaf[~masks[name]].any(), here

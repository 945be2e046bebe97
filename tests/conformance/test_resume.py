"""A run that is saved with Orbax at any step, restored and gone on with: bit-exact."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import sparsejax as sj
from tests.conformance import suite

STEPS = 5
LR = 1e-2


def bits(tree):
    """Every leaf as raw bytes: NaN equals NaN, -0.0 differs from 0.0."""
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), suite.numbers(tree))


@pytest.fixture(scope="module")
def checkpointer():
    with ocp.StandardCheckpointer() as made:
        yield made


@pytest.mark.parametrize("method", suite.METHODS)
def test_every_step(method, checkpointer, tmp_path):
    """All steps, with masks of bools and packed ones, side by side in one file."""
    noisy = optax.noisy_sgd(LR, key=jax.random.key(1))

    def make_txs():
        return {
            "bools": suite.build(method, optax.adam(LR)),
            "packed": suite.build(method, noisy, pack_masks=True),
        }

    def start():
        params = suite.make_params()
        return {kind: (params, tx.init(params)) for kind, tx in make_txs().items()}

    def step(carry):
        txs = make_txs()
        return {kind: suite.take_step(txs[kind], *carry[kind]) for kind in txs}

    carries = [suite.fast_jit(start)()]
    # as a jitted function it would compile again for arrays that were restored
    step = suite.fast_jit(step).lower(carries[0]).compile()
    for _ in range(STEPS):
        carries.append(step(carries[-1]))

    checkpointer.save(tmp_path / "states", carries[:-1])
    checkpointer.wait_until_finished()
    template = [jax.eval_shape(start)] * STEPS  # all that a new process knows
    restored = checkpointer.restore(tmp_path / "states", template)
    for i, carry in enumerate(restored):
        assert jax.tree.structure(carry) == jax.tree.structure(carries[i])
        assert suite.spec(carry) == suite.spec(carries[i])
        assert bits(carry) == bits(carries[i])
        for j in range(i + 1, STEPS + 1):
            carry = step(carry)
            assert bits(carry) == bits(carries[j]), f"saved at {i}, step {j}"


def test_in_chain_and_multi_steps(checkpointer, tmp_path):
    """The state in wrappers, saved between two micro-steps."""
    tx = optax.MultiSteps(
        optax.chain(optax.clip(1.0), suite.build("rigl", optax.adamw(LR))), 3
    )
    params = suite.make_params()
    carries = [(params, tx.init(params))]
    step = suite.fast_jit(lambda carry: suite.take_step(tx, *carry))
    step = step.lower(carries[0]).compile()
    for _ in range(7):
        carries.append(step(carries[-1]))
    checkpointer.save(tmp_path / "state", carries[4])
    checkpointer.wait_until_finished()
    carry = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: carries[0]))
    for wanted in carries[5:]:
        carry = step(carry)
        assert bits(carry) == bits(wanted)


@pytest.mark.once
def test_adams_with_another_total_steps_raises(checkpointer, tmp_path):
    params = suite.make_params()

    def make(total_steps):
        return sj.adams(LR, total_steps, 1e-2, pattern=sj.NM(2, 4))

    state = make(100).init(params)
    for update in (make(200).update, jax.jit(make(200).update)):
        with pytest.raises(ValueError, match=r"state has 100, this optimizer 200"):
            update(params, state, params)
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    with pytest.raises(ValueError, match=r"total_steps=200.*total_steps=100"):
        checkpointer.restore(tmp_path / "state", jax.eval_shape(make(200).init, params))
    same = checkpointer.restore(
        tmp_path / "state", jax.eval_shape(make(100).init, params)
    )
    make(100).update(params, same, params)

"""`fit` goes on bit-exactly from wherever it ended, and stops cleanly on a signal."""

import functools
import os
import signal
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import training
from sparsejax.training import _loop

TX = optax.adam(1e-2)
NUM_STEPS = 12


def initial_state():
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    return training.TrainState(jnp.int32(0), params, TX.init(params))


@functools.partial(jax.jit, donate_argnums=0)
def step_fn(state, batch):
    def loss_fn(params):
        return jnp.mean((batch @ params["w"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return training.TrainState(state.step + 1, params, opt_state), {"loss": loss}


def batch_fn(step):
    return np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)


def fit(run, state=None, *, batch_fn=batch_fn, **options):
    return training.fit(
        run,
        options.pop("phase", "a"),
        initial_state() if state is None else state,
        step_fn,
        batch_fn,
        **{
            "num_steps": NUM_STEPS,
            "evaluate": lambda state: {"norm": jnp.sum(state.params["w"] ** 2)},
            "evaluate_every": 5,
            "checkpoint_every": 4,
            "tokens_per_step": 10,
            **options,
        },
    )


def open_run(folder):
    return training.open_run(folder, {}, resume=True)


def rows_of(run):
    """The metrics without the speed, which no run repeats."""
    return [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
        for row in run.rows()
    ]


@pytest.fixture
def uninterrupted(tmp_path):
    run = open_run(tmp_path / "uninterrupted")
    return fit(run), rows_of(run)


def test_is_a_plain_loop(uninterrupted):
    state, rows = uninterrupted
    want = initial_state()
    for step in range(NUM_STEPS):
        want, _ = step_fn(want, batch_fn(step))
    chex.assert_trees_all_equal(state, want)
    assert [row["step"] for row in rows if "loss" in row] == [*range(1, NUM_STEPS + 1)]
    assert [row["step"] for row in rows if "norm" in row] == [0, 5, 10, NUM_STEPS]


@pytest.mark.parametrize("name", ["evaluate_every", "checkpoint_every"])
def test_periods_are_at_least_a_step(tmp_path, name):
    run = open_run(tmp_path)
    with pytest.raises(ValueError, match=f"`{name}`.* must be at least 1 step; got"):
        fit(run, **{name: 0})
    assert not run.rows()


def test_the_first_state_stays_usable(tmp_path):
    state = initial_state()
    fit(open_run(tmp_path), state)
    chex.assert_trees_all_equal(state, initial_state())


@pytest.mark.parametrize("last", [0, 3, 4, 5, 10, NUM_STEPS - 1])
def test_goes_on_after_a_crash(tmp_path, uninterrupted, last):
    def crashing(step):
        if step == last:
            raise RuntimeError("power cut")
        return batch_fn(step)

    run = open_run(tmp_path / "crashed")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(run, batch_fn=crashing)
    state = fit(run)
    chex.assert_trees_all_equal(state, uninterrupted[0])
    assert rows_of(run) == uninterrupted[1]


@pytest.mark.parametrize(
    ("signum", "last"),
    [
        (signal.SIGINT, 2),
        (signal.SIGTERM, 3),
        (signal.SIGTERM, 4),
        (signal.SIGINT, NUM_STEPS - 1),
    ],
)
def test_stops_on_a_signal_and_goes_on(tmp_path, uninterrupted, capsys, signum, last):
    def signalling(step):
        if step == last:
            os.kill(os.getpid(), signum)
        return batch_fn(step)

    before = signal.getsignal(signum)
    run = open_run(tmp_path / "stopped")
    with pytest.raises(training.Stopped) as stopped:
        fit(run, batch_fn=signalling)
    assert stopped.value.code == 128 + signum
    assert signal.getsignal(signum) is before
    said = capsys.readouterr().err
    assert f"stopped by {signum.name} in phase 'a' at step {last + 1};" in said
    assert "the same call goes on from there" in said and "--resume" not in said
    saved = training.restore_checkpoint(run.checkpoints("a"), initial_state())
    assert saved.step == last + 1  # nothing is lost
    state = fit(run)
    chex.assert_trees_all_equal(state, uninterrupted[0])
    assert rows_of(run) == uninterrupted[1]


def test_a_signal_while_the_end_is_evaluated(tmp_path, uninterrupted):
    def evaluate(state):
        if state.step == NUM_STEPS:
            signal.raise_signal(signal.SIGTERM)
        return {"norm": jnp.sum(state.params["w"] ** 2)}

    run = open_run(tmp_path / "stopped")
    with pytest.raises(training.Stopped) as stopped:
        fit(run, evaluate=evaluate)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert rows_of(run) == uninterrupted[1]
    chex.assert_trees_all_equal(fit(run), uninterrupted[0])


@pytest.fixture
def interrupts_raise():
    """Python's own handler; a test runner's worker may have another."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(tmp_path, interrupts_raise):
    def impatient(step):
        # raised, not sent: two that are sent may arrive as one
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return batch_fn(step)

    with pytest.raises(KeyboardInterrupt):
        fit(open_run(tmp_path), batch_fn=impatient)


def test_at_the_end_it_only_reads(tmp_path, uninterrupted):
    def forbidden(step):
        raise AssertionError("no step is left")

    run = open_run(tmp_path / "uninterrupted")
    again = fit(run, batch_fn=forbidden)
    chex.assert_trees_all_equal(again, uninterrupted[0])
    assert rows_of(run) == uninterrupted[1]


def test_the_end_is_never_behind_the_start(tmp_path, uninterrupted):
    run = open_run(tmp_path / "uninterrupted")
    with pytest.raises(ValueError, match=r"num_steps=5, .* at step 12 of .*a"):
        fit(run, num_steps=5)
    with pytest.raises(ValueError, match="begins at step 12 of `state`"):
        fit(run, uninterrupted[0], phase="b", num_steps=5)
    assert rows_of(run) == uninterrupted[1]


def test_an_end_without_a_step_is_saved(tmp_path):
    run = open_run(tmp_path)
    rows = []
    for _ in range(2):
        state = fit(run, num_steps=0)
        chex.assert_trees_all_equal(state, initial_state())
        saved = training.restore_checkpoint(run.checkpoints("a"), state)
        chex.assert_trees_all_equal(saved, state)
        rows.append(rows_of(run))
    assert [row["step"] for row in rows[0]] == [0]
    assert rows[0] == rows[1]


def test_phases_follow_each_other(tmp_path):
    run = open_run(tmp_path)
    first = fit(run, num_steps=5)
    second = fit(run, first, phase="b")
    chex.assert_trees_all_equal(second, fit(open_run(tmp_path / "one")))
    phases = [(row["phase"], row["step"]) for row in rows_of(run) if "norm" in row]
    assert phases == [("a", 0), ("a", 5), ("b", 5), ("b", 10), ("b", 12)]
    nothing = fit(run, first, phase="c", num_steps=5)
    chex.assert_trees_all_equal(nothing, first)


def test_the_speed_is_that_of_the_lap(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def batch_of(step):
        now[0] += 1
        return batch_fn(step)

    run = open_run(tmp_path / "run")
    fit(run, batch_fn=batch_of, num_steps=10)
    rows = [row for row in run.rows() if "tokens_per_second" in row]
    assert [row["tokens_per_second"] for row in rows] == [10, 10]


def test_the_bar_goes_on_where_the_run_does(tmp_path, monkeypatch):
    begun = []
    make = _loop._progress_bar

    def bar(phase, seen, total):
        begun.append((seen, total))
        return make(phase, seen, total)

    fit(open_run(tmp_path / "run"), num_steps=5)
    monkeypatch.setattr(_loop, "_progress_bar", bar)
    fit(open_run(tmp_path / "run"), num_steps=10)
    assert begun == [(50, 100)]

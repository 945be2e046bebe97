"""The training loop: steps, metrics, checkpoints, and a clean stop on a signal."""

import collections
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sparsejax._extras import Extra
from sparsejax.training._checkpoint import restore_checkpoint, save_checkpoint
from sparsejax.training._processes import asked_to_stop, is_first
from sparsejax.training._runs import Run


class TrainState(NamedTuple):
    """What training changes, and so what a checkpoint holds."""

    step: jax.Array  # int32[]; steps taken so far
    params: Any
    opt_state: Any


class StepFn(Protocol):
    """One optimizer step, jitted; it may donate the state."""

    def __call__(
        self, state: TrainState, batch: Any, /
    ) -> tuple[TrainState, Mapping[str, jax.Array]]: ...


class Stopped(SystemExit):
    """Raised by `fit` when a signal asked to stop, after everything is saved.

    Not caught, it ends the process without a traceback, with the exit code that
    shells give to that signal.
    """


def fit(
    run: Run,
    phase: str,
    state: TrainState,
    step_fn: StepFn,
    batch_fn: Callable[[int], Any],
    *,
    num_steps: int,
    evaluate: Callable[[TrainState], Mapping[str, Any]],
    evaluate_every: int,
    checkpoint_every: int,
    tokens_per_step: int,
) -> TrainState:
    """Trains until `state.step` is `num_steps`, from the newest checkpoint if any.

    The same call goes on wherever the last one ended: at a signal, in a crash, or at
    `num_steps`, where it only reads. As a batch depends on nothing but the step, the
    result is bit for bit that of an uninterrupted run. (On GPUs give XLA the flag
    `--xla_gpu_deterministic_ops=true`; without it sums there depend on chance.)

    On SIGINT or SIGTERM the current step is finished and saved, then `Stopped` is
    raised; a second signal acts at once. In another process the same call needs the
    same folder: `open_run(folder, config, resume=True)`.

    Of several processes (`jax.distributed`) each makes the same call, with a state of
    global arrays. They share the run's folder; on SIGTERM to one of them, as a cluster
    sends it before it takes a machine, all stop after the same step.

    Args:
      run: where metrics and checkpoints go.
      phase: names this part of the run in both.
      state: where training starts if there is no checkpoint. It is copied, so a
        `step_fn` that donates leaves it usable.
      step_fn: takes a step; the scalars it returns are logged for each step.
      batch_fn: makes the batch of a step.
      num_steps: the step to end at, counted as in `state.step`.
      evaluate: computes what is logged at the start, every `evaluate_every` steps and
        at the end.
      evaluate_every: in steps.
      checkpoint_every: in steps; the end is always saved.
      tokens_per_step: for the speed shown.

    Returns:
      The state at `num_steps`.

    Raises:
      ValueError: if `evaluate_every` or `checkpoint_every` is below 1, training is
        beyond `num_steps` already, or as `restore_checkpoint`.
      OSError: the system refused to write, see `save_checkpoint` and `Run.log`.
      Stopped: a signal came.

    Example:
      >>> import tempfile
      >>> tx, params = optax.sgd(0.1), {"w": jnp.ones(3)}
      >>> state = TrainState(jnp.int32(0), params, tx.init(params))
      >>> @jax.jit
      ... def step_fn(state, batch):
      ...     loss_fn = lambda params: jnp.sum((params["w"] - batch) ** 2)
      ...     loss, grads = jax.value_and_grad(loss_fn)(state.params)
      ...     updates, opt_state = tx.update(grads, state.opt_state)
      ...     params = optax.apply_updates(state.params, updates)
      ...     return TrainState(state.step + 1, params, opt_state), {"loss": loss}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     run = sj.training.open_run(folder, {"learning_rate": 0.1}, resume=True)
      ...     state = fit(
      ...         run, "dense", state, step_fn, batch_fn=jnp.float32, num_steps=5,
      ...         evaluate=lambda state: {"norm": jnp.linalg.norm(state.params["w"])},
      ...         evaluate_every=5, checkpoint_every=5, tokens_per_step=1,
      ...     )
      ...     rows = run.rows()
      >>> int(state.step), [row["step"] for row in rows if "norm" in row]
      (5, [0, 5])
    """
    if min(evaluate_every, checkpoint_every) < 1:
        raise ValueError(
            "`evaluate_every` and `checkpoint_every` must be at least 1 step; got "
            f"{evaluate_every} and {checkpoint_every}."
        )
    folder = run.checkpoints(phase)
    restored = restore_checkpoint(folder, state)
    step = int(state.step if restored is None else restored.step)
    if step > num_steps:
        raise ValueError(
            "training must begin at or before its end; got "
            f"num_steps={num_steps}, and it begins at step {step} of "
            f"{'`state`' if restored is None else folder}. Pass `num_steps` counted as "
            "in `state.step`, or begin a run in another folder."
        )
    if restored is None:
        run.rewind(phase, -1)
        run.log({"phase": phase, "step": step, **evaluate(state)})
        state = jax.tree.map(jnp.copy, state)
        if step == num_steps:
            save_checkpoint(folder, step, state)
    else:
        run.rewind(phase, step)
        state = restored
    if step == num_steps:
        return state

    unread: collections.deque[dict[str, Any]] = collections.deque()
    seen, total = step * tokens_per_step, num_steps * tokens_per_step
    lap_step, lap_time = step, time.perf_counter()
    stop: signal.Signals | None = None
    with _stop_signals() as signals, _progress_bar(phase, seen, total) as bar:
        while step < num_steps and not stop:
            state, metrics = step_fn(state, batch_fn(step))
            step += 1
            unread.append({"phase": phase, "step": step, **metrics})
            stop = signals[0] if signals else None
            if asked_to_stop(step):
                stop = signal.SIGTERM
            evaluates = step % evaluate_every == 0 or step == num_steps
            saves = step % checkpoint_every == 0 or step == num_steps or stop
            # One row stays unread, so that the device need not wait for this loop.
            while len(unread) > (0 if evaluates or saves else 1):
                row = run.log(unread.popleft())
                bar.set_postfix({name: row[name] for name in metrics}, refresh=False)
                bar.update(tokens_per_step)
            if evaluates:
                seconds = time.perf_counter() - lap_time
                speed = (step - lap_step) * tokens_per_step / seconds
                measured = {"tokens_per_second": speed, **evaluate(state)}
                run.log({"phase": phase, "step": step, **measured})
                lap_step, lap_time = step, time.perf_counter()
            if saves:
                save_checkpoint(folder, step, state)
    # one may have come while the end was evaluated and saved
    if stop := stop or next(iter(signals), None):
        if is_first():
            print(
                f"stopped by {stop.name} in phase {phase!r} at step {step}; all is "
                "saved, and the same call goes on from there.",
                file=sys.stderr,
            )
        raise Stopped(128 + stop)
    return state


def _progress_bar(phase: str, seen: int, total: int):
    """A bar that counts tokens; in a log file it is written less often."""
    with Extra("examples"):
        from tqdm import tqdm

    return tqdm(
        desc=phase,
        initial=seen,
        total=total,
        unit="tok",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        disable=not is_first(),
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM in the list it yields, instead of acting on them.

    Each is collected once, then has its old effect again. Outside the main thread,
    where Python allows no handlers, the list stays empty; so it does where several
    processes have to stop together, see `asked_to_stop`.
    """
    received: list[signal.Signals] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
        yield received
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {signum: signal.getsignal(signum) for signum in wanted}

    def collect(signum: int, _: object) -> None:
        received.append(signal.Signals(signum))
        signal.signal(signum, before[signal.Signals(signum)])

    try:
        for signum in wanted:
            signal.signal(signum, collect)
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

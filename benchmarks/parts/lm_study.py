"""What studies of training methods share: one way to train, and runs that resume.

A study trains a model by several methods, each at several settings and seeds. Here a
method is a value; its settings, the length of a run and the seed are traced, so that
each method compiles once. Small models leave a GPU idle between launches: so runs that
differ in learning rate or seed alone may be steps of one program, `Trainer.together`.
Finished runs are kept in a JSON file and are not done again, so that a study may be
spread over processes of a few minutes each.
"""

import dataclasses
import functools
import math
import operator
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsejax as sj
from benchmarks.parts import common, timing
from sparsejax import training
from sparsejax.typing import Params, is_none

# --- Runs of one program ---

RATE = "lr"  # the setting that runs of one program may differ in


class Plan(NamedTuple):
    """What a method is built for; all traced."""

    num_steps: jax.Array  # int32[]
    batch_key: jax.Array  # of the seed, for the batches
    key: jax.Array  # likewise, for what a method draws
    setting: dict[str, jax.Array]  # float32[], by name: a learning rate, a strength


@dataclasses.dataclass(frozen=True)
class Seconds:
    """The length of a run by the clock, in place of a number of steps.

    Schedules are functions of `step / Plan.num_steps`, here the share of the time that
    is gone: before each program `num_steps` becomes what the run will have at its mean
    speed so far. So nobody need know the speed, nor that it changes, as it does where a
    model gets sparser.
    """

    budget: float  # of training, without compiling and what `watch` takes


Length = int | Seconds  # int: steps


def as_case(length: Length) -> dict[str, Any]:
    """How a length stands in the case of a run, see `Ledger.run`."""
    if isinstance(length, Seconds):
        return {"budget_s": length.budget}
    return {"steps": length}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train; most need nothing but the defaults of the library."""

    tx: optax.GradientTransformation
    loss: Callable  # (weights, batch, teacher) -> what is minimized, float32[]
    start: Callable = lambda weights: weights  # -> params: what is trained
    forward: Callable = sj.forward_params  # (opt_state, params) -> weights in the loss
    finish: Callable = sj.sparse_params  # (opt_state, params) -> exactly sparse weights


class Run(NamedTuple):
    """What is its own."""

    weights: Params  # the first ones; of the same shapes in every run
    seed: int  # the same batches for every method
    setting: Mapping[str, float]  # see `Plan`


class Trained(NamedTuple):
    """What a run ends with."""

    before: Params  # weights that the next forward would use
    after: Params  # after the hard prune
    ms_step: float  # of all runs of the program; a mean, without compiling; or 0
    history: list[dict[str, Any]]  # see `Trainer.run_together`


Watch = Callable[[Params, Params], Mapping[str, Any]]  # (before, after) as in `Trained`


class Trainer:
    """Trains by one method, many steps in one program.

    Args:
      make: `Plan` -> `Method`. With `together` above 1, what its state has of numbers
        must follow from the step and from settings other than `lr`.
      draw: (data, key) -> a batch.
      steps_per_call: of one program; the host waits in between.
      together: how many runs a program takes a step of, by `jax.vmap`. 1 maps nothing.
    """

    def __init__(
        self,
        make: Callable[[Plan], Method],
        draw: Callable[[Any, jax.Array], Any],
        *,
        steps_per_call: int,
        together: int = 1,
    ):
        self._make, self._draw, self._steps_per_call = make, draw, steps_per_call
        self.together = together
        self._begin: Any = None  # and the other two: compiled programs
        self._advance: Any = None
        self._end: Any = None
        self._call_s = 0.0  # of a program, by the first run that needs it

    def compile(
        self,
        weights: Params,
        data: Any,
        setting: Mapping[str, float],
        teacher: Params | None = None,
    ) -> None:
        """Compiles what `run` needs for arguments like these; it does so if need be."""
        if self._end is not None:
            return
        run = Run(weights, 0, setting)
        axes = _plan_axes(setting)
        of_one = jax.eval_shape(lambda run: (run.weights, _plan(1, run)), run)
        state_axes = _state_axes(jax.eval_shape(self._begin_traced, *of_one))
        weights, plan = jax.eval_shape(lambda run: self._gather([run], 1), run)

        def mapped(fn, in_axes, out_axes, **options):
            if self.together > 1:
                fn = jax.vmap(fn, in_axes, out_axes)
            return jax.jit(fn, **options)

        begin = mapped(self._begin_traced, (0, axes), state_axes)
        begin = begin.lower(weights, plan)
        state = begin.out_info
        advance = mapped(
            self._advance_traced,
            (state_axes, axes, None, None),
            (state_axes, 0),
            donate_argnums=0,
        ).lower(state, plan, data, teacher)
        end = mapped(self._end_traced, (state_axes, axes), 0).lower(state, plan)
        self._begin = timing.compile_alone(begin)
        self._advance = timing.compile_alone(advance)
        self._end = timing.compile_alone(end)

    def run(
        self,
        weights: Params,
        data: Any,
        *,
        num_steps: Length,
        seed: int,
        setting: Mapping[str, float],
        **options: Any,
    ) -> Trained:
        """Trains once, see `run_together`."""
        runs = [Run(weights, seed, setting)]
        return self.run_together(runs, data, num_steps=num_steps, **options)[0]

    def run_together(
        self,
        runs: Sequence[Run],
        data: Any,
        *,
        num_steps: Length,
        teacher: Params | None = None,
        watch: Watch | None = None,
        looks: int | None = None,
    ) -> list[Trained]:
        """Trains from the weights of each run, which stay as they are.

        Args:
          runs: `together` at most, which differ in seed, weights and `lr`. Of fewer the
            last one is done several times, as there is one program.
          data: arrays that `draw` reads.
          num_steps: a multiple of `steps_per_call`; or `Seconds`, of which a run misses
            or exceeds at most about half a program.
          teacher: weights for the method's loss.
          watch: what to add to the history; its time does not count.
          looks: how often to watch, evenly over the run; None: after each call.

        Returns:
          Of each run the weights, and the history: after each call the `step`, the
          `seconds` of training so far, the mean `train_loss` of the call's steps, and
          what `watch` gave.

        Raises:
          ValueError: if `num_steps` is no multiple of `steps_per_call`, or the runs are
            too many or too different.
        """
        if not isinstance(num_steps, Seconds) and num_steps % self._steps_per_call:
            raise ValueError(
                f"`num_steps` must be a multiple of {self._steps_per_call}, the steps "
                f"of one program; got {num_steps}."
            )
        shared = [{**run.setting, RATE: None} for run in runs]
        if len(runs) > self.together or any(found != shared[0] for found in shared):
            raise ValueError(
                f"runs of one program must be at most {self.together}, their settings "
                f"but for `{RATE}` equal; got {[dict(run.setting) for run in runs]}."
            )
        self.compile(runs[0].weights, data, runs[0].setting, teacher)
        weights, plan = self._gather(
            runs, 1 if isinstance(num_steps, Seconds) else num_steps
        )
        state = self._begin(weights, plan)
        given = (data, teacher)
        if isinstance(num_steps, Seconds) and not self._call_s:
            for _ in range(2):  # the first one warms up
                state, _, self._call_s = self._timed(state, plan, *given)
            state = self._begin(weights, plan)
        step, seconds, histories = 0, 0.0, [[] for _ in runs]
        done, each = self._shares(num_steps, step, seconds)
        while done + each / 2 < 1:
            if isinstance(num_steps, Seconds):
                expected = jnp.asarray(self._steps_per_call / each, jnp.int32)
                plan = plan._replace(num_steps=expected)
            state, losses, took = self._timed(state, plan, *given)
            step, seconds, last = step + self._steps_per_call, seconds + took, done
            done, each = self._shares(num_steps, step, seconds)
            told = [{"step": step, "seconds": seconds, "train_loss": x} for x in losses]
            is_due = (
                looks is None
                or int(done * looks) > int(last * looks)
                or done + each / 2 >= 1
            )
            if watch and is_due:
                ends = self._ends(state, plan, len(runs))
                told = [{**a, **watch(*b)} for a, b in zip(told, ends, strict=False)]
            for history, entry in zip(histories, told, strict=False):
                history.append(entry)
        ms_step = 1e3 * seconds / max(step, 1)
        ends = self._ends(state, plan, len(runs))
        return [
            Trained(*weights, ms_step, history)
            for weights, history in zip(ends, histories, strict=True)
        ]

    def _gather(self, runs: Sequence[Run], num_steps: Any) -> tuple[Params, Plan]:
        """What `_begin` takes: of several runs, stacked."""
        plans = [_plan(num_steps, run) for run in runs]
        if self.together == 1:
            return runs[0].weights, plans[0]
        again = self.together - len(runs)

        def stack(axis, *of_runs):
            if axis is None:
                return of_runs[0]
            return jnp.stack([*of_runs, *again * of_runs[-1:]])

        weights = jax.tree.map(
            functools.partial(stack, 0), *(run.weights for run in runs)
        )
        axes = _plan_axes(runs[0].setting)
        return weights, jax.tree.map(stack, axes, *plans, is_leaf=is_none)

    def _ends(self, state, plan, num_runs: int) -> list[tuple[Params, Params]]:
        """Of each run the weights before and after the prune."""
        ends = self._end(state, plan)
        if self.together == 1:
            return [ends]
        return [
            jax.tree.map(lambda x, run=run: x[run], ends) for run in range(num_runs)
        ]

    def _timed(self, state, plan, data, teacher) -> tuple[Any, list[float], float]:
        """After one program: the state, the mean losses, and the seconds it took."""
        began = time.perf_counter()
        state, losses = self._advance(state, plan, data, teacher)
        losses = np.ravel(losses).tolist()  # waits
        return state, losses, time.perf_counter() - began

    def _shares(self, length: Length, step: int, seconds: float) -> tuple[float, float]:
        """Of a run: how much is done, and how much one program does."""
        if isinstance(length, Seconds):
            calls = step // self._steps_per_call
            call_s = seconds / calls if calls else self._call_s
            return seconds / length.budget, call_s / length.budget
        if not length:
            return 1.0, 0.0
        return step / length, self._steps_per_call / length

    def _begin_traced(self, weights, plan):
        # a copy: the state is donated, and the weights are those of other runs
        params = jax.tree.map(jnp.copy, self._make(plan).start(weights))
        opt_state = self._make(plan).tx.init(params)
        return training.TrainState(jnp.int32(0), params, opt_state)

    def _advance_traced(self, state, plan, data, teacher):
        method = self._make(plan)

        def step_fn(state, _):
            batch = self._draw(data, jax.random.fold_in(plan.batch_key, state.step))

            def loss_fn(params):
                weights = method.forward(state.opt_state, params)
                return method.loss(weights, batch, teacher)

            loss, grads = jax.value_and_grad(loss_fn)(state.params)
            updates, opt_state = method.tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return training.TrainState(state.step + 1, params, opt_state), loss

        state, losses = jax.lax.scan(step_fn, state, length=self._steps_per_call)
        return state, jnp.mean(losses)

    def _end_traced(self, state, plan):
        method = self._make(plan)
        ends = (method.forward, method.finish)
        return tuple(end(state.opt_state, state.params) for end in ends)


def _plan(num_steps: Any, run: Run) -> Plan:
    batch_key, key = jax.random.split(jax.random.key(run.seed))
    values = {name: jnp.asarray(x, jnp.float32) for name, x in run.setting.items()}
    return Plan(jnp.asarray(num_steps, jnp.int32), batch_key, key, values)


def _plan_axes(setting: Mapping[str, float]) -> Any:
    """Where runs of one program have their own: not in a schedule's length and shape.

    So a method's choice by the step, such as a frame, stays one of which one side is
    computed; of a choice by mapped numbers all sides are.
    """
    of_settings = {name: 0 if name == RATE else None for name in setting}
    axes: Any = (None, 0, 0, of_settings)
    return Plan(*axes)


def _state_axes(state: Any) -> Any:
    """Likewise; numbers follow from the step, and `jax.vmap` raises if they do not."""
    return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, state)


def warmup_cosine(plan: Plan, *, warmup: float = 0.05, floor: float = 0.1):
    """The schedule of every method: up to `lr` of the setting, then down by a cosine.

    Args:
      plan: its length and its setting `lr`.
      warmup: share of the steps.
      floor: last rate over the highest.
    """

    def learning_rate(step):
        warm = warmup * plan.num_steps
        progress = jnp.clip((step - warm) / (plan.num_steps - warm), 0, 1)
        cosine = floor + (1 - floor) * (1 + jnp.cos(jnp.pi * progress)) / 2
        return plan.setting["lr"] * jnp.where(step < warm, step / warm, cosine)

    return learning_rate


def evaluator(fn: Callable, *, batch_size: int) -> Callable[[Params, Any], Any]:
    """(weights, examples) -> the mean over batches of `fn(weights, batch)`.

    `fn` gives a loss, or a tree; it compiles once for any number of examples. Each leaf
    of these is `[n * batch_size, ..]`.
    """
    of_batch = jax.jit(fn)

    def mean(weights, examples):
        starts = range(0, len(jax.tree.leaves(examples)[0]), batch_size)
        rows = [operator.itemgetter(slice(at, at + batch_size)) for at in starts]
        found = [of_batch(weights, jax.tree.map(of, examples)) for of in rows]
        return jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *found)

    return mean


# --- All runs ---


class OutOfTime(Exception):
    """The next run would end after the time that this process has."""


class Ledger:
    """The runs of a study, written as they end, and found again by the next process.

    Args:
      path: the JSON file, in the form of all benchmarks; None keeps rows in memory.
      settings: what all runs have in common, and their results depend on.
      minutes: from now on; no run begins that would end later.

    Raises:
      ValueError: if the runs in the file were made with other settings.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        settings: Mapping[str, Any],
        *,
        minutes: float = math.inf,
    ):
        self.path, self._env = path, common.environment(**settings)
        self._end = time.monotonic() + 60 * minutes
        self.rows = common.read_rows(path, settings)

    def run(
        self, case: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The row of a case, see `run_together`; `measure` gives its columns."""
        return self.run_together([case], lambda indices: [measure()])[0]

    def run_together(
        self,
        cases: Sequence[Mapping[str, Any]],
        measure: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]],
    ) -> list[dict[str, Any]]:
        """The rows of cases: read where they are there, measured and written if not.

        Args:
          cases: what tells each from the others, the length of the run (`as_case`) in
            it, which is the same for all.
          measure: indices of cases -> their other columns, `ms_step` among them, and
            `steps` if the length is by the clock. A list or a mapping is not printed.

        Returns:
          In the order of the cases. `seconds` are those of all that were measured.

        Raises:
          OutOfTime: if one is not there, and the time is too short by the slowest step
            and the longest start of the runs so far. A first run always begins.
        """
        found = {index: self._find(case) for index, case in enumerate(cases)}
        missing = [index for index, row in found.items() if not row]
        if missing:
            if self.rows:
                self.require(self._estimate(cases[0]))
            began = time.monotonic()
            measured = measure(missing)
            around = {
                "seconds": time.monotonic() - began,
                "device": jax.devices()[0].device_kind,
            }
            for index, columns in zip(missing, measured, strict=True):
                finite = {
                    name: None if isinstance(x, float) and not math.isfinite(x) else x
                    for name, x in columns.items()  # as it will be read again
                }
                found[index] = {**cases[index], **finite, **around}
            new = [found[index] for index in missing]
            self.rows += new
            common.print_table(
                [
                    {k: x for k, x in row.items() if not isinstance(x, list | dict)}
                    for row in new
                ]
            )
            self.write()
        return list(found.values())

    def _find(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Its row, or an empty one."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in case.items()):
                return row
        return {}

    def require(self, seconds: float) -> None:
        """Raises `OutOfTime` if less is left."""
        if time.monotonic() + seconds > self._end:
            raise OutOfTime

    def write(self, notes: Sequence[str] = (), *, complete: bool = False) -> None:
        """Writes the file; a process that is stopped meanwhile leaves the old one.

        Args:
          notes: on the rows.
          complete: whether all runs are there, as its `env` will say.
        """
        if self.path is None:
            return
        partial = self.path.with_name(f"{self.path.name}.partial")
        env = {**self._env, "complete": complete}
        common.write_json(partial, env, self.rows, notes)
        partial.replace(self.path)

    def _estimate(self, case: Mapping[str, Any]) -> float:
        """Seconds of a run, by the runs so far."""
        around = max(
            row["seconds"] - row["steps"] * row["ms_step"] / 1e3 for row in self.rows
        )
        if "budget_s" in case:
            return around + case["budget_s"]
        return around + case["steps"] * max(row["ms_step"] for row in self.rows) / 1e3

"""Methods compared alike: each is tuned by short runs on one part, judged on another.

The parts are called `tune` and `test`. A run judged on `test` is judged on `tune` too,
`ON_TUNE`, so that what gets more seeds is not chosen on `test`. A case is one run:
method, part, setting, length and seed; its row is kept in a `lm_study.Ledger`. Lengths
are steps or `lm_study.Seconds`. Where a program takes several runs, those of one method
and part go together whose settings but for the learning rate are equal.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.parts import lm_report, lm_study, timing
from sparsejax.typing import Params

ON_TUNE = "loss_on_tune"


class Entry(NamedTuple):
    """A method and what it is tuned over."""

    make: Callable[[lm_study.Plan], lm_study.Method]
    grid: Sequence[Mapping[str, float]]  # settings, as many for every method
    judged_by: str = lm_report.AFTER  # the column of the loss that is to be low


def grid(**values: Sequence[float]) -> list[dict[str, float]]:
    """All combinations."""
    names, of_each = values.keys(), values.values()
    return [dict(zip(names, x, strict=True)) for x in itertools.product(*of_each)]


class Study:
    """The runs of several methods.

    Args:
      methods: by name; those with one `make` share a program.
      ledger: keeps the rows.
      first: seed -> weights to begin with; of the same shapes for every seed.
      data: arrays that `draw` reads.
      draw: (data, key) -> a batch.
      judge: (what a run ends with, part) -> columns of its row, those that methods are
        judged by among them; raises if the weights are not as sparse as they should be.
      steps_per_call: see `lm_study.Trainer`.
      together: likewise; rows then have a column of that name, as `ms_step` is of all.
      teacher: weights for the methods' losses.
      watch: see `lm_study.Trainer.run`; of the runs judged on `test`. `judge` finds the
        history.
      looks: likewise.
    """

    def __init__(
        self,
        methods: Mapping[str, Entry],
        ledger: lm_study.Ledger,
        *,
        first: Callable[[int], Params],
        data: Any,
        draw: Callable[..., Any],
        judge: Callable[[lm_study.Trained, str], Mapping[str, Any]],
        steps_per_call: int,
        together: int = 1,
        teacher: Params | None = None,
        watch: lm_study.Watch | None = None,
        looks: int | None = None,
    ):
        self._methods, self._ledger = methods, ledger
        self._first, self._data, self._teacher = first, data, teacher
        self._judge, self._watch, self._looks = judge, watch, looks
        programs = {
            entry.make: lm_study.Trainer(
                entry.make, draw, steps_per_call=steps_per_call, together=together
            )
            for entry in methods.values()
        }
        self._trainers = {name: programs[entry.make] for name, entry in methods.items()}

    def compile(self, names: Iterable[str]) -> None:
        """Compiles these methods, side by side; else each is by its first run."""

        def build(name):
            setting = self._methods[name].grid[0]
            given = (self._first(0), self._data, setting, self._teacher)
            self._trainers[name].compile(*given)

        of_programs = {id(self._trainers[name]): name for name in names}
        timing.side_by_side(build, of_programs.values())

    def run(
        self,
        *,
        tuning_steps: lm_study.Length,
        steps: lm_study.Length,
        num_seeds: int,
        always: Collection[str] = (),
        best: int | None = None,
    ) -> dict[str, Mapping[str, float]]:
        """Tunes every method and runs it, some of them with several seeds.

        Args:
          tuning_steps: length of the runs judged on `tune`.
          steps: of those judged on `test`, with the best setting on `tune`.
          num_seeds: of the methods below; the others have one.
          always: methods with all seeds.
          best: how many of the others have all, those whose first seed has the lowest
            loss on `tune` at full length; None for all.

        Returns:
          The best setting of each method on `tune`.

        Raises:
          OutOfTime: the next run would not fit; those before it are in the ledger.
        """
        chosen = {}
        for name, entry in self._methods.items():
            tried = [(setting, 0) for setting in entry.grid]
            rows = self.rows(name, "tune", tried, steps=tuning_steps)
            losses = [self._loss(name, row) for row in rows]
            chosen[name] = entry.grid[losses.index(min(losses))]
            seeds = range(num_seeds if best is None else 1)
            tested = [(chosen[name], seed) for seed in seeds]
            self.rows(name, "test", tested, steps=steps)
        if best is None:
            return chosen

        def on_tune(name):
            row = self.row(name, "test", chosen[name], steps=steps)
            return lm_report.loss_of(row, ON_TUNE)

        others = sorted((name for name in chosen if name not in always), key=on_tune)
        for name in (*others[:best], *always):
            tested = [(chosen[name], seed) for seed in range(num_seeds)]
            self.rows(name, "test", tested, steps=steps)
        return chosen

    def row(
        self,
        method: str,
        part: str,
        setting: Mapping[str, float],
        *,
        steps: lm_study.Length,
        seed: int = 0,
        name: str | None = None,
    ) -> dict[str, Any]:
        """One run, see `rows`."""
        runs = [(setting, seed)]
        return self.rows(method, part, runs, steps=steps, name=name)[0]

    def rows(
        self,
        method: str,
        part: str,
        runs: Sequence[tuple[Mapping[str, float], int]],
        *,
        steps: lm_study.Length,
        name: str | None = None,
    ) -> list[dict[str, Any]]:
        """Runs, each a setting and a seed, from the ledger if they are there.

        `name` stands for the method.
        """
        trainer = self._trainers[method]
        length = lm_study.as_case(steps)
        first = functools.cache(self._first)  # of a seed, while the runs go on

        def row_of(run):
            setting, seed = run
            case = {"method": name or method, "judged_on": part, **setting}
            return case | length | {"seed": seed}

        def judged(trained):
            found = dict(self._judge(trained, part))
            if part == "test":
                on_tune = self._judge(trained, "tune")
                found[ON_TUNE] = self._loss(method, on_tune)
            return found

        def measure(runs):
            trained = trainer.run_together(
                [lm_study.Run(first(seed), seed, setting) for setting, seed in runs],
                self._data,
                num_steps=steps,
                teacher=self._teacher,
                watch=self._watch if part == "test" else None,
                looks=self._looks,
            )
            of_all = {"together": trainer.together} if trainer.together > 1 else {}
            return [
                {
                    **judged(one),
                    "steps": one.history[-1]["step"] if one.history else 0,
                    "ms_step": one.ms_step,
                    **of_all,
                }
                for one in trained
            ]

        found = {}
        for group in _groups(runs, trainer.together):
            rows = self._ledger.run_together(
                [row_of(runs[index]) for index in group],
                lambda left, group=group: measure([runs[group[i]] for i in left]),
            )
            found |= dict(zip(group, rows, strict=True))
        return [found[index] for index in range(len(runs))]

    def _loss(self, method: str, row: Mapping[str, Any]) -> float:
        return lm_report.loss_of(row, self._methods[method].judged_by)


def _groups(
    runs: Sequence[tuple[Mapping[str, float], int]], together: int
) -> list[tuple[int, ...]]:
    """Indices of runs that one program may take."""
    alike = collections.defaultdict(list)
    for index, (setting, _) in enumerate(runs):
        shared = {name: x for name, x in setting.items() if name != lm_study.RATE}
        alike[tuple(sorted(shared.items()))].append(index)
    return [
        tuple(of_one[at : at + together])
        for of_one in alike.values()
        for at in range(0, len(of_one), together)
    ]

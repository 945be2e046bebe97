"""Studies of methods: one run is what a plain loop does, all runs resume."""

import functools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax as sj
from benchmarks import smollm2_cast
from benchmarks.parts import (
    documents,
    lm_methods,
    lm_report,
    lm_study,
    lm_tuning,
    scanned_decoder,
    smollm2_tokens,
)
from sparsejax import models
from tests.benchmarks.quick import run_last_again, run_quick

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("compile_fast")]

RULE = smollm2_cast.RULE
STEPS = 6


def squared_error(weights, batch, teacher=None):
    """Of a stack of linear layers, on inputs whose wanted output is the teacher's."""

    def output(weights):
        x = batch
        for kernel in weights["blocks"]["kernel"]:
            x = x @ kernel
        return x * weights["rest"]["scale"]

    return jnp.mean((output(weights) - output(teacher)) ** 2)


def losses(**options):
    del options
    return squared_error


def draw(data, key):
    return data[jax.random.randint(key, (4,), 0, len(data))]


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    first, teacher = (
        {
            "blocks": {"kernel": jax.random.normal(key, (2, 8, 8)) / 3},
            "rest": {"scale": jnp.ones(8)},
        }
        for key in keys[:2]
    )
    return first, teacher, jax.random.normal(keys[2], (32, 8))


def train(method, **setting):
    weights, teacher, data = problem()
    make = smollm2_cast.methods(losses)[method].make
    return lm_study.Trainer(make, draw, steps_per_call=2).run(
        weights, data, num_steps=STEPS, seed=3, setting=setting, teacher=teacher
    )


def test_dense_training_is_that_of_a_plain_loop():
    trained = train(smollm2_cast.DENSE, lr=0.03)
    weights, teacher, data = problem()
    batch_key = jax.random.split(jax.random.key(3))[0]
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.03, 0.05 * STEPS, STEPS, 0.003)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, 0.9, 0.95))

    @jax.jit
    def step_fn(weights, state, step):
        batch = draw(data, jax.random.fold_in(batch_key, step))
        loss, grads = jax.value_and_grad(squared_error)(weights, batch, teacher)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    state, found = tx.init(weights), []
    for step in range(STEPS):
        weights, state, loss = step_fn(weights, state, step)
        found.append(loss)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        trained.before,
        weights,
    )
    told = [entry["train_loss"] for entry in trained.history]
    np.testing.assert_allclose(told, np.reshape(found, (-1, 2)).mean(1), rtol=1e-4)
    assert [entry["step"] for entry in trained.history] == [2, 4, 6]


@pytest.mark.parametrize("method", smollm2_cast.NAMES)
def test_what_is_left_after_the_prune_is_exactly_2_of_4_and_unchanged(method):
    trained = train(method, lr=0.03, pull=0.1)
    before, after = (
        np.asarray(weights["blocks"]["kernel"])
        for weights in (trained.before, trained.after)
    )
    left = np.count_nonzero(after.reshape(2, 2, 4, 8), axis=2)
    np.testing.assert_array_equal(left, 2)
    assert lm_methods.most_kept(trained.after["blocks"], 4) == (2, 0.5)
    np.testing.assert_array_equal(after, np.where(after != 0, before, 0))
    first = np.asarray(problem()[0]["blocks"]["kernel"])
    assert np.abs(before - first)[after != 0].min() > 0  # all of them were trained


def test_one_program_serves_every_setting_length_and_seed():
    weights, teacher, data = problem()
    made, seen = [], []

    def make(plan):
        made.append(plan)
        return lm_methods.cast(losses, plan, rule=RULE)

    trainer = lm_study.Trainer(make, draw, steps_per_call=2)

    def run(num_steps, lr):
        setting = {"lr": lr, "pull": 0.1}
        return trainer.run(
            weights, data, num_steps=num_steps, seed=0, setting=setting, teacher=teacher
        )

    run(4, 0.03)
    traced = len(made)
    found = run(6, 0.01)  # from weights that the first run has left as they are
    assert len(made) == traced
    wanted = lm_study.Trainer(make, draw, steps_per_call=2).run(
        weights,
        data,
        num_steps=6,
        seed=0,
        setting={"lr": 0.01, "pull": 0.1},
        teacher=teacher,
        watch=lambda *weights: seen.append(weights) or {"seen": len(seen)},
    )
    jax.tree.map(np.testing.assert_array_equal, found.after, wanted.after)
    assert [entry["seen"] for entry in wanted.history] == [1, 2, 3]
    last = (wanted.before, wanted.after)
    jax.tree.map(np.testing.assert_array_equal, seen[-1], last)
    with pytest.raises(ValueError, match=r"multiple of 2.*got 3"):
        run(3, 0.01)


def test_runs_of_one_program_are_what_each_is_alone():
    weights, teacher, data = problem()
    make = functools.partial(
        lm_methods.structure_decay,
        losses,
        rule=RULE,
        frames=sj.patterns.stepwise_frames,
    )
    alone = lm_study.Trainer(make, draw, steps_per_call=2)
    trainer = lm_study.Trainer(make, draw, steps_per_call=2, together=3)
    other = jax.tree.map(lambda w: 0.9 * w, weights)
    runs = [
        lm_study.Run(weights, 0, {"lr": 0.03, "ramp": 0.6}),
        lm_study.Run(other, 1, {"lr": 0.01, "ramp": 0.6}),
    ]
    options = {"num_steps": STEPS, "teacher": teacher}
    found = trainer.run_together(runs, data, **options)
    assert len(found) == 2
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    for run, got in zip(runs, found, strict=True):
        seed, setting = run.seed, run.setting
        want = alone.run(run.weights, data, seed=seed, setting=setting, **options)
        jax.tree.map(close, (got.before, got.after), (want.before, want.after))
        for one, entry in zip(got.history, want.history, strict=True):
            close(one["train_loss"], entry["train_loss"])
    # the frame is one for all: it stays a branch
    assert " conditional(" in trainer._advance.as_text()
    with pytest.raises(ValueError, match="their settings but for `lr` equal"):
        trainer.run_together(
            [runs[0], runs[1]._replace(setting={"lr": 0.01, "ramp": 0.5})],
            data,
            **options,
        )


def test_by_the_clock_a_run_fills_its_seconds_and_schedules_follow(monkeypatch):
    weights, teacher, data = problem()

    def make(plan):  # the loss is the number of steps that is expected
        def loss(weights, batch, teacher):
            return plan.num_steps + 0.0 * jnp.sum(weights["rest"]["scale"])

        return lm_study.Method(
            optax.identity(),
            loss,
            forward=lambda opt_state, params: params,
            finish=lambda opt_state, params: params,
        )

    took = iter([9, 1, 1, 1, 2, 2, 2])  # two to warm up and to learn the speed
    ticks = (t for seconds in took for t in (0, seconds))
    trainer = lm_study.Trainer(make, draw, steps_per_call=2)
    monkeypatch.setattr(lm_study.time, "perf_counter", lambda: next(ticks))
    found = trainer.run(
        weights,
        data,
        num_steps=lm_study.Seconds(7.0),
        seed=0,
        setting={},
        teacher=teacher,
        watch=lambda *weights: {"seen": True},
        looks=2,
    )
    told = [(x["step"], x["seconds"], x["train_loss"]) for x in found.history]
    assert told == [(2, 1, 14), (4, 2, 14), (6, 4, 14), (8, 6, 10), (10, 8, 9)]
    assert [x["step"] for x in found.history if "seen" in x] == [6, 10]
    assert found.ms_step == 800


def test_scanned_blocks_compute_what_the_decoder_does():
    model = smollm2_cast.tiny_model()
    decoder, weights = scanned_decoder.scan_blocks(model)
    _, teacher = scanned_decoder.scan_blocks(
        models.Decoder(model.config, rngs=nnx.Rngs(1))
    )
    batch = jax.random.randint(jax.random.key(0), (4, 9), 0, 32)
    inputs, labels = batch[:, :-1], batch[:, 1:]

    def found(weights):
        loss = scanned_decoder.token_loss(decoder, rows=2)
        taught = scanned_decoder.token_loss(decoder, rows=4, eta=0.25, temperature=2.0)
        _, density = decoder.hidden(weights, inputs, with_density=True)
        both = loss(weights, batch), taught(weights, batch, teacher)
        return *both, density["ffn"]

    @jax.jit
    def wanted(weights):
        logits, density = model(inputs, with_density=True)
        theirs = decoder.logits(teacher, decoder.hidden(teacher, inputs))
        nats = -jax.nn.log_softmax(logits)
        nats = jnp.mean(jnp.take_along_axis(nats, labels[..., None], -1))
        taught = sj.distillation_loss(logits, theirs, labels, eta=0.25, temperature=2.0)
        return nats, taught, density["ffn"]

    for got, want in zip(jax.jit(found)(weights), wanted(weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_blocks_of_two_kinds_are_refused():
    config = smollm2_cast.tiny_model().config
    kinds = (sj.nn.Attention, functools.partial(sj.nn.Attention, window=2))
    mixed = models.Decoder(
        models.DecoderConfig(**{**vars(config), "attention": kinds}), rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"of one kind.*layer 1"):
        scanned_decoder.scan_blocks(mixed)


def test_windows_have_every_token_as_a_label_once():
    tokens = np.arange(100, dtype=np.uint16)
    found = scanned_decoder.windows(tokens, 8, multiple=4)
    assert found.shape == (12, 9) and found.dtype == np.int32
    np.testing.assert_array_equal(found[:, 1:].ravel(), np.arange(1, 97))
    np.testing.assert_array_equal(found[:, 0], np.arange(0, 96, 8))
    with pytest.raises(ValueError, match=r"4 windows of 8 \+ 1; got 32"):
        scanned_decoder.windows(tokens[:32], 8, multiple=4)


# --- Many runs ---


def case(steps, seed=0):
    return {"method": "a", "steps": steps, "seed": seed}


def test_a_ledger_does_each_run_once(tmp_path):
    path, done = tmp_path / "runs.json", []

    def measure():
        done.append(1)
        return {"loss": 0.1 + len(done), "lost": math.nan, "ms_step": 0.0}

    first = lm_study.Ledger(path, {"shape": (2, 3)})
    rows = [first.run(case(4, seed), measure) for seed in range(2)]
    assert rows[0]["lost"] is None  # as JSON has it
    again = lm_study.Ledger(path, {"shape": (2, 3)})
    assert [again.run(case(4, seed), measure) for seed in range(2)] == rows
    assert again.rows == rows == json.loads(path.read_text())["rows"]
    again.run(case(8), measure)
    assert len(done) == 3
    with pytest.raises(ValueError, match=r"made with shape=\[2, 4\]; got \[2, 3\]"):
        lm_study.Ledger(path, {"shape": (2, 4)})


def test_a_ledger_does_not_begin_what_would_not_end_in_time(tmp_path):
    path = tmp_path / "runs.json"

    def measure():  # as if a step took 30 ms, and all around the steps no time
        time.sleep(0.03)
        return {"ms_step": 30.0, "loss": 0.0}

    lm_study.Ledger(path, {}, minutes=0).run(case(1), measure)
    ledger = lm_study.Ledger(path, {}, minutes=1)
    ledger.run(case(1, seed=1), measure)
    for length in (2100, lm_study.Seconds(63.0)):
        with pytest.raises(lm_study.OutOfTime):
            ledger.run({"method": "b", **lm_study.as_case(length)}, measure)
    assert ledger.run(case(1), measure) == ledger.rows[0]


def recorded(method, judged_on, lr, before, after, seed=0, on_tune=None):
    steps = {"tune": 1, "test": 3}[judged_on]
    losses = {"loss_before": before, "loss_after": after}
    losses |= {"ms_step": 0.0, "seconds": 1.0}
    where = {"method": method, "judged_on": judged_on, "lr": lr, "steps": steps}
    return {**where, "seed": seed, **losses, lm_tuning.ON_TUNE: on_tune}


def test_a_setting_is_chosen_on_one_part_and_the_best_methods_get_more_seeds():
    ledger = lm_study.Ledger(None, {}, minutes=0)  # any other run would raise
    ledger.rows = [
        recorded("dense", "tune", 1.0, 2.0, 9.0),
        recorded("dense", "tune", 2.0, 3.0, 1.0),  # better, but after the prune
        recorded("dense", "test", 1.0, 2.0, 9.0),
        recorded("first", "tune", 1.0, None, None),  # diverged
        recorded("first", "tune", 2.0, 5.0, 5.0),
        recorded("first", "test", 2.0, 2.0, 3.6, on_tune=3.0),
        recorded("second", "tune", 1.0, 4.0, 4.0),
        recorded("second", "tune", 2.0, 4.5, 4.5),
        recorded("second", "test", 1.0, 2.0, 3.5, on_tune=3.1),  # on `test` it is best
        recorded("dense", "test", 1.0, 2.5, 8.0, seed=1),
        recorded("first", "test", 2.0, 2.0, 3.2, seed=1),
    ]
    settings = lm_tuning.grid(lr=(1.0, 2.0))
    entry = lm_tuning.Entry(lm_methods.sr_ste, settings)
    dense = entry._replace(judged_by=lm_report.BEFORE)
    study = lm_tuning.Study(
        {"dense": dense, "first": entry, "second": entry},
        ledger,
        first=lambda seed: None,
        data=None,
        draw=draw,
        judge=lambda trained, part: {},
        steps_per_call=1,
    )
    options = {"tuning_steps": 1, "steps": 3, "num_seeds": 2, "always": ("dense",)}
    study.run(**options, best=1)
    with pytest.raises(lm_study.OutOfTime):
        study.run(**options)  # the second method's other seed

    lines = lm_report.table(ledger.rows, ("dense", "first", "second"), ("lr",))
    assert [line["seeds"] for line in lines] == [2, 2, 1]
    assert lines[0]["loss_before"] == 2.25 and lines[0]["loss_before_se"] == 0.25
    assert lines[1]["perplexity_after"] == pytest.approx(math.exp(3.4))
    (note,) = lm_report.compare(ledger.rows, "second", "first")
    assert note.endswith("by 0.1000 nats (one seed): holds, but of one seed")
    (note,) = lm_report.compare(ledger.rows, "dense", "first")
    assert note.endswith("by -5.1000 nats (+- 0.3): DOES NOT HOLD")


def test_a_document_is_in_one_part_and_the_text_has_a_digest(tmp_path):
    names = [f"wikipedia/{i}" for i in range(1000)]
    parts = [documents.part_of(name) for name in names]
    assert parts == [documents.part_of(name) for name in names]
    for part in ("tune", "test"):
        assert 70 < parts.count(part) < 130
    found = []
    for last in (3, 4):
        arrays = {part: np.array([1, 2, last], np.uint16) for part in documents.PARTS}
        np.savez(tmp_path / "tokens.npz", **arrays, about=np.array("few"))
        found.append(smollm2_tokens.load(tmp_path / "tokens.npz"))
    assert found[0]["about"] == "few" and found[0]["digest"] != found[1]["digest"]


@pytest.mark.slow
def test_the_quick_study_goes_on_where_it_stopped(tmp_path, capsys):
    path = tmp_path / "study.json"
    whole = run_quick(smollm2_cast, path, capsys)
    assert len(whole["rows"]) == 10
    methods = {row["method"] for row in whole["rows"]}
    assert methods == {smollm2_cast.LOADED, *smollm2_cast.QUICK_NAMES}
    assert all(row["sparsity"] == 0.5 for row in whole["rows"])
    again = run_last_again(smollm2_cast, path, capsys, whole)
    for old, new in zip(whole["rows"], again, strict=True):
        for name in ("ms_step", "seconds"):
            del old[name], new[name]
        assert old == new

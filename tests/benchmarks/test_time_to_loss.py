"""Models raced by the clock: arms, what is told of runs, both studies in short."""

import dataclasses
import functools
import json
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from benchmarks import long_context_training, time_to_loss
from benchmarks.parts import installed_text, lm_race, lm_study, scanned_decoder
from sparsejax import models
from tests.benchmarks.quick import run_quick

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("compile_fast")]

TINY = {"vocab_size": 32, "d_model": 8, "num_layers": 2, "num_heads": 1, "d_ff": 16}
TINY |= {"num_kv_heads": 1, "head_dim": 8}


@functools.cache
def block_sparse():
    """A tiny decoder, and its first weights."""
    ffn = functools.partial(sj.nn.BlockSparseFFN, block_shape=(2, 2))
    decoder, first = scanned_decoder.create(models.DecoderConfig(**TINY, ffn=ffn))
    return decoder, first(0)


# --- Block-sparse FFNs ---


def test_scanned_blocks_read_the_masks_of_the_optimizer():
    decoder, weights = block_sparse()
    rule = time_to_loss.Sparse("rigl", 0.5, block=2).rule
    options = {"update_every": 2, "stop_step": 10, "key": jax.random.key(0)}
    tx = sj.rigl(optax.sgd(0.1), 0.5, **options, **rule)
    batch = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)

    @functools.partial(jax.jit, static_argnums=0)
    def found(by_blocks, opt_state):
        def loss(weights):
            if by_blocks:
                masks = decoder.block_masks(weights, opt_state)
                weights = weights | {"masks": masks}
            else:  # all blocks, of masked weights
                weights = sj.forward_params(opt_state, weights)
            return scanned_decoder.token_loss(decoder, rows=2)(weights, batch)

        return jax.value_and_grad(loss)(weights)

    opt_state = jax.jit(tx.init)(weights)
    grown, kept = (opt_state._replace(step=jnp.int32(step)) for step in (0, 1))
    want_loss, want = found(False, grown)
    for opt_state in (grown, kept):
        loss, grads = found(True, opt_state)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
        if opt_state is kept:  # between updates only kept blocks have a gradient
            want = sj.apply_masks(want, sj.masks_of(kept))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            grads,
            want,
        )


@pytest.mark.parametrize("kind", ["static", "rigl", "gradual"])
def test_every_layer_ends_with_as_many_blocks_as_it_should_have(kind):
    decoder, weights = block_sparse()
    how = time_to_loss.Sparse(kind, 0.75, block=2, update_every=2)

    def losses():
        def loss(weights, batch, teacher):
            leaves = jax.tree.leaves([weights["blocks"], weights["rest"]])
            return sum(jnp.sum((leaf - 0.1) ** 2) for leaf in leaves)

        return loss

    trainer = lm_study.Trainer(
        functools.partial(time_to_loss.by_blocks, how, decoder, losses),
        lambda data, key: data,
        steps_per_call=8,
    )
    options = {"seed": 0, "setting": {"lr": 0.01}}
    trained = trainer.run(weights, None, num_steps=16, **options)
    tell = time_to_loss.kept_blocks(how, decoder)
    assert tell(trained.after, None) == {"sparsity": 0.75}

    begun = trainer.run(weights, None, num_steps=0, **options).after
    gate, drawn = (w["blocks"]["ffn"]["gate"]["kernel"][...] for w in (begun, weights))
    np.testing.assert_allclose(
        gate, np.where(gate != 0, drawn if kind == "gradual" else 2 * drawn, 0)
    )
    assert jnp.mean(gate != 0) == (1 if kind == "gradual" else 0.25)
    masks = [w["masks"]["ffn"]["gate"]["block_mask"] for w in (begun, trained.after)]
    was, now = (mask.get_value().to_blocks() for mask in masks)
    assert bool((was == now).all()) == (kind == "static")

    spoilt = jax.tree.map(jnp.ones_like, trained.after["blocks"])
    with pytest.raises(AssertionError, match=r"be 0 outside; got \{8\}, and 48"):
        tell(trained.after | {"blocks": spoilt}, None)


# --- Attention to blocks ---


def test_gates_alone_learn_from_the_attention_and_only_when_it_is_their_turn():
    arm = long_context_training.quick_arms()["seer 25 %"]
    decoder, first = scanned_decoder.create(
        dataclasses.replace(arm.config, num_layers=1)
    )
    losses = functools.partial(scanned_decoder.token_loss, decoder, rows=1)
    batch = jax.random.randint(jax.random.key(0), (1, 129), 0, 256)
    weights = first(0)

    @jax.jit
    def gradients(weights, step):
        plan = lm_study.Plan(jnp.int32(9), batch, batch, {"lr": jnp.float32(0.1)})
        method = arm.make(decoder, losses, plan)
        opt_state = optax.tree.set(method.tx.init(weights), count=step)
        loss = lambda w: method.loss(method.forward(opt_state, w), batch, None)  # noqa: E731
        return jax.grad(loss)(weights)

    learning, idle = (gradients(weights, jnp.int32(step)) for step in (4, 5))
    paths = jax.tree_util.tree_leaves_with_path(learning)
    for (path, got), other in zip(paths, jax.tree.leaves(idle), strict=True):
        if "gate_key" in jax.tree_util.keystr(path):
            assert jnp.abs(got).max() > 0 and not other.any()
        else:
            np.testing.assert_array_equal(got, other)
            assert other.any()


def test_the_window_keeps_the_last_blocks():
    @jax.jit
    def kept():
        query = jnp.zeros((1, 20, 2, 4))
        options = {"causal": True, "num_kept": 2, "block": 4}
        mask = long_context_training.last_blocks(query, query, **options)
        return mask.to_blocks(), mask.overflowed

    blocks, overflowed = kept()
    wanted = np.tri(5, dtype=bool) & ~np.tri(5, k=-2, dtype=bool)
    np.testing.assert_array_equal(blocks[0, 0], wanted)
    assert not overflowed.any()


@pytest.mark.parametrize("study", [time_to_loss, long_context_training])
def test_arms_of_full_size_can_be_built(study):
    for arm in study.full_arms().values():
        config = dataclasses.replace(arm.config, num_layers=1)
        jax.eval_shape(lambda c=config: scanned_decoder.create(c)[1](0))


# --- What is told ---


def test_when_a_loss_is_reached():
    history = [[1.0, 10, 5.0], [2.0, 20, 3.0], [4.0, 40, 2.0]]
    assert lm_race.seconds_to(history, 4.0) == 1.5
    assert lm_race.seconds_to(history, 2.5) == 3.0
    assert lm_race.seconds_to(history, 6.0) == 1.0
    assert lm_race.seconds_to(history, 1.9) is None
    assert lm_race.seconds_to([[1.0, 10, None], *history[1:]], 4.0) == 2.0


def recorded(method, loss, seed=0, lr=1.0):
    return {
        "method": method,
        "judged_on": "test",
        "seed": seed,
        "lr": lr,
        "loss": loss,
        "history": [[5.0, 1, 4.0], [10.0, 2, loss]],
    }


def test_verdicts_of_equal_and_of_less_time():
    arms = {
        "dense": lm_race.Arm(models.DecoderConfig(), lm_race.plain, is_sparse=False),
        "rigl": lm_race.Arm(models.DecoderConfig(), lm_race.plain),
    }
    less = lm_race.shorter("rigl")
    rows = [recorded("dense", 3.0), recorded("rigl", 2.0), recorded(less, 3.5)]
    lines = lm_race.table(rows, arms, ())
    assert [line["reaches_dense_s"] for line in lines] == [10.0, 7.5, None]
    notes = lm_race.conclusions(rows, arms, 10.0)
    assert any(
        note.startswith("rigl better than dense") and "): holds" in note
        for note in notes
    )
    assert any(
        note.startswith(f"{less} better than dense")
        and note.endswith("-0.5000 nats (one seed): DOES NOT HOLD")
        for note in notes
    )
    assert any("after 7.5 s, 0.75 of the time" in note for note in notes)
    summary = "rigl, a loss below the dense one in equal time or in 0.8 of it: holds"
    assert summary in notes

    rows += [recorded("dense", 2.5, seed=1), recorded("rigl", 2.4, seed=1)]
    notes = lm_race.conclusions(rows, arms, 10.0)
    assert f"{summary}, but within two standard errors" in notes


def test_longer_runs_are_of_dense_controls_and_the_best_sparse_arm(tmp_path, capsys):
    arms = {
        name: lm_race.Arm(models.DecoderConfig(), lm_race.plain, is_sparse=is_sparse)
        for name, is_sparse in {"dense": 0, "a": 1, "b": 1, "control": 0}.items()
    }
    rows = [
        recorded(name, 1.0, lr=lr) | {"loss_on_tune": loss}
        for name, lr, loss in (
            ("dense", 0.1, 9.0),
            ("a", 0.2, None),
            ("b", 0.3, 8.0),
            ("control", 0.4, 7.0),
        )
    ]
    rates = {"dense": 0.1, "b": 0.3, "control": 0.4}
    assert lm_race.repeated(rows, arms) == rates
    with pytest.raises(ValueError, match=r"none is there of \['control'\]"):
        lm_race.repeated(rows[:3], arms)

    path = tmp_path / "race.json"
    for content, said in (
        (None, "No such file"),
        ("{}", "'rows'"),
        ('{"rows": []}', "none is there of ['dense', 'rigl 75 %']"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(SystemExit):
            time_to_loss.main(["--quick", "--as-in", str(path)])
        assert said in capsys.readouterr().err


def test_a_run_of_no_time_is_refused(capsys):
    with pytest.raises(SystemExit):
        time_to_loss.main(["--quick", "--seconds", "0"])
    assert "--seconds must be above 0; got 0.0" in capsys.readouterr().err


def test_a_run_that_diverged_is_told_and_drawn(tmp_path):
    arms = {
        name: lm_race.Arm(
            models.DecoderConfig(), lm_race.plain, is_sparse=name != "dense"
        )
        for name in ("dense", "rigl")
    }
    rows = [recorded("dense", 3.0), recorded("rigl", None)]
    assert lm_race.table(rows, arms, ())[1]["loss"] == np.inf
    (compared,) = [n for n in lm_race.conclusions(rows, arms, 10.0) if "better" in n]
    assert compared.endswith("by -inf nats (+- nan): DOES NOT HOLD")
    lm_race.picture(tmp_path / "race.png", rows, arms, "")
    assert (tmp_path / "race.png").exists()


def test_installed_text_has_each_file_once_and_folders_in_one_part(
    tmp_path, monkeypatch
):
    for name, content in {
        "stdlib/a.py": "a = 1",
        "stdlib/again.py": "b = 2",
        "site/b/b.py": "b = 2",
        "site/b/long.py": "#" * 2**18 + "#",
        "site/b/empty.py": "",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    folders = {"purelib": "site", "platlib": "site", "stdlib": "stdlib"}
    paths = {name: str(tmp_path / folder) for name, folder in folders.items()}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(jax, "__file__", str(tmp_path / "site" / "jax" / "__init__.py"))
    found = [(name.as_posix(), content) for name, content in installed_text.files()]
    assert found == [("b/b.py", b"b = 2"), ("a.py", b"a = 1")]
    of_folders = [
        {installed_text.part_of(pathlib.PurePath(f"{folder}/{file}")) for file in "ab"}
        for folder in range(400)
    ]
    assert all(len(parts) == 1 for parts in of_folders)
    assert 5 < sum(parts == {"test"} for parts in of_folders) < 40


@pytest.mark.slow
@pytest.mark.parametrize("study", [time_to_loss, long_context_training])
def test_the_quick_race_goes_on_where_it_stopped(study, tmp_path, capsys):
    path = tmp_path / "race.json"
    whole = run_quick(study, path, capsys)
    assert len(whole["rows"]) == 8
    assert {row["method"] for row in whole["rows"]} == {
        *(arms := study.quick_arms()),
        lm_race.shorter(next(name for name in arms if arms[name].is_sparse)),
    }
    study.main(["--quick", "--json", str(path)])  # and compiles nothing
    assert json.loads(path.read_text())["rows"] == whole["rows"]

    longer = tmp_path / "longer.json"
    options = ["--quick", "--repeats", "1", "--as-in", str(path), "--seconds", "0.1"]
    study.main([*options, "--json", str(longer)])
    rows = json.loads(longer.read_text())["rows"]
    rates = lm_race.repeated(whole["rows"], study.quick_arms())
    assert {row["method"]: row["lr"] for row in rows} == rates
    assert all(row["judged_on"] == "test" for row in rows)
    assert len(rows) == len(rates) == 2

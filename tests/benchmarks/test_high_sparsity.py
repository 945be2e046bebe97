"""The study of high sparsity: ways, what they cost, tasks, and the whole of it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax as sj
from benchmarks import high_sparsity
from benchmarks.parts import (
    digit_vit,
    lm_methods,
    lm_study,
    lm_tuning,
    scanned_decoder,
    sparse_tasks,
    sparse_ways,
)
from sparsejax import metrics
from sparsejax.typing import plain_path
from tests.benchmarks.quick import run_last_again, run_quick

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("compile_fast")]

PATTERN = sj.NM(1, 4)
STEPS = 10
SETTING = {"lr": 0.01, "pull": 0.1, "ramp": 0.6}
# the share of a kernel that is not zero in the forward of each step, and after the last
DENSITIES = {
    "SR-STE 2e-4": 11 * [1 / 4],
    "SR-STE, tuned decay": 11 * [1 / 4],
    "mask decay, linear": 6 * [1.0] + 5 * [1 / 4],
    "mask decay, exponential": 9 * [1.0] + 2 * [1 / 4],
    "structure decay, stepwise": 2 * [3 / 4] + 2 * [2 / 4] + 7 * [1 / 4],
    "structure decay, geometric": 11 * [1 / 4],
}


@pytest.mark.parametrize("way", sparse_ways.WAYS)
def test_a_way_is_as_dense_as_its_flops_say_and_ends_exactly_sparse(way):
    first = jax.random.normal(jax.random.key(0), (2, 32, 8))
    rule = {"pattern": PATTERN, "stacked": scanned_decoder.stacked_axes}

    def loss(weights, batch, teacher=None):
        del teacher
        return jnp.mean((batch @ weights["blocks"]["kernel"] - 1) ** 2)

    def watch(before, after):
        del after
        return {"kept": jnp.mean(before["blocks"]["kernel"] != 0)}

    trainer = lm_study.Trainer(
        functools.partial(sparse_ways.WAYS[way].make, lambda: loss, rule=rule),
        lambda data, key: data,
        steps_per_call=1,
    )
    trained = trainer.run(
        {"blocks": {"kernel": first}},
        jax.random.normal(jax.random.key(1), (4, 32)),
        num_steps=STEPS,
        seed=0,
        setting=SETTING,
        watch=watch,
    )
    kept = [float(entry["kept"]) for entry in trained.history]
    np.testing.assert_allclose(kept, DENSITIES[way][1:], rtol=1e-6)
    density = sparse_ways.WAYS[way].density(PATTERN, SETTING, STEPS)
    assert density == pytest.approx(np.mean(DENSITIES[way][:STEPS]), rel=1e-6)

    before, after = (
        np.asarray(weights["blocks"]["kernel"])
        for weights in (trained.before, trained.after)
    )
    np.testing.assert_array_equal(before, after)
    groups = after.reshape(2, 8, 4, 8)
    np.testing.assert_array_equal(np.count_nonzero(groups, axis=2), 1)


def test_pruned_weights_fade_by_the_factor_of_the_share_of_the_run():
    factor = functools.partial(lm_methods.mask_factor, ramp=0.5)
    shares = np.array([0.0, 0.25, 0.5, 0.89, 0.9, 1.0])
    np.testing.assert_allclose(
        factor(shares, exponential=True),
        [1, np.exp(-2.5), np.exp(-5), np.exp(-8.9), 0, 0],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        factor(shares, exponential=False), [1, 0.5, 0, 0, 0, 0], atol=1e-6
    )


def test_training_flops_count_dense_gradients_and_dense_forwards():
    specs = [
        metrics.LayerSpec.from_kernel("['ffn']['up']", (30, 10)),
        metrics.LayerSpec.from_kernel("['attention']['out']", (10, 10)),
    ]
    found = [
        sparse_ways.flops_to_dense(specs, way, PATTERN, SETTING, STEPS)
        for way in sparse_ways.WAYS
    ]
    sr_ste = (2 * (0.25 * 300 + 100) + 400) / (3 * 400)
    means = [np.mean(DENSITIES[way][:STEPS]) for way in sparse_ways.PROGRESSIVE]
    want = [sr_ste, sr_ste, *((300 * mean + 100) / 400 for mean in means)]
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("way", sparse_ways.PROGRESSIVE)
def test_as_many_steps_as_take_the_flops_of_sr_ste(way):
    specs = [
        metrics.LayerSpec.from_kernel("ffn", (30, 10)),
        metrics.LayerSpec.from_kernel("out", (10, 10)),
    ]

    def flops(way, steps):
        share = sparse_ways.flops_to_dense(specs, way, PATTERN, SETTING, steps)
        return share * steps

    found = sparse_ways.equal_steps(
        specs, way, PATTERN, SETTING, steps=500, multiple=25
    )
    assert found % 25 == 0
    assert flops(way, found) <= flops(sparse_ways.SR_STE, 500) < flops(way, found + 25)


def test_every_way_has_as_many_settings():
    grids = [sparse_ways.DENSE_GRID, *(way.grid for way in sparse_ways.WAYS.values())]
    assert {len(grid) for grid in grids} == {6}


# --- The digits ---


def test_a_vision_transformer_sees_every_patch_from_each():
    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}
    config = digit_vit.config(d_model=8, head_dim=4, **sizes)
    model = digit_vit.DigitViT(config, rngs=nnx.Rngs(0))
    decoder, weights = scanned_decoder.scan_blocks(model)
    images = jax.random.uniform(jax.random.key(0), (3, 28, 28))
    moved = images.at[:, 27, 27].add(1.0)  # in the last patch

    @jax.jit
    def both(images):
        hidden = decoder.hidden(weights, images)
        return hidden, decoder.logits(weights, hidden), model(images)

    hidden, logits, want = both(images)
    assert hidden.shape == (3, 49, 8) and logits.shape == (3, 10)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)
    assert (jnp.abs(both(moved)[0] - hidden).max(-1) > 0).all()

    labels = jnp.array([1, 2, 3])
    batch = {"images": images, "labels": labels}
    quality = digit_vit.quality(decoder, weights, batch)
    hits = jnp.argmax(want, axis=-1) == labels
    nats = -jax.nn.log_softmax(want)[jnp.arange(3), labels]
    np.testing.assert_allclose(quality["accuracy"], jnp.mean(hits))
    np.testing.assert_allclose(quality["loss"], jnp.mean(nats), rtol=1e-4)


def test_a_patch_is_a_square_of_the_image():
    embed = digit_vit.PatchEmbed(16, dtype=jnp.float32, rngs=nnx.Rngs(0))
    embed.project.kernel = nnx.Param(jnp.eye(16))
    embed.positions = nnx.Param(jnp.zeros((49, 16)))
    image = np.arange(28 * 28, dtype=np.float32).reshape(28, 28)
    found = embed(jnp.asarray(image)[None])[0]
    np.testing.assert_array_equal(found[8], image[4:8, 4:8].ravel())
    np.testing.assert_array_equal(found[-1], image[24:, 24:].ravel())


def test_images_are_moved_by_at_most_two_pixels():
    image = np.zeros((1, 28, 28), np.float32)
    image[0, 10, 20] = 1
    data = {"images": jnp.asarray(image), "labels": jnp.array([7])}
    batch = jax.jit(digit_vit.draw(200))(data, jax.random.key(0))
    np.testing.assert_array_equal(batch["labels"], 7)
    assert batch["images"].shape == (200, 28, 28)
    which, rows, columns = np.nonzero(np.asarray(batch["images"]))
    np.testing.assert_array_equal(which, np.arange(200))
    np.testing.assert_array_equal(np.unique(rows), np.arange(8, 13))
    np.testing.assert_array_equal(np.unique(columns), np.arange(18, 23))


def test_images_are_in_one_part_and_classes_are_equal(tmp_path):
    noise = digit_vit.noise()
    lines = np.column_stack([noise["images"].reshape(100, -1), noise["labels"]])
    file = tmp_path / "digits.csv.gz"
    np.savetxt(file, lines, fmt="%d", delimiter=",")
    parts = digit_vit.split(digit_vit.read(file))
    assert parts["digest"] == digit_vit.split(noise)["digest"]
    images = [parts[part]["images"] for part in ("train", "tune", "test")]
    assert [len(part) for part in images] == [60, 20, 20]
    assert len(np.unique(np.concatenate(images), axis=0)) == 100
    assert all(0 <= part.min() and 0.99 < part.max() <= 1 for part in images)
    np.testing.assert_array_equal(np.bincount(parts["test"]["labels"]), 2)
    noise["labels"][0] += 1
    assert digit_vit.split(noise)["digest"] != parts["digest"]


# --- The study ---


def test_the_kernels_of_ffns_are_sparse_and_the_products_of_blocks_count():
    sizes = dataclasses.replace(sparse_tasks.QUICK["digits"], num_layers=3)
    task = sparse_tasks.digits_task(sizes, digit_vit.noise())
    shapes = jax.eval_shape(task.first, 0)
    sparse = jax.tree_util.tree_map_with_path(high_sparsity.is_ffn_kernel, shapes)
    chosen = [
        plain_path(path)
        for path, is_chosen in jax.tree_util.tree_leaves_with_path(sparse)
        if is_chosen
    ]
    kernels = [("blocks", "ffn", name, "kernel") for name in ("down", "gate", "up")]
    assert sorted(chosen) == kernels

    found = {spec.name: spec.macs for spec in sparse_tasks.products(task, sizes)}
    of_ffns = [macs for name, macs in found.items() if "ffn" in name]
    assert of_ffns == 3 * [49 * 3 * 64 * 64]
    assert found.pop("attention") == 2 * 49 * 49 * 3 * 2 * 8
    assert sum(found.values()) - sum(of_ffns) == 4 * 49 * 3 * 64 * 16


def test_too_many_weights_and_a_prune_that_is_due_are_refused():
    kernel = np.zeros((1, 8, 2), np.float32)
    kernel[0, ::4] = 1.0
    weights = {"blocks": {"ffn": {"kernel": jnp.asarray(kernel)}}}
    check = high_sparsity.checked_sparsity
    same = lm_study.Trained(weights, weights, 0.0, [])
    assert check(same, PATTERN) == 0.75
    with pytest.raises(AssertionError, match=r"at most 1 of 8 weights.*got 2"):
        check(same, sj.NM(1, 8))
    due = same._replace(before=jax.tree.map(lambda w: w + 1, weights))
    with pytest.raises(AssertionError, match="that of pruned weights"):
        check(due, PATTERN)
    diverged = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), weights)
    assert check(same._replace(before=diverged), PATTERN) == 0.75


def test_methods_with_one_make_share_a_program_that_is_compiled_before():
    made = []

    def make(plan):
        made.append(plan)
        return lm_methods.plain(lambda: lambda w, batch, _: jnp.sum(w * batch), plan)

    entries = {
        name: lm_tuning.Entry(make, [{"lr": rate}], "loss")
        for name, rate in (("slow", 0.1), ("fast", 0.2))
    }
    study = lm_tuning.Study(
        entries,
        lm_study.Ledger(None, {}),
        first=lambda seed: jnp.ones(2),
        data=jnp.ones(2),
        draw=lambda data, key: data,
        judge=lambda trained, part: {"loss": float(trained.after[0])},
        steps_per_call=1,
    )
    study.compile(entries)
    traced = len(made)
    chosen = study.run(tuning_steps=2, steps=2, num_seeds=1)
    assert len(made) == traced
    assert chosen == {"slow": {"lr": 0.1}, "fast": {"lr": 0.2}}
    slow, fast = (study.row(name, "test", chosen[name], steps=2) for name in entries)
    assert 1 > slow["loss"] > fast["loss"]


def told(way, pattern, losses):
    return [
        {"method": f"{pattern} {way}", "judged_on": "test", "seed": seed, "loss": loss}
        for seed, loss in enumerate(losses)
    ]


def test_the_claim_is_of_all_patterns_above_its_sparsity():
    rows = told("old", "2:4", (1.0, 1.1)) + told("new", "2:4", (1.5, 1.6))
    for pattern in ("1:8", "1:16"):
        rows += told("old", pattern, (2.0, 2.1)) + told("new", pattern, (1.8, 1.96))
    (note,) = high_sparsity.claim(rows, "new", "old")
    assert "by -0.5000 (+- 0) at 2:4, 0.1700 (+- 0.03) at 1:8, 0.17" in note
    assert note.endswith("not all of these were run")
    rows += told("old", "1:32", (2.0, 2.1))
    for unclear, verdict in ((1.96, "holds"), (2.05, "DOES NOT HOLD")):
        last = told("new", "1:32", (1.8, unclear))
        (note,) = high_sparsity.claim(rows + last, "new", "old")
        assert note.endswith(f">= 80%: {verdict}")
    assert not high_sparsity.claim(rows, "new", "other")


def test_a_decoder_begins_to_learn_text():
    sizes, pattern = sparse_tasks.QUICK["text"], sj.NM(1, 8)
    task = sparse_tasks.text_task(sizes)
    entries = high_sparsity.entries_of(pattern, task, [sparse_ways.SR_STE], 1)
    ledger = lm_study.Ledger(None, {})
    study = high_sparsity.make_study(pattern, entries, task, sizes, ledger)
    ((name, entry),) = entries.items()
    found = study.row(name, "test", entry.grid[0], steps=2)
    assert found["sparsity"] == 7 / 8
    assert found["loss"] == pytest.approx(math.log(256), abs=1)


@pytest.mark.slow
def test_the_quick_study_of_digits_goes_on_where_it_stopped(tmp_path, capsys):
    path = tmp_path / "study.json"
    options = ("--task", "digits")
    whole = run_quick(high_sparsity, path, capsys, *options)
    assert len(whole["rows"]) == 11
    sparse = [row for row in whole["rows"] if row["method"] != high_sparsity.DENSE]
    assert {row["sparsity"] for row in sparse} == {7 / 8}
    again = [row for row in sparse if row["method"].endswith(high_sparsity.EQUAL)]
    assert [row["steps"] for row in again] == [2, 2]  # of 4
    rows = run_last_again(high_sparsity, path, capsys, whole, *options)
    assert len(rows) == 11

"""Checkpoints hold any state bit for bit, and a damaged one is stepped over.

Foreign and hostile folders are read without running anything that is in them.
"""

import functools
import gc
import json
import pickle
import re
import resource
import shutil
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts
from flax import nnx

from sparsejax import models, training


class Extra(NamedTuple):
    masks: object
    key: jax.Array


@functools.cache
def make_state(step):
    config = models.DecoderConfig(
        d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8
    )
    params = nnx.state(models.Decoder(config, rngs=nnx.Rngs(step)), nnx.Param)
    masks = jax.tree.map(lambda x: x > 0 if x.ndim > 1 else None, params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return training.TrainState(
        step=jnp.int32(step),
        params=half,
        opt_state=(optax.adamw(1e-3).init(params), Extra(masks, jax.random.key(step))),
    )


def data(tree):
    """Keys as numbers, so that trees compare."""

    def numbers(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(numbers, tree)


def test_round_trip_is_bit_exact(tmp_path):
    assert training.restore_checkpoint(tmp_path / "none", make_state(0)) is None
    state = make_state(3)
    training.save_checkpoint(tmp_path, 3, state)
    restored = training.restore_checkpoint(tmp_path, make_state(0))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(data(restored), data(state))


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        training.save_checkpoint(tmp_path, step, make_state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "3"]
    assert training.restore_checkpoint(tmp_path, make_state(0)).step == 10


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (2**31, 2), (0, 0)])
def test_what_would_not_be_found_again_is_not_saved(tmp_path, step, keep):
    with pytest.raises(ValueError, match=f"got step={step} and keep={keep}"):
        training.save_checkpoint(tmp_path / "a", step, {"x": jnp.ones(1)}, keep=keep)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("step", [3, 5])
def test_an_older_step_is_refused_before_anything_is_written(tmp_path, step):
    for newest in (3, 5):
        training.save_checkpoint(tmp_path, newest, {"x": jnp.ones(newest)})
    folder = re.escape(str(tmp_path))
    with pytest.raises(
        ValueError, match=f"got step={step}, and {folder} holds step 5 already"
    ):
        training.save_checkpoint(tmp_path, step, {"x": jnp.ones(1)}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "5"]
    restored = training.restore_checkpoint(tmp_path, {"x": jnp.zeros(5)})
    chex.assert_trees_all_equal(restored, {"x": jnp.ones(5)})


@pytest.mark.parametrize("like", ["arrays", "shapes"])
def test_leaves_without_entries(tmp_path, like):
    keys = jax.random.split(jax.random.key(0), 2)
    tree = [jnp.ones((0, 3), jnp.bfloat16), {"a": keys[:0], "b": keys}, jnp.ones(2)]
    training.save_checkpoint(tmp_path, 0, tree)
    wanted = tree if like == "arrays" else jax.eval_shape(lambda: tree)
    restored = training.restore_checkpoint(tmp_path, wanted)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, tree)
    chex.assert_trees_all_equal(data(restored), data(tree))
    assert restored[0] is not tree[0]  # one may be donated


def test_empty_nodes_and_numbers(tmp_path):
    """What optax and mask trees are made of, beside arrays."""
    state = (
        optax.EmptyState(),
        {"none": None, "masked": optax.MaskedNode(), "nothing": {}, "list": [None]},
        [None, jnp.ones(3), np.float64(2), 7],
    )
    training.save_checkpoint(tmp_path, 0, state)
    restored = training.restore_checkpoint(tmp_path, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal(restored, state)


def checksum_oracle(x):
    """The sum by hand, word by word."""
    total = 0
    for place, word in enumerate(map(int, x.view(np.uint32).ravel())):
        word = (word + place * 0x9E3779B9) % 2**32
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        total += word ^ word >> 16
    return total % 2**32


def test_checksums_see_every_bit_and_its_place():
    def checksum(x):
        return int(training._checkpoint._checksums([x])[0])

    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    others = [x[::-1], x[:, ::-1], np.where(x == 3, -x, x)]
    others.append(np.where(x > 22, -others[-1], others[-1]))
    for index in ((0, 0, 0), (1, 2, 3)):
        for bit in range(32):
            others.append(x.copy())
            others[-1].view(np.uint32)[index] ^= np.uint32(1 << bit)
    assert checksum(x) not in [checksum(other) for other in others]
    assert checksum(x) == checksum_oracle(x)
    for dtype in (bool, np.int8, np.float16, jnp.bfloat16, np.complex64):
        some = np.ones(5).astype(dtype)
        other = np.where(np.arange(5) == 3, 0, some).astype(dtype)
        assert checksum(some) != checksum(other), dtype
    with jax.enable_x64(True):
        other = np.ones(3).view(np.uint64) ^ np.array([0, 1 << 63, 0], np.uint64)
        assert checksum(np.ones(3)) != checksum(other.view(np.float64))


def largest_file(folder):
    return max(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def remove_a_file(folder):
    largest_file(folder).unlink()


def remove_everything(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def deep_json(folder):
    (folder / "default" / "_METADATA").write_text("[" * 100_000)


def pickled(folder):
    """In the place of each file: it would write one, were it unpickled."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.write_bytes(pickle.dumps(Bomb(str(folder.parent / "exploded"))))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, remove_a_file, remove_everything, deep_json, pickled],
)
def test_a_damaged_checkpoint_is_stepped_over(tmp_path, damage):
    for step in (1, 2):
        training.save_checkpoint(tmp_path, step, make_state(step))
    damage(tmp_path / "2")
    gc.freeze()  # what was there before need not be visited below
    with pytest.warns(
        UserWarning, match=r"2 cannot be read .*damaged-2; going on from step 1"
    ):
        restored = training.restore_checkpoint(tmp_path, make_state(0))
        gc.collect()  # Orbax, where it fails, drops a coroutine: warns in here
    chex.assert_trees_all_equal(data(restored), data(make_state(1)))
    # There is room for the step again.
    training.save_checkpoint(tmp_path, 2, make_state(2))
    assert training.restore_checkpoint(tmp_path, make_state(0)).step == 2
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["1", "2", "damaged-2"]  # and nothing exploded


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    training.save_checkpoint(tmp_path, 1, make_state(1))
    partial = tmp_path / "2.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "data").write_bytes(b"...")
    assert training.restore_checkpoint(tmp_path, make_state(0)).step == 1
    training.save_checkpoint(tmp_path, 2, make_state(2))
    assert training.restore_checkpoint(tmp_path, make_state(0)).step == 2


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"b": jnp.zeros(3)}, r"the two: tree.a, tree.b \(the method"),
        ({"a": jnp.zeros(4)}, r"tree.a must be float32 \(4,\); .* float32 \(3,\)"),
        ({"a": jnp.zeros(3, jnp.bfloat16)}, r"must be bfloat16 .* has float32"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(3)}, "in only one of the two: tree.b"),
    ],
    ids=["name", "shape", "dtype", "more"],
)
def test_another_structure_raises_and_renames_nothing(tmp_path, like, message):
    training.save_checkpoint(tmp_path, 1, {"a": jnp.zeros(3)})
    folder = re.escape(str(tmp_path))
    with pytest.raises(
        ValueError,
        match=f"none of the 1 checkpoints in {folder} .* step 1: .*{message}",
    ):
        training.restore_checkpoint(tmp_path, like)
    assert training.restore_checkpoint(tmp_path, {"a": jnp.zeros(3)}) is not None


def test_all_damaged_names_the_folder_and_renames_nothing(tmp_path):
    tree = {"a": jnp.arange(3)}
    for step in (1, 2):
        training.save_checkpoint(tmp_path, step, tree)
        remove_everything(tmp_path / str(step))
    folder = re.escape(str(tmp_path))
    with pytest.raises(ValueError, match=f"none of the 2 .* {folder} .* at step 2"):
        training.restore_checkpoint(tmp_path, tree)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_only_folders_named_by_a_step_are_read(tmp_path):
    tree = {"a": jnp.arange(3)}
    training.save_checkpoint(tmp_path, 1, tree)
    (tmp_path / "7").write_text("a file")
    for name in ("thesis", "-3", "0008", "9" * 30, str(2**31), "1_0"):
        (tmp_path / name).mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    chex.assert_trees_all_equal(training.restore_checkpoint(tmp_path, tree), tree)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_hostile_shape_takes_no_memory(tmp_path):
    """A leaf of 4 EB, and chunks of 4 TB for one of 12 bytes."""
    tree = {"a": jnp.arange(3)}
    changes = {2: {"shape": [2**60]}, 3: {"chunks": [2**40]}}
    training.save_checkpoint(tmp_path, 1, tree)
    for step, change in changes.items():
        training.save_checkpoint(tmp_path, step, tree, keep=3)
        base = f"file://{tmp_path}/{step}/default/"
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        content = json.loads(store["tree.a/.zarray"])
        store["tree.a/.zarray"] = json.dumps(content | change).encode()
    with pytest.warns(UserWarning, match="going on from step 1") as caught:
        restored = training.restore_checkpoint(tmp_path, tree)
    said = "".join(str(w.message) for w in caught)
    assert f"tree.a must be int32 (3,); the checkpoint has int32 ({2**60},)" in said
    assert f"tree.a of shape (3,) has larger chunks, ({2**40},)" in said
    chex.assert_trees_all_equal(restored, tree)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The system refuses to write more than a few bytes to a file."""
    rng = np.random.default_rng(0)
    tree = {"a": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}
    training.save_checkpoint(tmp_path, 1, tree)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match=r"cannot save step 2 in .*File too large"):
            training.save_checkpoint(tmp_path, 2, tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    chex.assert_trees_all_equal(training.restore_checkpoint(tmp_path, tree), tree)
    training.save_checkpoint(tmp_path, 2, tree)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.filterwarnings("ignore:the checkpoint .* cannot be read")
def test_a_step_may_be_damaged_again(tmp_path):
    tree = {"a": jnp.arange(3)}
    training.save_checkpoint(tmp_path, 1, tree)
    for _ in range(2):  # the second time `damaged-2` is there
        training.save_checkpoint(tmp_path, 2, tree)
        shutil.rmtree(tmp_path / "2" / "default")
        chex.assert_trees_all_equal(training.restore_checkpoint(tmp_path, tree), tree)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "damaged-2"]

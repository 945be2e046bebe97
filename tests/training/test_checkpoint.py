"""Checkpoints hold any state bit for bit, and a damaged one is stepped over."""

import gc
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax import models, training


class Extra(NamedTuple):
    masks: object
    key: jax.Array


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


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove_a_file])
def test_a_damaged_checkpoint_is_stepped_over(tmp_path, damage):
    for step in (1, 2):
        training.save_checkpoint(tmp_path, step, make_state(step))
    damage(tmp_path / "2")
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
    assert names == ["1", "2", "damaged-2"]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    training.save_checkpoint(tmp_path, 1, make_state(1))
    partial = tmp_path / "2.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "data").write_bytes(b"...")
    assert training.restore_checkpoint(tmp_path, make_state(0)).step == 1
    training.save_checkpoint(tmp_path, 2, make_state(2))
    assert training.restore_checkpoint(tmp_path, make_state(0)).step == 2


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_another_structure_raises_and_renames_nothing(tmp_path):
    training.save_checkpoint(tmp_path, 1, {"a": np.zeros(3)})
    with pytest.raises(ValueError, match="none of the 1 checkpoints in"):
        training.restore_checkpoint(tmp_path, {"b": np.zeros(4)})
    gc.collect()
    assert training.restore_checkpoint(tmp_path, {"a": np.zeros(3)}) is not None

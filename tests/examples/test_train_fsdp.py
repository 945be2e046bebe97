"""Two processes train, save and step over damage; one process restores their bits."""

import os
import shutil
import warnings

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from benchmarks import kill_resume, multi_process
from examples import train_fsdp
from sparsejax import training

WORK = (
    "import sys; from tests.examples import test_train_fsdp as t; t.work(*sys.argv[1:])"
)
TINY = (
    *("--text", "LICENSE", "--seq-len", "8", "--d-model", "32", "--num-layers", "1"),
    *("--steps", "2", "--checkpoint-every", "1", "--update-every", "1"),
)


def work(folder: str, *options: str) -> None:
    """One of the two processes."""
    state = train_fsdp.main([*options, "--runs", folder])
    first, arrays = jax.process_index() == 0, multi_process.whole(state)
    saved = training.Run(train_fsdp.Path(folder, "train_fsdp")).checkpoints("fsdp")
    if first:
        np.savez(f"{folder}/saved.npz", **arrays)
        shutil.copytree(saved, f"{folder}/sound")
        # what only the second process reads
        os.truncate(kill_resume.largest(saved / "2/default/ocdbt.process_1"), 1)
    multihost_utils.sync_global_devices("damaged")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert training.restore_checkpoint(saved, state).step == 1
    (said,) = [str(w.message) for w in caught if "going on from" in str(w.message)]
    assert f"{saved / '2'} cannot be read and is now damaged-2" in said
    assert ("another process cannot read" in said) == first
    multihost_utils.sync_global_devices("restored")
    if first:
        assert {path.name for path in saved.iterdir()} == {"1", "damaged-2"}
        shutil.rmtree(saved)
        shutil.move(f"{folder}/sound", saved)


@pytest.mark.slow
@pytest.mark.once
def test_one_process_restores_what_two_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles faster
    said = multi_process.wait(multi_process.launch(2, WORK, str(tmp_path), *TINY))
    assert "2 processes, 2 devices" in said
    monkeypatch.chdir(multi_process.ROOT)
    state = train_fsdp.main([*TINY, "--runs", str(tmp_path), "--resume"])
    assert f"1 processes, {len(jax.devices())} devices" in capsys.readouterr().out
    kernel = state.params["blocks"][0]["ffn"]["gate"]["kernel"][...]
    assert kernel.sharding.num_devices == len(jax.devices())
    assert not kernel.sharding.is_fully_replicated
    arrays = multi_process.whole(state)
    with np.load(tmp_path / "saved.npz") as saved:
        assert saved.keys() == arrays.keys()
        for name, array in arrays.items():
            assert saved[name].dtype == array.dtype, name
            assert saved[name].tobytes() == array.tobytes(), name
    masks = [array for name, array in arrays.items() if ".masks" in name]
    assert len(masks) == 7 and all(mask.dtype == bool for mask in masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--coordinator", "localhost:1"), "go together; got localhost:1, None, None"),
        (("--batch-size", "12"), "must be a multiple of the 8 devices; got 12"),
        (("--text", "no-such-file"), "cannot read the text no-such-file"),
        (("--sparsity", "1.5"), "`sparsity` must be the share of zeros"),
        (("--evaluate-every", "0"), "--evaluate-every: must be 1 or more; got '0'"),
        (("--seed=-1",), "--seed: must be 0 or more; got '-1'"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    tmp_path, capsys, options, message
):
    with pytest.raises(SystemExit) as stopped:
        train_fsdp.main(["--runs", str(tmp_path / "runs"), *options])
    said = capsys.readouterr().err + str(stopped.value)
    assert message in said
    assert not (tmp_path / "runs").exists()

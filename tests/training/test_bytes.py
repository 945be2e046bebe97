"""Byte texts: how they are split, what a batch depends on, and what is refused."""

import numpy as np
import pytest

from sparsejax import training


def test_standard_library_is_there_and_split_by_file():
    text = training.standard_library_text()
    assert text.train.size > 5_000_000
    assert 0.02 < text.validation.size / text.train.size < 0.12
    assert text.train.dtype == text.validation.dtype == np.uint8
    # A file is in one part: the licence line of `argparse` or of any other, whole.
    whole = bytes(text.train), bytes(text.validation)
    import argparse
    import json
    import pathlib

    for module in (argparse, json):
        source = pathlib.Path(module.__file__).read_bytes()
        assert [source in part for part in whole].count(True) == 1
    assert training.standard_library_text().describe() == text.describe()


def test_files_give_their_tails_to_validation(tmp_path):
    contents = [bytes(range(100)), bytes(range(100, 140))]
    paths = [tmp_path / "a.txt", tmp_path / "b.bin"]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    text = training.text_from_files(paths)
    assert bytes(text.train) == contents[0][:95] + contents[1][:38]
    assert bytes(text.validation) == contents[0][95:] + contents[1][38:]
    assert text.describe()["train_bytes"] == 133


def test_digest_sees_one_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 100)
    before = training.text_from_files([path]).describe()
    path.write_bytes(b"x" * 99 + b"y")
    after = training.text_from_files([path]).describe()
    assert before["sha256"] != after["sha256"]


@pytest.mark.parametrize("what", ["missing", "folder", "endless"])
def test_unreadable_files_are_named(tmp_path, what):
    path = tmp_path / "text"
    if what == "folder":
        path.mkdir()
    if what == "endless":
        path.symlink_to("/dev/zero")
    with pytest.raises(OSError, match=f"cannot read the text {path}: .*Check the path"):
        training.text_from_files([path])


def test_short_texts_are_refused_with_sizes(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"a" * 1000)
    text = training.text_from_files([path])
    training.require_length(text, batch_size=5, seq_len=9)
    with pytest.raises(
        ValueError, match=r"validation part .* 60 bytes; got 50 .*short"
    ):
        training.require_length(text, batch_size=6, seq_len=9)
    with pytest.raises(ValueError, match=r"train part .* 1,000 bytes; got 950 bytes"):
        training.require_length(text, batch_size=10, seq_len=99)


def test_less_than_one_batch_is_refused():
    text = training.ByteText("", np.ones(90, np.uint8), np.ones(20, np.uint8))
    for sizes in ({"batch_size": 0, "seq_len": 4}, {"batch_size": 2, "seq_len": -1}):
        with pytest.raises(ValueError, match="must be at least 1; got"):
            training.require_length(text, **sizes)
    with pytest.raises(ValueError, match=r"window of 20 \+ 1 bytes; got 20"):
        training.sample_batch(text.validation, seed=0, step=0, batch_size=1, seq_len=20)
    sizes = {"batch_size": 3, "seq_len": 9}
    for data, num_batches in ((text.validation, 2), (text.train, 0)):
        with pytest.raises(ValueError, match=rf"3 x \(9 \+ 1\) .* and {num_batches}\."):
            training.validation_batches(data, num_batches=num_batches, **sizes)


def test_a_batch_depends_on_seed_and_step_alone():
    data = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    sizes = {"batch_size": 8, "seq_len": 16}

    def batch(seed, step):
        return training.sample_batch(data, seed=seed, step=step, **sizes)

    assert batch(0, 0).shape == (8, 17)
    np.testing.assert_array_equal(batch(3, 5), batch(3, 5))
    assert (batch(3, 5) != batch(3, 6)).any()
    assert (batch(3, 5) != batch(4, 5)).any()
    rows = slice(2, 5)
    some = training.sample_batch(data, seed=3, step=5, rows=rows, **sizes)
    np.testing.assert_array_equal(some, batch(3, 5)[rows])
    for row in batch(3, 5):
        assert bytes(row.astype(np.uint8)) in bytes(data)


def test_batches_reach_both_ends():
    data = np.arange(20, dtype=np.uint8)
    seen = training.sample_batch(data, seed=0, step=0, batch_size=500, seq_len=3)
    assert set(seen[:, 0]) == set(range(17))
    assert seen.max() == 19


def test_validation_windows_are_even_and_apart():
    data = np.arange(250, dtype=np.uint8)
    sizes = {"batch_size": 2, "seq_len": 9}
    windows = training.validation_batches(data, num_batches=3, **sizes)
    assert windows.shape == (3, 2, 10)
    np.testing.assert_array_equal(windows[:, :, 0].ravel(), 41 * np.arange(6))
    every = training.validation_batches(data, num_batches=1000, **sizes)
    assert every.shape == (12, 2, 10)
    assert np.unique(every).size == every.size

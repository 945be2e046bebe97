"""The SparseD example, tiny: it runs, and its sparse steps read what matters."""

import pytest

from examples import sparse_diffusion as example

TINY = [
    *("--seq-len", "32", "--block", "4", "--denoise-steps", "8", "--d-model", "32"),
    *("--batch-size", "32", "--samples", "16", "--num-layers", "1"),
]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.usefixtures("compile_fast")
def test_a_window_of_as_many_blocks_is_worse(capsys):
    rows = {row["attention"]: row for row in example.main([*TINY, "--steps", "200"])}
    assert rows["dense"]["blocks read"] == 1
    for name in ("SparseD", "SparseD, chosen at once", "window"):
        assert rows[name]["blocks read"] == 0.5, name  # 2 + 2 of 8 in each row
    assert rows["dense"]["right"] >= rows["SparseD"]["right"] - 0.02
    assert rows["SparseD"]["right"] > rows["window"]["right"] + 0.2
    assert "| SparseD, chosen at once |" in capsys.readouterr().out


def test_bad_input_is_named(capsys):
    for options, message in [
        (("--seq-len", "7"), "hold two blocks of --block, at least 1; got 7 and 4"),
        (("--d-model", "12"), "--d-model must be a multiple of 8; got 12"),
        (("--batch-size", "0"), "--batch-size must be at least 1; got 0"),
        (("--density", "0"), "--density must be in (0, 1]; got 0.0"),
        (("--skip", "2"), "`skip` must be in [0, 1]; got 2.0"),
        (("--denoise-steps", "0"), "`num_steps` must be at least 1; got 0"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            example.main([*TINY, *options])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

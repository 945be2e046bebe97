"""The SeerAttention example, tiny: it runs, and trained gates recall more."""

import pytest

from examples import distill_seer_attention as example

TINY = [
    *("--steps", "20", "--distill-steps", "40", "--seq-len", "128", "--block", "2"),
    *("--num-layers", "1", "--d-model", "64", "--batch-size", "4"),
]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.usefixtures("compile_fast")
def test_trained_gates_recall_more(capsys):
    rows = example.main(TINY)
    assert [row["density"] for row in rows] == list(example.DENSITIES)
    for row in rows:
        assert abs(row["realised"] - row["density"]) < 0.06
        for other in ("untrained gate", "random"):
            assert row[other] + 0.01 < row["trained gate"]
    said = capsys.readouterr().out
    assert "bits per byte after 20 steps" in said and "| trained gate |" in said


def test_bad_input_is_named(capsys):
    for options, message in [
        (("--block", "129"), "--block must be at most --seq-len; got 129 and 128"),
        (("--steps", "0"), "--steps must be at least 1; got 0"),
        (("--distill-steps", "0"), "--distill-steps must be at least 1; got 0"),
        (("--block", "0"), "`block` must be at least 1; got 0"),
        (("--d-model", "0"), "`d_model` must be at least 1; got 0"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            example.main([*TINY, *options])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

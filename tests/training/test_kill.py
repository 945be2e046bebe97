"""Kill -9 at random moments, resume: the same bits. Fifty kills: the benchmark."""

import pytest

from benchmarks import kill_resume

JOB = (
    *("--dense-steps", "8", "--steps", "8", "--checkpoint-every", "3"),
    *("--evaluate-every", "5", "--d-model", "32", "--num-layers", "1"),
    *("--batch-size", "2", "--seq-len", "16"),
)


@pytest.mark.slow
@pytest.mark.once
def test_two_kills_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles faster
    rows = kill_resume.study_kills(tmp_path / "runs", num_kills=2, options=JOB)
    assert sum(row["kills"] for row in rows) >= 2
    assert [row["differences"] for row in rows] == [""] * len(rows)
    assert rows[0]["arrays_compared"] > 50

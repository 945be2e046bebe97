"""The suite knows how each file was made, and does again only what it must."""

import dataclasses
import importlib
import pathlib
import re
import sys

import pytest

from benchmarks import suite

pytestmark = pytest.mark.once

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results"
AT = [suite.Place("cpu", "cpu", {}, "cpu")]
WRITES = "import json, sys; json.dump({}, open(sys.argv[-1], 'w'))"


@dataclasses.dataclass(frozen=True)
class Script(suite.Job):
    """A job that runs `code`."""

    code: str = WRITES
    on: str = "cpu"

    def command(self, *args):
        return [sys.executable, "-S", "-c", self.code, *super().command(*args)]


def states(jobs, folder, **options):
    found = suite.Suite(jobs, folder, **options)
    fine = found.run(AT)
    return fine, {row["file"]: row["state"] for row in found.rows}


def test_each_file_of_results_has_one_job():
    for path in RESULTS.glob("*.json"):
        device = re.search(r"_(cpu|h100|h200)\.", path.name)
        on = {"cpu": "cpu", None: None}.get(device and device[1], "gpu")
        makers = [
            job
            for job in suite.JOBS
            if path.name == job.file(device[1] if device else "")
            and on in (None, job.on)
        ]
        assert len(makers) == 1, path.name


@pytest.mark.parametrize("job", suite.JOBS, ids=lambda job: f"{job.name}_{job.on}")
def test_commands_are_those_of_the_scripts(job, monkeypatch, capsys, tmp_path):
    _, _, module, *options = job.command("cpu", tmp_path / "none", tmp_path, 600)
    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", [module, *options])
    with pytest.raises(SystemExit):
        main()
    assert "there is no folder" in capsys.readouterr().err  # after all was parsed


def test_what_ended_well_is_not_done_again(tmp_path, capsys):
    jobs = [Script("good", 1), Script("bad", 2, code="raise SystemExit(3)")]
    fine, found = states(jobs, tmp_path)
    assert not fine
    assert found == {
        "bad_cpu.json": "failed: exit code 3, see its log",
        "good_cpu.json": "ended well",
    }
    fine, found = states(
        [Script("good", 1, code="raise SystemExit(3)"), Script("bad", 2)], tmp_path
    )
    assert fine
    assert found == {
        "bad_cpu.json": "ended well",
        "good_cpu.json": "ended well before",
    }
    assert "cpu: good_cpu.json ended well before" in capsys.readouterr().out


def test_a_study_goes_on_until_its_file_is_complete(tmp_path):
    minutes = "{'env': {'complete': '--minutes' not in sys.argv}}"
    job = Script("study", 9, resumes=True, code=WRITES.replace("{}", minutes))
    assert states([job], tmp_path, minutes=2) == (
        True,
        {"study_cpu.json": "goes on with the next call"},
    )
    assert states([job], tmp_path)[1] == {"study_cpu.json": "ended well"}


def test_time_is_kept(tmp_path):
    begins = Script("begins", 0, code="import time; time.sleep(60)")
    waits = Script("waits", 1)
    fine, found = states([begins, waits], tmp_path, minutes=0.01)
    assert fine
    assert found == {
        "begins_cpu.json": "cut off",
        "waits": "waits: no time, or no such device",
    }
    assert not (tmp_path / suite.STATES).exists()


def test_each_gpu_is_a_place():
    listed = "0, NVIDIA H100 80GB HBM3\n3, NVIDIA H200\n"
    cpu, first, second = suite.places(listed)
    assert (cpu.on, cpu.device) == ("cpu", "cpu")
    assert (first.on, first.device, first.env) == (
        "gpu",
        "h100",
        {"CUDA_VISIBLE_DEVICES": "0"},
    )
    assert (second.device, second.env["CUDA_VISIBLE_DEVICES"]) == ("h200", "3")


def test_wrong_names_are_told(capsys, tmp_path):
    with pytest.raises(SystemExit):
        suite.main(["decode", "decoding", "--folder", str(tmp_path)])
    assert "got decoding" in capsys.readouterr().err

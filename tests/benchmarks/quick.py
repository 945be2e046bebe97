"""What the tests of studies ask of a quick run."""

import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def run_quick(study: ModuleType, path, capsys, *options: str) -> dict[str, Any]:
    """Runs all of a study in its quick form, and gives what it wrote.

    Its question comes first, its notes are printed too, and there is a picture.
    """
    study.main(["--quick", *options, "--json", str(path)])
    printed = capsys.readouterr().out
    assert printed.startswith(study.__doc__.split("\n")[0])
    whole = json.loads(path.read_text())
    assert f"{len(whole['rows'])} runs: all runs are done" in printed
    assert whole["env"]["complete"]
    assert whole["notes"] and all(note in printed for note in whole["notes"])
    assert path.with_suffix(".png").exists()
    return whole


def run_last_again(
    study: ModuleType, path, capsys, whole: dict[str, Any], *options: str
) -> Sequence[dict[str, Any]]:
    """Takes the last row away and goes on; gives all rows, of which one is new."""
    path.write_text(json.dumps(whole | {"rows": whole["rows"][:-1]}))
    study.main(["--quick", *options, "--json", str(path)])
    assert capsys.readouterr().out.count("judged_on") == 1  # a row, as it ends
    return json.loads(path.read_text())["rows"]

"""The README's examples run as they stand, and its pages name files that exist."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.once
def test_python_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
        expected = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert expected
        assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md", "CONTRIBUTING.md"])
def test_named_files_exist(page):
    text = (README.parent / page).read_text()
    names = re.findall(r"`((?:benchmarks|examples|tests)/[\w/.]+)`", text)
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)
    assert names or links
    for name in [*names, *links]:
        assert (README.parent / name).exists(), name

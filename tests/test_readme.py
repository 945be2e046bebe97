"""The README's examples run as they stand; pages are whole, and name what exists."""

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


PAGES = ["README.md", "RESULTS.md", "CONTRIBUTING.md", "benchmarks/README.md"]


@pytest.mark.once
@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_a_page_is_merged(page):
    text = (README.parent / page).read_text()
    assert not re.findall(r"^(?:<{7} .*|={7}|>{7} .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    path = README.parent / page
    text = path.read_text()
    folders = "(?:../)?(?:benchmarks|examples|results|tests)/"
    names = re.findall(rf"`({folders}[\w/.]+)`", text)
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", text)
    assert names or links
    for name in [*names, *links]:
        file, _, anchor = name.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), name
        assert not anchor or anchor in anchors(found.read_text()), name


def anchors(text: str) -> set[str]:
    """Of its headings, as on GitHub."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}

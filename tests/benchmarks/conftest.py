"""What the tests of benchmarks share."""

import functools

import pytest

from benchmarks.parts import lm_text


@pytest.fixture(autouse=True, scope="session")
def _text_is_read_once():
    """The standard library's source is hundreds of files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_text, "load", functools.cache(lm_text.load))
        yield

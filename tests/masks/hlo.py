"""What a compiled program does, read from its text."""

import re


def operations(fn, *args, **kwargs):
    """The names of all XLA operations that a jitted function runs on `args`."""
    text = fn.lower(*args, **kwargs).compile().as_text()
    lines = [line for line in text.splitlines() if " = " in line]
    found = {
        name for line in lines for name in re.findall(r"\s([a-z][a-z0-9-]*)\(", line)
    }
    assert "parameter" in found, "the text of a program has another form now"
    return found

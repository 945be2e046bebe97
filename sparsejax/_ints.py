"""The one check of a whole number that is known before anything is traced.

Every room may import this module; it imports none of them.
"""

import numbers
from typing import Any


def check_int(
    name: str, value: Any, *, least: int | None = None, at: str = "", hint: str = ""
) -> int:
    """A whole Python or NumPy number as a Python int.

    Args:
      name: of the argument, for messages.
      value: anything; a bool is no number, and an array or tracer is none that is
        known.
      least: the smallest number allowed; None for any.
      at: the leaf that it belongs to, for messages.
      hint: what to do if it is of another type, for the message.

    Returns:
      The number.

    Raises:
      TypeError: if it is no whole number.
      ValueError: if it is less than `least`.

    Example:
      >>> check_int("k", 3, least=1)
      3
      >>> check_int("k", True)
      Traceback (most recent call last):
      TypeError: `k` must be a Python int; got True.
    """
    at = f" at {at}" if at else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        got = repr(value)
        if len(got) > 40:  # a tracer
            got = f"a value of type {type(value).__name__}"
        raise TypeError(
            f"`{name}` must be a Python int; got {got}{at}.{hint and f' {hint}'}"
        )
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"`{name}` must be at least {least}; got {number}{at}.")
    return number

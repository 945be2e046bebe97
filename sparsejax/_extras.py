"""Packages that an extra of sparsejax brings, and what is said where one is missing.

Every room may import this module; it imports none of them.
"""


class Extra:
    """Imports inside of `with` name the extra that brings a package which is missing.

    Args:
      name: of the extra, in pyproject.toml.

    Raises:
      ModuleNotFoundError: on leaving, in place of the one that names the package alone.

    Example:
      >>> with Extra("models"):
      ...     import no_such_package
      Traceback (most recent call last):
      ModuleNotFoundError: `no_such_package` is missing: pip install 'sparsejax[models]'
    """

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise ModuleNotFoundError(
                f"`{error.name}` is missing: pip install 'sparsejax[{self._name}]'",
                name=error.name,
            ) from error

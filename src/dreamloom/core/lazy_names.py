"""Names that a package offers without loading what they stand for until they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from dreamloom.core.packages import explain_missing


def offer_names(package: str, homes: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any]]:
    """Make a package's ``__all__`` and ``__getattr__`` from where each name is at home.

    Args:
        package: The package's dotted name.
        homes: For each name the module that it lies in, within the package.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            home = import_module(f"{package}.{homes[name]}")
        except ModuleNotFoundError as error:
            if missing := explain_missing(error):
                # The way there through our modules tells nobody more than the sentence.
                raise missing from None
            raise
        return getattr(home, name)

    return sorted(homes), find

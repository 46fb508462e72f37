"""The studio's words: all that its pages say stands in one file for each language."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "languages"


@cache
def read_words(language: str = "en") -> dict[str, str]:
    """Read a language's file: each text by its dotted name."""
    text = (_FOLDER / f"{language}.toml").read_text(encoding="utf-8")
    return dict(_flatten(tomllib.loads(text)))


def say(name: str, /, **values: Any) -> str:
    """Give a text by its name, with values put in where it has braces.

    Raises:
        KeyError: If there is no such text, or it wants a value that is not given.
    """
    return read_words()[name].format(**values)


def count(number: int, name: str) -> str:
    """Say how many there are: ``name.one`` for one, ``name.many`` for none or several."""
    return say(f"{name}.one" if number == 1 else f"{name}.many", n=number)


def _flatten(table: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in table.items():
        if isinstance(value, dict):
            found += _flatten(value, f"{above}{name}.")
        else:
            found.append((f"{above}{name}", value))
    return found

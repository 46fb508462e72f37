"""The questions that come with the package: files of studies, ready to be asked of any photos."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AskedQuestion:
    """A study's file, and what it asks.

    Args:
        file: The file.
        text: The question.
    """

    file: Path
    text: str

    @property
    def name(self) -> str:
        """What it is called for short."""
        return self.file.stem


def list_questions() -> list[AskedQuestion]:
    """List the questions that come with the package: inside it, or beside it in a checkout."""
    inside = Path(__file__).parents[2] / "recipes" / "questions"
    beside = Path(__file__).parents[4] / "recipes" / "questions"
    folder = next((one for one in (inside, beside) if one.is_dir()), inside)
    return [
        AskedQuestion(file, str(tomllib.loads(file.read_text(encoding="utf-8"))["question"]))
        for file in sorted(folder.glob("*.toml"))
    ]

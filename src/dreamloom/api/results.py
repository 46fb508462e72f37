"""Results: what a function of the door gives back, as text, in a notebook, and as a path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dreamloom.display.layout import to_html, to_text

if TYPE_CHECKING:
    from rich.console import RenderableType


class Result(ABC):
    """Something that was found or made: prints as a table, and shows itself in a notebook."""

    @abstractmethod
    def _render(self) -> Iterable[RenderableType]:
        """Lay out what it says."""

    def __str__(self) -> str:
        """Write it as plain text of at most 100 signs a line."""
        return to_text(self._render())

    def __repr__(self) -> str:
        """Say the same: what is typed at a prompt should be read."""
        return str(self)

    def _repr_html_(self) -> str:
        return to_html(self._render())


class FileResult(Result):
    """A result that is a file: it stands wherever a path can."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """Where the file lies."""

    def __fspath__(self) -> str:
        return str(self.path)

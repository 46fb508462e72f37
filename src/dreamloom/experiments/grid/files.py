"""The file of a grid, ``grids/NAME.json`` in a run: read here without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.run_folder import RunFolder, write_text
from dreamloom.core.toml_files import ClosedModel
from dreamloom.evaluation.metrics.scorecard import Score

CellRole = Literal["base", "subject", "style"]
"""What other cells are measured against: the base model, and each adapter alone."""


class GridAxis(ClosedModel):
    """What changes along one side of a grid."""

    name: str
    """checkpoint, weight, weight:N, scheduler, steps, guidance or prompt."""
    label: str
    """The same for readers, such as “weight of me”."""
    values: tuple[int | float | str, ...]
    """As they were given, in their order: numbers for weights, steps and guidance, else text."""


class CellRetention(ClosedModel):
    """How much of each part a cell has kept: 0 for nothing, 1 for what the part alone does."""

    subject: Score
    """From the base model's cell (0) to that of the subject's adapter alone (1)."""
    style: Score
    """From the cell of the subject's adapter alone (0) to that of the style's alone (1)."""
    both: float | None = None
    """Their harmonic mean, each cut to between 0 and 1; None if one was not measured."""


class GridCell(ClosedModel):
    """One cell: a set of pictures."""

    x: int
    """The place of its value on the first axis, from 0."""
    y: int
    """The same on the second; 0 where there is none."""
    set: str
    """The set's name: its pictures and their manifest lie in ``images/`` of the run."""
    role: CellRole | None = None
    """What the cell stands for where retention was measured; None for all that are measured."""
    retention: CellRetention | None = None
    """What it has kept; None where that was not measured, and for the cells with a role."""


class GridReference(ClosedModel):
    """What retention was measured against."""

    base: str
    """The set of the cell where both adapters weigh 0."""
    subject: str
    """The set of the subject's adapter alone, the first one."""
    style: str
    """The set of the style's adapter alone, the second one."""
    subject_weight: float
    """The weight of the subject's adapter in its cell: 1, or the highest there is."""
    style_weight: float
    """The weight of the style's adapter in its cell."""
    style_pictures: str
    """What likeness to the style is measured with."""


class Grid(ClosedModel):
    """A grid of pictures: its axes, its cells, and what all cells share."""

    name: str
    command: str
    """A command that draws it again."""
    base: dict[str, str]
    """The base model, as in the sets' manifests."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters' files, in the order in which ``weight:N`` counts them; that of a
    checkpoint on an axis is the first, as “checkpoint”."""
    prompts: tuple[str, ...]
    """The prompts, filled in: of every cell, or one for each value of the axis ``prompt``."""
    seeds: tuple[int, ...]
    """Of each prompt in every cell."""
    x: GridAxis
    y: GridAxis | None = None
    """None where the grid is one row."""
    cells: tuple[GridCell, ...]
    """Row by row."""
    reference: GridReference | None = None
    """What retention was measured against; None where it was not measured."""
    reason: str = Field("")
    """Why retention was not measured; empty where it was."""
    sheet: str
    """The contact sheet's file name, beside this file."""

    def cell(self, x: int, y: int = 0) -> GridCell:
        """Give the cell at a place.

        Raises:
            KeyError: If there is none.
        """
        for cell in self.cells:
            if (cell.x, cell.y) == (x, y):
                return cell
        raise KeyError((x, y))


def grid_file(run: RunFolder, name: str) -> Path:
    """Where a run's grid of a name is written."""
    return run.grids / f"{name}.json"


def sheet_file(run: RunFolder, name: str) -> Path:
    """Where its contact sheet is written."""
    return run.grids / f"{name}.png"


def write_grid(run: RunFolder, grid: Grid) -> Path:
    """Write a grid's file; return its path."""
    path = grid_file(run, grid.name)
    write_text(path, grid.model_dump_json(indent=2) + "\n")
    return path


def read_grid(path: Path) -> Grid:
    """Read the file of a grid.

    Raises:
        DreamLoomError: If it is not there, or not one that DreamLoom wrote.
    """
    try:
        return Grid.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DreamLoomError(f"There is no grid {path}.", "Draw one: dreamloom grid.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DreamLoomError(
            f"{path} is no grid that this version wrote: {place}: {first['msg']}.",
            "Move it elsewhere, and draw the grid again.",
        ) from None
    except (ValueError, OSError) as error:
        raise DreamLoomError(
            f"{path} cannot be read: {error}.", "Move it elsewhere, and draw the grid again."
        ) from None


def list_grids(run: RunFolder | Path) -> list[Grid]:
    """Read all grids of a run, by name; what cannot be read is passed over."""
    folder = (run if isinstance(run, RunFolder) else RunFolder(run)).grids
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(read_grid(path))
        except DreamLoomError:
            continue
    return found

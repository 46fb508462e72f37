"""The contact sheet of a grid: the first picture of each cell, with both axes' values beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from dreamloom.core.run_folder import atomic_path
from dreamloom.data.image_io import open_upright
from dreamloom.experiments.grid.files import GridAxis

_PAPER, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (110, 113, 118)
_GAP_PX, _EDGE_PX, _LINE_PX = 6, 14, 22
_TITLE_PX, _LABEL_PX = 15, 13
_MOST_CELL_PX, _LEAST_CELL_PX = 256, 32
_MOST_SHEET_PX, _MOST_NAMES_PX = 6000, 260

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_sheet(path: Path, x: GridAxis, y: GridAxis | None, pictures: Sequence[Path]) -> None:
    """Write a contact sheet as PNG.

    Pictures are scaled down until the sheet is of a size to look at, and never up.

    Args:
        path: The file.
        x: The first axis, from left to right.
        y: The second, from top to bottom; None for one row.
        pictures: One for each cell, row by row; all of one shape.
    """
    sheet = lay_out(x, y, [open_upright(one) for one in pictures])
    with atomic_path(path) as temporary:
        sheet.save(temporary, optimize=True)


def lay_out(x: GridAxis, y: GridAxis | None, pictures: Sequence[Image.Image]) -> Image.Image:
    """Lay pictures out in rows and columns, under and beside their values; see `write_sheet`."""
    columns, rows = len(x.values), len(y.values) if y else 1
    width, height = _fit(pictures[0].size, columns, rows)
    title, label = ImageFont.load_default(_TITLE_PX), ImageFont.load_default(_LABEL_PX)
    names = [_spell(value) for value in y.values] if y else []
    widest = max((label.getlength(name) for name in names), default=0)
    left = _EDGE_PX + (min(int(widest) + 2 * _GAP_PX, _MOST_NAMES_PX) if y else 0)
    top = _EDGE_PX + _LINE_PX * (3 if y else 2)
    # Pillow's own font has no arrows.
    headings = [f"across: {x.label}", f"down: {y.label}"] if y else [x.label]
    size = (
        max(
            left + columns * (width + _GAP_PX) - _GAP_PX,
            _EDGE_PX + max(int(title.getlength(text)) for text in headings),
        )
        + _EDGE_PX,
        top + rows * (height + _GAP_PX) - _GAP_PX + _EDGE_PX,
    )
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for line, heading in enumerate(headings):
        pen.text((_EDGE_PX, _EDGE_PX + line * _LINE_PX), heading, _FAINT, title)
    for column, value in enumerate(x.values):
        at = left + column * (width + _GAP_PX) + width // 2, top - _GAP_PX
        pen.text(at, _cut(_spell(value), label, width), _INK, label, anchor="mb")
    for row, name in enumerate(names):
        at = left - _GAP_PX, top + row * (height + _GAP_PX) + height // 2
        text = _cut(name, label, left - _GAP_PX - _EDGE_PX)
        pen.text(at, text, _INK, label, anchor="rm")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        at = left + column * (width + _GAP_PX), top + row * (height + _GAP_PX)
        shown = picture.convert("RGB")
        if shown.size != (width, height):
            shown = shown.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(shown, at)
    return sheet


def _fit(size: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    """Say how large a picture is shown: width and height in pixels."""
    room = max(_LEAST_CELL_PX, _MOST_SHEET_PX // max(columns, rows) - _GAP_PX)
    share = min(1.0, min(room, _MOST_CELL_PX) / max(size))
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def _spell(value: float | str) -> str:
    """Write a value as it was given; of a path, its name."""
    if isinstance(value, str):
        return Path(value).name if value.endswith(".safetensors") else value
    return f"{value:g}"


def _cut(text: str, font: _Font, width: float) -> str:
    """Cut a text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"

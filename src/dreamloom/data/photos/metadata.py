"""Reading metadata.jsonl: captions, boxes and masks of many photos in one file.

Source:
    The convention of Hugging Face's imagefolder (huggingface.co/docs/datasets/image_dataset):
    one JSON object a line, with ``file_name`` and further fields; ``box`` and ``mask`` are ours.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from dreamloom.core.errors import PhotoError

METADATA = "metadata.jsonl"

GivenBox: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the upright original."""

_OURS = ("file_name", "text", "box", "mask")
_MEND = "Mend that line, or remove it."


class Line(NamedTuple):
    """What one line says."""

    where: str
    """The file and the line's number, as errors name them."""
    file_name: str
    text: str
    """The caption; empty if the line has none."""
    box: GivenBox | None
    mask: Path | None


def read_metadata(folder: Path) -> tuple[list[Line], list[str]]:
    """Read the folder's metadata.jsonl, if there is one.

    Returns:
        Its lines in order, and the names of fields that mean nothing here.

    Raises:
        PhotoError: If it is no text, or a line is not as it should be; the line is named.
    """
    path = folder / METADATA
    if not path.is_file():
        return [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise PhotoError(
            f"{path} cannot be read as text.", "Save it as UTF-8, or remove it."
        ) from None
    lines: dict[str, Line] = {}
    unknown: list[str] = []
    # Not splitlines(), which also parts a caption at rarer signs that JSON allows in text.
    for number, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(row)
        except ValueError as error:
            raise PhotoError(f"{where}: this is not JSON: {error}.", _MEND) from None
        if not isinstance(fields, dict):
            raise PhotoError(
                f"{where}: this is not a JSON object.", 'Write {"file_name": "…", "text": "…"}.'
            )
        line = _read_line(fields, where, folder)
        if line.file_name in lines:
            raise PhotoError(
                f"{where}: {line.file_name} was described by an earlier line already.",
                "Keep one line for each photo.",
            )
        lines[line.file_name] = line
        unknown += [name for name in fields if name not in _OURS and name not in unknown]
    return list(lines.values()), unknown


def _read_line(fields: Mapping[str, Any], where: str, folder: Path) -> Line:
    file_name = fields.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise PhotoError(
            f"{where}: file_name is missing.", 'Name the photo, as in "file_name": "IMG_1.jpg".'
        )
    text = fields.get("text")
    if text is not None and not isinstance(text, str):
        raise PhotoError(f"{where}: text must be text, but is {json.dumps(text)}.", _MEND)
    box, mask = fields.get("box"), fields.get("mask")
    return Line(
        where,
        file_name,
        " ".join((text or "").split()),
        None if box is None else _read_box(box, where),
        None if mask is None else _find_mask(mask, where, folder),
    )


def _read_box(box: object, where: str) -> GivenBox:
    sides = box if isinstance(box, list) else []
    numbers = [
        float(side)
        for side in sides
        if isinstance(side, int | float) and not isinstance(side, bool)
    ]
    if len(sides) == len(numbers) == 4 and all(math.isfinite(number) for number in numbers):
        left, top, right, bottom = numbers
        if left < right and top < bottom:
            return left, top, right, bottom
    raise PhotoError(
        f"{where}: box must be four numbers, left, top, right and bottom, with left < right and "
        f"top < bottom, but is {json.dumps(box)}.",
        "Give them in pixels of the upright photo.",
    )


def _find_mask(mask: object, where: str, folder: Path) -> Path:
    if not isinstance(mask, str):
        raise PhotoError(f"{where}: mask must name a file, but is {json.dumps(mask)}.", _MEND)
    relative = Path(os.path.normpath(mask))
    if relative.is_absolute() or ".." in relative.parts:
        raise PhotoError(
            f"{where}: the mask {mask} lies outside of the folder.", "Put it beside the photo."
        )
    if not (folder / relative).is_file():
        raise PhotoError(f"{where}: there is no mask {mask}.", _MEND)
    return folder / relative

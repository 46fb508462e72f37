"""Reading metadata.jsonl or metadata.csv: captions, boxes and masks of many photos in one file.

Source:
    The convention of Hugging Face's imagefolder (huggingface.co/docs/datasets/image_dataset):
    one JSON object or row a line, with ``file_name`` and further fields; ``box`` and ``mask`` are
    ours.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from dreamloom.core.errors import PhotoError

METADATA = "metadata.jsonl"
_TABLE = "metadata.csv"

GivenBox: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the upright original."""

# The first of them that is there is the caption.
_TEXTS = ("text", "caption", "prompt")
_OURS = ("file_name", "box", "mask")
_MEND = "Mend that line, or remove it."


class Line(NamedTuple):
    """What one line says."""

    file: Path
    where: str
    """The file and the line's number, as errors name them."""
    file_name: str
    text: str
    """The caption; empty if the line has none."""
    box: GivenBox | None
    mask: Path | None


def read_metadata(folder: Path) -> tuple[list[Line], list[str], list[Path]]:
    """Read the folder's metadata.jsonl or, where there is none, its metadata.csv.

    Returns:
        Its lines in order, the names of fields that mean nothing here, and the file, if any.

    Raises:
        PhotoError: If it is no text, or a line is not as it should be; the line is named.
    """
    named = {path.name.lower(): path for path in sorted(folder.glob("*.*"), reverse=True)}
    path = named.get(METADATA) or named.get(_TABLE)
    if path is None or not path.is_file():
        return [], [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise PhotoError(
            f"{path} cannot be read as text.", "Save it as UTF-8, or remove it."
        ) from None
    is_table = path.suffix.lower() == ".csv"
    if is_table and "file_name" not in _split_head(text)[0]:
        # Some other table, which the listing names as a text without effect.
        return [], [], []
    lines: dict[str, Line] = {}
    unknown: list[str] = []
    for number, fields in _read_table(path, text) if is_table else _read_objects(path, text):
        where = f"{path}, line {number}"
        caption = next((name for name in _TEXTS if fields.get(name) is not None), _TEXTS[0])
        line = _read_line(fields, caption, where, path)
        if line.file_name in lines:
            raise PhotoError(
                f"{where}: {line.file_name} was described by an earlier line already.",
                "Keep one line for each photo.",
            )
        lines[line.file_name] = line
        ours = {*_OURS, _TEXTS[0], caption}
        unknown += [name for name in fields if name not in ours and name not in unknown]
    return list(lines.values()), unknown, [path]


def _read_objects(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
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
        yield number, fields


def _split_head(text: str) -> tuple[list[str], str]:
    """Give a table's column names and what parts them: a comma, or what spreadsheets write."""
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    return next(csv.reader([head.strip("\r")], delimiter=delimiter), []), delimiter


def _read_table(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter=_split_head(text)[1])
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            fields: dict[str, Any] = {name: said for name, said in row.items() if name and said}
            if "box" in fields:
                try:
                    fields["box"] = json.loads(fields["box"])
                except ValueError:
                    raise PhotoError(
                        f"{where}: box must be four numbers in brackets, but is {fields['box']}.",
                        "Write [left, top, right, bottom], in pixels of the upright photo.",
                    ) from None
            yield rows.line_num, fields
    except csv.Error as error:
        raise PhotoError(f"{path}, line {rows.line_num}: {error}.", _MEND) from None


def tidy_lines(text: str) -> str:
    """Put one space between words, and keep the lines that hold any."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def _read_line(fields: Mapping[str, Any], caption: str, where: str, path: Path) -> Line:
    file_name = fields.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise PhotoError(
            f"{where}: file_name is missing.", 'Name the photo, as in "file_name": "IMG_1.jpg".'
        )
    text = fields.get(caption)
    if text is not None and not isinstance(text, str):
        raise PhotoError(f"{where}: {caption} must be text, but is {json.dumps(text)}.", _MEND)
    box, mask = fields.get("box"), fields.get("mask")
    return Line(
        path,
        where,
        file_name,
        tidy_lines(text or ""),
        None if box is None else _read_box(box, where),
        None if mask is None else _find_mask(mask, where, path.parent),
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

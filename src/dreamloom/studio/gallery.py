"""Galleries: an image set laid out by prompt and seed, what was kept of it, and a zip of that."""

from __future__ import annotations

import re
import threading
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from dreamloom.core.manifests import ImageSet, Picture
from dreamloom.core.run_folder import write_json
from dreamloom.studio.jobs import read_json
from dreamloom.studio.runs import Run

KEPT, HIDDEN = "kept", "hidden"
MARKS = (KEPT, HIDDEN, "")
"""What a picture can be marked as. One that is not wanted is hidden, not deleted: its set would
no longer be what its record says."""

FILTERS = ("shown", "kept", "hidden")
_writing = threading.Lock()
_CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True)
class Shown:
    """A picture of a gallery.

    Args:
        number: Its place in the set, from 0.
        picture: What it was drawn from.
        base: The place of the base model's picture of the same prompt and seed, if there is one.
        mark: kept, hidden or nothing.
    """

    number: int
    picture: Picture
    base: int | None
    mark: str


@dataclass(frozen=True)
class Gallery:
    """Pictures by prompt and seed.

    Args:
        seeds: The columns.
        rows: A prompt, how it was drawn, and its pictures by seed.
        total: How many pictures the set has, by filter.
    """

    seeds: tuple[int, ...]
    rows: tuple[tuple[str, str, dict[int, Shown]], ...]
    total: dict[str, int]


def lay_out(images: ImageSet, base: ImageSet | None, marks: dict[str, str], which: str) -> Gallery:
    """Lay an image set out.

    Args:
        images: The set.
        base: What the base model drew from the same, if it did.
        marks: By the picture's file.
        which: One of `FILTERS`: what was not hidden, what was kept, or what was hidden.
    """
    floor = {_same(one): place for place, one in enumerate(base.pictures)} if base else {}
    rows: dict[tuple[str, str], dict[int, Shown]] = {}
    total = dict.fromkeys(FILTERS, 0)
    for number, picture in enumerate(images.pictures):
        mark = marks.get(picture.file, "")
        fits = {"shown": mark != HIDDEN, "kept": mark == KEPT, "hidden": mark == HIDDEN}
        for name in FILTERS:
            total[name] += fits[name]
        if fits[which]:
            row = rows.setdefault((picture.prompt, picture.sampler), {})
            row[picture.seed] = Shown(number, picture, floor.get(_same(picture)), mark)
    seeds = sorted({seed for row in rows.values() for seed in row})
    laid = tuple((prompt, sampler, row) for (prompt, sampler), row in rows.items())
    return Gallery(tuple(seeds), laid, total)


def _same(picture: Picture) -> tuple[Any, ...]:
    return picture.prompt, picture.seed, picture.sampler


def read_marks(folder: Path, run: Run, images: str) -> dict[str, str]:
    """Read how the pictures of a set are marked, by their files."""
    written = read_json(folder / f"{run.id}.json")
    marks = written.get(images) if isinstance(written, dict) else None
    if not isinstance(marks, dict):
        return {}
    return {str(file): mark for file, mark in marks.items() if mark in (KEPT, HIDDEN)}


def write_mark(folder: Path, run: Run, images: str, file: str, mark: str) -> None:
    """Mark a picture, or take its mark off."""
    with _writing:  # else of two clicks at once one would be lost
        written = read_json(folder / f"{run.id}.json")
        table = written if isinstance(written, dict) else {}
        marks = read_marks(folder, run, images)
        marks.pop(file, None)
        table[images] = marks | ({file: mark} if mark else {})
        write_json(folder / f"{run.id}.json", table)


def name_file(run: Run, images: str, number: int, picture: Picture) -> str:
    """Name a picture for whoever keeps it: by its run, set, place, prompt and seed."""
    words = _plain(picture.prompt, 40)
    return f"{_plain(run.name, 40)}-{_plain(images, 40)}-{number:03d}-{words}-{picture.seed}.png"


def name_zip(run: Run, images: str) -> str:
    """Name the zip of what was kept of a set."""
    return f"{_plain(run.name, 40)}-{_plain(images, 40)}-kept.zip"


def _plain(text: str, most: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:most].strip("-") or "picture"


class _Sink(RawIOBase):
    """Where a zip is written to, to be taken away piece by piece."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        """It can be written to."""
        return True

    def write(self, data: Any) -> int:
        """Take some bytes."""
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """Give what was written since the last time."""
        taken = b"".join(self.parts)
        self.parts.clear()
        return taken


def zip_files(files: Iterable[tuple[str, Path]]) -> Iterator[bytes]:
    """Make a zip while it is sent: never more than a piece of it is in memory.

    Args:
        files: Pairs of a name in the zip and the file; one that has gone is left out.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as packed:
        for name, path in files:
            if not path.is_file():
                continue
            entry = zipfile.ZipInfo.from_file(path, name)
            with path.open("rb") as stream, packed.open(entry, "w") as written:
                while piece := stream.read(_CHUNK_BYTES):
                    written.write(piece)
                    yield sink.take()
    yield sink.take()

"""What lies below the root: how much it takes, by run and kind, and what of it can be deleted."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamloom.studio.photo_sets import PhotoSetFolder
from dreamloom.studio.runs import Run

# A run's folder holds these; a reader meets one name for each.
_KINDS = {
    "checkpoints": "checkpoints",
    "latents": "latents",
    "looks": "looks",
    "saved": "saved",
    "images": "images",
    "priors": "priors",
    "photos": "photos",
}
_DEEPEST = 3


@dataclass(frozen=True)
class Item:
    """Something that takes room, and may be deleted.

    Args:
        kind: What it is, as the words call it.
        name: What a reader calls it.
        places: Its files and folders, as seen from the root.
        size_bytes: How much it takes.
        can_go: Whether it may be deleted by itself.
    """

    kind: str
    name: str
    places: tuple[str, ...]
    size_bytes: int
    can_go: bool = True

    @property
    def id(self) -> str:
        """What addresses call it: no path stands in one."""
        told = "\0".join((self.kind, *self.places))
        return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class Usage:
    """What a run takes.

    Args:
        run: The run.
        whole: All of it.
        parts: What is in it, by kind; image sets one by one.
    """

    run: Run
    whole: Item
    parts: tuple[Item, ...]


def measure_run(run: Run) -> Usage:
    """Say what a run takes, and each kind within."""
    sizes: dict[str, int] = {}
    for entry in _scan(run.folder):
        kind = "other"
        if entry.is_dir(follow_symlinks=False):
            kind = _KINDS.get(entry.name, "other")
        elif entry.name.endswith(".safetensors"):
            kind = "adapter"
        sizes[kind] = sizes.get(kind, 0) + size_of(Path(entry.path))
    parts: list[Item] = []
    for kind, size in sizes.items():
        if kind == "images":
            parts += _list_sets(run)
        elif kind == "checkpoints":
            parts.append(Item(kind, run.name, (f"{run.name}/checkpoints",), size))
        else:
            parts.append(Item(kind, run.name, (), size, can_go=False))
    parts.sort(key=lambda item: -item.size_bytes)
    whole = Item("run", run.name, (run.name,), sum(sizes.values()))
    return Usage(run, whole, tuple(item for item in parts if item.size_bytes))


def _list_sets(run: Run) -> Iterator[Item]:
    for entry in _scan(run.files.images):
        if entry.is_dir(follow_symlinks=False):
            place = f"{run.name}/images/{entry.name}"
            yield Item("set", f"{run.name}: {entry.name}", (place,), size_of(Path(entry.path)))


def measure_photos(root: Path, photos: PhotoSetFolder) -> Item:
    """Say what a set of photos takes, with what lies beside it."""
    folders = (photos.folder, photos.folder.with_name(f".{photos.folder.name}"))
    places = tuple(one.relative_to(root).as_posix() for one in folders if one.is_dir())
    size = sum(size_of(one) for one in folders)
    return Item("photo_set", photos.title, places, size)


def list_merged(root: Path, runs: Sequence[Run]) -> list[Item]:
    """List adapter files that lie in no run: what merging wrote."""
    inside = {run.folder for run in runs}
    return [
        Item("merged", name, (name,), size_of(file))
        for file in _find_files(root, inside, _DEEPEST)
        for name in [file.relative_to(root).as_posix()]
    ]


def _find_files(folder: Path, inside: set[Path], depth: int) -> Iterator[Path]:
    for entry in sorted(_scan(folder), key=lambda one: one.name):
        path = Path(entry.path)
        if entry.is_file(follow_symlinks=False):
            if entry.name.endswith(".safetensors") and not entry.name.startswith("."):
                yield path
        elif depth and path not in inside and _is_plain_folder(entry):
            yield from _find_files(path, inside, depth - 1)


def _is_plain_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def size_of(path: Path) -> int:
    """Add up the sizes of a file or of all files in a folder, in bytes; links are not followed."""
    try:
        found = path.lstat()
    except OSError:
        return 0
    if not stat.S_ISDIR(found.st_mode):
        return found.st_size
    return sum(size_of(Path(entry.path)) for entry in _scan(path))


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def is_outermost(run: Run, runs: Sequence[Run]) -> bool:
    """Say whether a run lies in no other one, as those that a study makes do."""
    return not any(other.folder in run.folder.parents for other in runs)

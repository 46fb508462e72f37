"""Listing a folder of photos: pictures, their captions, boxes and masks, and what is ignored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from dreamloom.core.errors import PhotoError
from dreamloom.core.manifests import PhotoFacts, image_files
from dreamloom.core.run_folder import file_sha256
from dreamloom.data.photos.metadata import METADATA, GivenBox, Line, read_metadata
from dreamloom.data.picture_files import FORMATS, PICTURE_SUFFIXES

USUAL_PHOTOS = 6

_MASK = ".mask.png"
_LISTED_NAMES = 5


class PhotoMetadata(NamedTuple):
    """What the user says of one photo: its caption, box and mask."""

    caption: str = ""
    box: GivenBox | None = None
    box_from: str = ""
    """Where the box stands, as errors name it."""
    mask: Path | None = None


class Listing(NamedTuple):
    """A folder's pictures by name, the metadata of each, and what to say about the rest."""

    pictures: list[Path]
    metadata: dict[Path, PhotoMetadata]
    notes: list[str]


def list_photos(folder: Path) -> Listing:
    """List a folder's photos with their captions, boxes and masks.

    What lies beside a photo goes before what metadata.jsonl says of it.

    Raises:
        PhotoError: If the folder is missing, is a file, may not be read or holds no picture; or
            if a caption or metadata.jsonl is not as it should be.
    """
    lines, unknown = read_metadata(folder)
    named_masks = {line.mask for line in lines if line.mask}
    used = {folder / METADATA, *named_masks}
    pictures, captions, masks, notes = _sort_entries(folder, used)
    by_name = {path.name: path for path in pictures}
    described: dict[Path, Line] = {}
    for line in lines:
        if line.file_name not in by_name:
            is_mask = folder / line.file_name in named_masks
            what = "named as a mask" if is_mask else "no photo in this folder"
            raise PhotoError(
                f"{line.where}: {line.file_name} is {what}.", "Mend that line, or remove it."
            )
        described[by_name[line.file_name]] = line
    if unknown:
        notes.append(f"{METADATA}: ignored {count(unknown, 'field')}: {name_some(unknown)}")
    metadata = {}
    for path in pictures:
        near = path, captions.get(path), masks.get(path)
        metadata[path], overruled = _combine_metadata(*near, described.get(path))
        notes += overruled
    return Listing(pictures, metadata, notes)


def list_class_images(folder: Path) -> Listing:
    """List a folder's pictures; class images have one prompt and no metadata of their own.

    Raises:
        PhotoError: If the folder is missing, is a file, may not be read or holds no picture.
    """
    pictures, captions, masks, notes = _sort_entries(folder)
    beside = sorted(path.name for path in {*captions.values(), *masks.values()})
    if beside:
        notes.append(
            f"ignored {count(beside, 'file')} beside class images, which have one prompt and no "
            f"masks: {name_some(beside)}"
        )
    return Listing(pictures, {path: PhotoMetadata() for path in pictures}, notes)


def gather_facts(listing: Listing) -> list[PhotoFacts]:
    """Hash every photo and mask, and say what else each prepared photo is made from.

    Raises:
        PhotoError: If a file cannot be read.
    """
    facts = []
    for path in listing.pictures:
        caption, box, _, mask = listing.metadata[path]
        facts.append(PhotoFacts(hash_file(path), caption, box, hash_file(mask) if mask else ""))
    return facts


def hash_file(path: Path) -> str:
    """Hash a file's bytes; that it cannot be read is a PhotoError."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise PhotoError(
            f"{path} cannot be read: {error.strerror}.", "Mend that, or remove the file."
        ) from None


def refuse_own(folder: Path, target: Path) -> None:
    """Keep pictures from being replaced by their own copies."""
    if folder.resolve() == target.resolve():
        raise PhotoError(
            f"{folder} is where the run keeps its own copies.", "Name the folder they came from."
        )


def count(things: Sequence[object], noun: str) -> str:
    """Say how many there are: 1 photo, 2 photos."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def name_some(names: Sequence[str]) -> str:
    """Name the first few."""
    shown = ", ".join(names[:_LISTED_NAMES])
    rest = len(names) - _LISTED_NAMES
    return f"{shown} and {rest} more" if rest > 0 else shown


def _sort_entries(
    folder: Path, used: Collection[Path] = ()
) -> tuple[list[Path], dict[Path, Path], dict[Path, Path], list[str]]:
    """Find pictures, their captions and masks, and notes on the rest, save for ``used`` files."""
    if folder.is_file():
        raise PhotoError(f"{folder} is a file, not a folder.", "Name the folder that it lies in.")
    if not folder.is_dir():
        raise PhotoError(f"There is no folder {folder}.", "Check the path.")
    try:
        entries = sorted(folder.iterdir())
    except PermissionError:
        raise PhotoError(
            f"{folder} may not be read.", "Give yourself permission to read it."
        ) from None
    named_so = [path for path in image_files(folder, PICTURE_SUFFIXES) if path not in used]
    hidden = [path for path in named_so if path.name.startswith(".")]
    all_masks = [path for path in named_so if path.name.lower().endswith(_MASK)]
    pictures = [path for path in named_so if path not in hidden and path not in all_masks]
    texts = {path: path.with_suffix(".txt") for path in pictures}
    captions = {path: text for path, text in texts.items() if text in entries}
    possible = {path: path.with_suffix(_MASK) for path in pictures}
    masks = {path: mask for path, mask in possible.items() if mask in all_masks}
    known = {*named_so, *captions.values(), *used}
    others = [path.name for path in entries if path.is_file() and path not in known]
    lost = [path.name for path in all_masks if path not in {*masks.values(), *hidden}]
    opened = {part for path in used for part in path.parents}
    folders = [path.name for path in entries if path.is_dir() and path not in opened]
    notes = []
    if others:
        verb = "are not pictures" if len(others) > 1 else "is not a picture"
        notes.append(f"ignored {count(others, 'file')} that {verb}: {name_some(others)}")
    if hidden:
        names = [path.name for path in hidden]
        notes.append(f"ignored {count(hidden, 'hidden file')}: {name_some(names)}")
    if lost:
        notes.append(f"ignored {count(lost, 'mask')} without a photo: {name_some(lost)}")
    if folders:
        notes.append(f"did not look into {count(folders, 'folder')}: {name_some(folders)}")
    if not pictures:
        holds = f" ({'; '.join(notes)})" if notes else ""
        raise PhotoError(
            f"There is no photo in {folder}{holds}.",
            f"Put about {USUAL_PHOTOS} photos of the subject there; DreamLoom reads {FORMATS}.",
        )
    return pictures, captions, masks, notes


def _combine_metadata(
    path: Path, text: Path | None, mask: Path | None, line: Line | None
) -> tuple[PhotoMetadata, list[str]]:
    """Put together what lies beside a photo and what its line says; name what is overruled."""
    caption = _read_caption(text)
    if line is None:
        return PhotoMetadata(caption, mask=mask), []
    overruled = [
        f"{path.name}: {near.name} goes before the {what} in {METADATA}"
        for near, what, differs in (
            (text, "text", caption and line.text not in ("", caption)),
            (mask, "mask", line.mask not in (None, mask)),
        )
        if near and differs
    ]
    box_from = line.where if line.box else ""
    return PhotoMetadata(caption or line.text, line.box, box_from, mask or line.mask), overruled


def _read_caption(text: Path | None) -> str:
    """Read the prompt that lies beside a picture, as IMG_1.txt beside IMG_1.jpg."""
    if text is None:
        return ""
    try:
        return " ".join(text.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        raise PhotoError(
            f"{text} cannot be read as text.", "Save it as UTF-8, or remove it."
        ) from None

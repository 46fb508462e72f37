"""Listing a folder of photos: pictures, their captions, boxes and masks, and what is ignored."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from dreamloom.core.errors import PhotoError
from dreamloom.core.manifests import PhotoFacts, image_files
from dreamloom.core.run_folder import file_sha256
from dreamloom.data.photos.companions import (
    TEXT_SUFFIXES,
    find_companions,
    fold_name,
    is_plain_mask,
)
from dreamloom.data.photos.metadata import GivenBox, Line, read_metadata, tidy_lines
from dreamloom.data.picture_files import FOREIGN_SUFFIXES, FORMATS, PICTURE_SUFFIXES

USUAL_PHOTOS = 6

_LISTED_NAMES = 5
_PLACEHOLDER = re.compile(r"\[(trigger|name|subject|token)\]|\{\w*\}", re.IGNORECASE)


class PhotoMetadata(NamedTuple):
    """What the user says of one photo: its caption, box and mask."""

    caption: str = ""
    box: GivenBox | None = None
    box_from: str = ""
    """Where the box stands, as errors name it."""
    mask: Path | None = None
    mask_by_name: bool = False
    """Whether nothing but its name says that the mask is one."""


class Listing(NamedTuple):
    """A folder's pictures by name, the metadata of each, and what to say about the rest."""

    pictures: list[Path]
    metadata: dict[Path, PhotoMetadata]
    notes: list[str]


def list_photos(folder: Path, *, keep_lines: bool = False) -> Listing:
    """List a folder's photos with their captions, boxes and masks.

    What lies beside a photo goes before what metadata.jsonl says of it.

    Args:
        folder: Where the photos lie.
        keep_lines: Whether the lines of a caption stay apart, for each is a caption of its own;
            else they are joined to one.

    Raises:
        PhotoError: If the folder is missing, is a file, may not be read or holds no picture; or
            if a caption or metadata.jsonl is not as it should be.
    """
    lines, unknown, files = read_metadata(folder)
    named_masks = {line.mask for line in lines if line.mask}
    pictures, captions, masks, notes = _sort_entries(folder, {*files, *named_masks})
    by_name = {fold_name(path.name): path for path in pictures}
    by_name |= {path.name: path for path in pictures}
    described: dict[Path, Line] = {}
    for line in lines:
        path = by_name.get(line.file_name) or by_name.get(fold_name(line.file_name))
        if path is None:
            is_mask = folder / line.file_name in named_masks
            what = "named as a mask" if is_mask else "no photo in this folder"
            raise PhotoError(
                f"{line.where}: {line.file_name} is {what}.", "Mend that line, or remove it."
            )
        described[path] = line
    if unknown:
        notes.append(f"{files[0].name}: ignored {count(unknown, 'field')}: {name_some(unknown)}")
    metadata, joined = {}, 0
    for path in pictures:
        near = path, captions.get(path), masks.get(path)
        found, overruled = _combine_metadata(*near, described.get(path))
        if not keep_lines:
            joined += path in captions and "\n" in found.caption
            found = found._replace(caption=" ".join(found.caption.splitlines()))
        metadata[path] = found
        notes += overruled
    if joined:
        are = "1 caption has" if joined == 1 else f"{joined} captions have"
        notes.append(
            f"{are} several lines, which are joined; with photos.caption_lines=choose each line "
            "is a caption of its own, one of which is chosen each time"
        )
    notes += _name_placeholders([one.caption for one in metadata.values()])
    return Listing(pictures, metadata, notes)


def _name_placeholders(captions: Sequence[str]) -> list[str]:
    """Say what other trainers would fill in, and is taken literally here."""
    found = [match[0] for caption in captions if (match := _PLACEHOLDER.search(caption))]
    if not found:
        return []
    return [
        f"{count(found, 'caption')} hold {name_some(sorted(set(found)))}, which is taken as it "
        "stands: write the subject's words there"
    ]


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
        caption, box, _, mask, _ = listing.metadata[path]
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
    found = find_companions([path for path in named_so if path not in hidden], set(entries))
    pictures, captions = found.pictures, found.captions
    known = {*named_so, *captions.values(), *used}
    rest = [path for path in entries if path not in known and not path.is_dir()]
    opened = {part for path in used for part in path.parents}
    folders = [path.name for path in entries if path.is_dir() and path not in opened]
    notes = [
        *_name_rest(rest),
        *_tell(hidden, "ignored {n} hidden file", "ignored {n} hidden files"),
        *_tell(
            found.lost_masks,
            "ignored {n} mask without a photo",
            "ignored {n} masks without a photo",
        ),
        *_tell(
            found.taken_for_photos,
            "took for a photo what is called a mask, as it is of no other photo",
            "took for photos what is called masks, as they are of no other photos",
        ),
    ]
    if folders:
        notes.append(f"did not look into {count(folders, 'folder')}: {name_some(folders)}")
    if not pictures:
        holds = f" ({'; '.join(notes)})" if notes else ""
        raise PhotoError(
            f"There is no photo in {folder}{holds}.",
            f"Put about {USUAL_PHOTOS} photos of the subject there; DreamLoom reads {FORMATS}.",
        )
    return pictures, captions, found.masks, notes


def _name_rest(rest: Sequence[Path]) -> list[str]:
    """Say of files that are neither photo, caption nor mask what they are taken for."""
    dead = [path for path in rest if not path.exists()]
    odd = [path for path in rest if path.exists() and not path.is_file()]
    files = [path for path in rest if path.is_file()]
    foreign = [path for path in files if path.suffix.lower() in FOREIGN_SUFFIXES]
    texts = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
    other = [path for path in files if path not in {*foreign, *texts}]
    return [
        *_tell(
            other,
            "ignored {n} file that is not a picture",
            "ignored {n} files that are not pictures",
        ),
        *_tell(
            texts,
            "ignored {n} text that belongs to no picture",
            "ignored {n} texts that belong to no picture",
        ),
        *_tell(
            foreign,
            "left out {n} picture, of a format that is not read",
            "left out {n} pictures, of formats that are not read",
            "; save as JPEG or PNG",
        ),
        *_tell(dead, "{n} link leads nowhere", "{n} links lead nowhere"),
        *_tell(odd, "ignored {n} entry of another kind", "ignored {n} entries of another kind"),
    ]


def _tell(paths: Sequence[Path], one: str, several: str, more: str = "") -> list[str]:
    """Say something of files by their number and names; nothing of none."""
    if not paths:
        return []
    said = (one if len(paths) == 1 else several).format(n=len(paths))
    return [f"{said}: {name_some([path.name for path in paths])}{more}"]


def _combine_metadata(
    path: Path, text: Path | None, mask: Path | None, line: Line | None
) -> tuple[PhotoMetadata, list[str]]:
    """Put together what lies beside a photo and what its line says; name what is overruled."""
    caption, by_name = _read_caption(text), mask is not None and not is_plain_mask(mask)
    if line is None:
        return PhotoMetadata(caption, mask=mask, mask_by_name=by_name), []
    overruled = [
        f"{path.name}: {near.name} goes before the {what} in {line.file.name}"
        for near, what, differs in (
            (text, "text", caption and line.text.split() not in ([], caption.split())),
            (mask, "mask", line.mask not in (None, mask)),
        )
        if near and differs
    ]
    box_from = line.where if line.box else ""
    return PhotoMetadata(
        caption or line.text, line.box, box_from, mask or line.mask, by_name
    ), overruled


def _read_caption(text: Path | None) -> str:
    """Read the prompt that lies beside a picture, as IMG_1.txt beside IMG_1.jpg, by its lines."""
    if text is None:
        return ""
    try:
        return tidy_lines(text.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        raise PhotoError(
            f"{text} cannot be read as text.", "Save it as UTF-8, or remove it."
        ) from None

"""The photos stage: a folder of photos in, upright copies of one size and what is not ideal out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict

from dreamloom.errors import PhotoError
from dreamloom.events import Note, Observer, Progress, StageDone, StageSkipped, StageStarted, silent
from dreamloom.pictures import (
    Photo,
    PhotoSet,
    PriorSet,
    image_files,
    read_photo_set,
    read_prior_set,
    write_manifest,
)
from dreamloom.pixels import (
    PICTURE_SUFFIXES,
    crop_centre,
    open_upright,
    read_upright,
    scale_shorter_side,
)
from dreamloom.quality import Look, group_alike, judge, nearly_same
from dreamloom.rundir import Record, RunDir, atomic_folder, file_sha256, fingerprint

FEW_PHOTOS, USUAL_PHOTOS, MANY_PHOTOS = 4, 6, 30

# What is narrower or longer holds no subject, and scaling it up would fill the memory.
_LEAST_SIDE_PX, _MOST_ELONGATED = 32, 10.0
_LISTED_NAMES = 5

_STORED = {
    2: "was stored as in a mirror; it is used the right way round",
    3: "was stored upside down; it is used upright",
    4: "was stored upside down; it is used upright",
    **dict.fromkeys((5, 6, 7, 8), "was stored lying on its side; it is used upright"),
}
_LOCATED = "says where it was taken; that is left out of everything DreamLoom writes"


class _Report(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckedPhoto(_Report):
    """What the check found out about one photo."""

    file: str
    """The photo's name."""
    original_px: tuple[int, int] | None = None
    """Height and width when upright; None if it cannot be read."""
    stored_upright: bool = True
    """Whether the file needed no turning."""
    has_location: bool = False
    """Whether the file says where it was taken."""
    sharpness: float | None = None
    """How sharp it is, see `dreamloom.quality`; None if it cannot be read."""
    unreadable: str = ""
    """Why it cannot be used and what to do, if so."""
    issues: tuple[str, ...] = ()
    """What is not ideal about it; each goes on where the photo's name begins the sentence."""
    remarks: tuple[str, ...] = ()
    """What is worth knowing about it, and needs nothing done."""


class PhotoCheck(_Report):
    """What the check found out about a folder of photos."""

    folder: Path
    resolution_px: int
    photos: tuple[CheckedPhoto, ...]
    notes: tuple[str, ...] = ()
    """What holds for the set as a whole: ignored files, near-duplicates, too few."""
    to_add: tuple[str, ...] = ()
    """What would make the set better."""

    @property
    def usable(self) -> bool:
        """Whether `load_photos` would take the folder."""
        return bool(self.photos) and not any(photo.unreadable for photo in self.photos)


class _Listing(NamedTuple):
    """A folder's pictures by name, their captions, and what to say about its other entries."""

    pictures: list[Path]
    captions: dict[Path, Path]
    notes: list[str]


class _Seen(NamedTuple):
    """One photo: its pixels, what is to say about it, and what it is recognised by."""

    image: Image.Image
    checked: CheckedPhoto
    sha256: str
    look: Look


def check_photos(folder: Path, resolution_px: int, observe: Observer = silent) -> PhotoCheck:
    """Look at a folder of photos as `load_photos` would, and write nothing.

    Args:
        folder: Where the photos lie, not in folders of their own.
        resolution_px: Side of the square that will be trained on.
        observe: Hears of the progress.

    Returns:
        A row for each picture, also for those that cannot be read.

    Raises:
        PhotoError: If the folder is missing, is a file, or holds no picture.
    """
    listing = _list_pictures(folder)
    rows, seen = [], []
    for done, path in enumerate(listing.pictures, start=1):
        try:
            photo = _see(path, resolution_px)
        except PhotoError as error:
            rows.append(CheckedPhoto(file=path.name, unreadable=str(error)))
        else:
            rows.append(photo.checked)
            # Pixels of many megapixels are not kept.
            seen.append(photo._replace(image=Image.new("RGB", (1, 1))))
        observe(Progress("photos", "look at photos", done, len(listing.pictures)))
    return PhotoCheck(
        folder=folder,
        resolution_px=resolution_px,
        photos=tuple(rows),
        notes=(*listing.notes, *_judge_set(seen)),
        to_add=_what_to_add(seen),
    )


def load_photos(
    folder: Path, run: RunDir, resolution_px: int, observe: Observer = silent
) -> PhotoSet:
    """Prepare a subject's photos: upright copies, scaled, without metadata, under ``run.photos``.

    Each photo's shorter side is scaled to ``resolution_px``; nothing is cut off. What is not
    ideal about a photo or the set is noted and does no harm to the others. A text file of a
    photo's name (IMG_1.txt) is its caption: the prompt that it is trained with. If the same
    photos were prepared before, nothing is done. ``run.photos`` appears whole or not at all.

    Args:
        folder: Where the photos lie, not in folders of their own; other files are ignored.
        run: The run that the copies are for.
        resolution_px: Side of the square that will be trained on.
        observe: Hears of the progress and of every issue.

    Raises:
        PhotoError: If the folder is missing, is a file, is ``run.photos`` itself, or holds no
            picture; or if pictures in it cannot be read, each of which is named with its reason.
    """
    started = time.perf_counter()
    _refuse_own(folder, run.photos)
    listing = _list_pictures(folder)
    inputs = {f"photo {path.name}": _hash(path) for path in listing.pictures}
    inputs |= {f"caption {path.name}": _read_caption(listing, path) for path in listing.captions}
    inputs["resolution_px"] = str(resolution_px)
    if _is_done(run, "photos", inputs):
        observe(StageSkipped("photos", f"the {len(listing.pictures)} photos are prepared already"))
        return read_photo_set(run.photos)
    observe(StageStarted("photos", f"{_count(listing.pictures, 'photo')} in {folder}"))
    with atomic_folder(run.photos) as fresh:
        photos, seen = _prepare(listing, fresh, resolution_px, observe)
        notes = (*listing.notes, *_judge_set(seen))
        for note in notes:
            observe(Note("photos", note, warning=note not in listing.notes))
        prepared = PhotoSet(folder=fresh, resolution_px=resolution_px, photos=photos, notes=notes)
        write_manifest(prepared)
    prepared = prepared.model_copy(update={"folder": run.photos})
    seconds = time.perf_counter() - started
    run.write_record(
        Record(
            stage="photos",
            inputs=inputs,
            settings={"resolution_px": resolution_px},
            outputs=run.hash_outputs(*sorted(run.photos.iterdir())),
            results={
                "photos": len(photos),
                "issues": {photo.source: photo.issues for photo in photos if photo.issues},
                "notes": notes,
            },
            seconds=seconds,
        )
    )
    troubled = sum(bool(one.checked.issues) for one in seen)
    observe(StageDone("photos", seconds, f"{_count(photos, 'photo')}, {troubled} with issues"))
    return prepared


def load_class_images(
    folder: Path, run: RunDir, resolution_px: int, prompt: str, observe: Observer = silent
) -> PriorSet:
    """Prepare class images of the user's own: centred squares of one size under ``run.priors``.

    If the same images were prepared before, nothing is done. ``run.priors`` appears whole or not
    at all.

    Args:
        folder: Where the images lie, not in folders of their own; other files are ignored.
        run: The run that the copies are for.
        resolution_px: Side of the squares.
        prompt: What the images show, in the words they are trained with.
        observe: Hears of the progress and of what was enlarged or ignored.

    Raises:
        PhotoError: As `load_photos`.
    """
    started = time.perf_counter()
    _refuse_own(folder, run.priors)
    listing = _list_pictures(folder)
    made_from = fingerprint([_hash(path) for path in listing.pictures], resolution_px)
    inputs = {"class_images": made_from, "prompt": prompt, "resolution_px": str(resolution_px)}
    if _is_done(run, "priors", inputs):
        count = len(listing.pictures)
        observe(StageSkipped("priors", f"the {count} class images are prepared already"))
        return read_prior_set(run.priors)
    observe(StageStarted("priors", f"{_count(listing.pictures, 'class image')} in {folder}"))
    with atomic_folder(run.priors) as fresh:
        names, small = _crop_squares(listing.pictures, fresh, resolution_px, observe)
        notes = list(listing.notes)
        if small:
            notes.append(
                f"enlarged {_count(small, 'class image')} smaller than {resolution_px} pixels: "
                f"{_name(small)}"
            )
        for note in notes:
            observe(Note("priors", note))
        prepared = PriorSet(
            folder=fresh,
            prompt=prompt,
            resolution_px=resolution_px,
            files=tuple(names),
            made_from=made_from,
        )
        write_manifest(prepared)
    seconds = time.perf_counter() - started
    run.write_record(
        Record(
            stage="priors",
            inputs=inputs,
            settings={"kind": "folder", "prompt": prompt, "resolution_px": resolution_px},
            outputs=run.hash_outputs(*sorted(run.priors.iterdir())),
            results={"class_images": len(names), "notes": notes},
            seconds=seconds,
        )
    )
    observe(StageDone("priors", seconds, _count(names, "class image")))
    return prepared.model_copy(update={"folder": run.priors})


def _refuse_own(folder: Path, target: Path) -> None:
    """Keep pictures from being replaced by their own copies."""
    if folder.resolve() == target.resolve():
        raise PhotoError(
            f"{folder} is where the run keeps its own copies.", "Name the folder they came from."
        )


def _list_pictures(folder: Path) -> _Listing:
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
    named_so = image_files(folder, PICTURE_SUFFIXES)
    pictures = [path for path in named_so if not path.name.startswith(".")]
    hidden = [path.name for path in named_so if path.name.startswith(".")]
    folders = [path.name for path in entries if path.is_dir()]
    beside = {path: path.with_suffix(".txt") for path in pictures}
    captions = {path: text for path, text in beside.items() if text in entries}
    known = {*named_so, *captions.values()}
    others = [path.name for path in entries if path.is_file() and path not in known]
    notes = []
    if others:
        verb = "are not pictures" if len(others) > 1 else "is not a picture"
        notes.append(f"ignored {_count(others, 'file')} that {verb}: {_name(others)}")
    if hidden:
        notes.append(f"ignored {_count(hidden, 'hidden file')}: {_name(hidden)}")
    if folders:
        notes.append(f"did not look into {_count(folders, 'folder')}: {_name(folders)}")
    if not pictures:
        holds = f" ({'; '.join(notes)})" if notes else ""
        kinds = ", ".join(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
        raise PhotoError(
            f"There is no photo in {folder}{holds}.",
            f"Put about {USUAL_PHOTOS} photos of the subject there; DreamLoom reads {kinds}.",
        )
    return _Listing(pictures, captions, notes)


def _read_caption(listing: _Listing, path: Path) -> str:
    """Read the prompt that lies beside a picture, as IMG_1.txt beside IMG_1.jpg."""
    text = listing.captions.get(path)
    if text is None:
        return ""
    try:
        return " ".join(text.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        raise PhotoError(
            f"{text} cannot be read as text.", "Save it as UTF-8, or remove it."
        ) from None


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise PhotoError(
            f"{path} cannot be read: {error.strerror}.", "Mend that, or remove the file."
        ) from None


def _is_done(run: RunDir, stage: str, inputs: dict[str, str]) -> bool:
    """Say whether the stage was done from just these inputs, and its files are unchanged."""
    record = run.finished(stage, inputs)
    if record is None:
        return False
    return run.hash_outputs(*(run.path / name for name in record.outputs)) == record.outputs


def _for_each(
    paths: Sequence[Path], prepare: Callable[[Path, str], None], stage: str, observe: Observer
) -> None:
    """Prepare every picture under a new name; one error then tells of all that cannot be used."""
    refused = []
    digits = max(2, len(str(len(paths) - 1)))
    for index, path in enumerate(paths):
        try:
            prepare(path, f"{index:0{digits}d}.png")
        except PhotoError as error:
            refused.append(error)
        observe(Progress(stage, "prepare", index + 1, len(paths)))
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise PhotoError(
            f"{len(refused)} of {len(paths)} pictures cannot be used: "
            + " ".join(error.problem for error in refused),
            " ".join(dict.fromkeys(error.hint for error in refused)),
        )


def _prepare(
    listing: _Listing, fresh: Path, resolution_px: int, observe: Observer
) -> tuple[tuple[Photo, ...], list[_Seen]]:
    photos: list[Photo] = []
    seen: list[_Seen] = []

    def prepare(path: Path, name: str) -> None:
        one = _see(path, resolution_px)
        scaled = scale_shorter_side(one.image, resolution_px)
        scaled.save(fresh / name)
        for text in one.checked.issues:
            observe(Note("photos", f"{path.name} {text}", warning=True))
        for text in one.checked.remarks:
            observe(Note("photos", f"{path.name} {text}"))
        photos.append(
            Photo(
                file=name,
                source=path.name,
                source_sha256=one.sha256,
                original_px=(one.image.height, one.image.width),
                scaled_px=(scaled.height, scaled.width),
                caption=_read_caption(listing, path),
                issues=one.checked.issues + one.checked.remarks,
            )
        )
        seen.append(one._replace(image=scaled))

    _for_each(listing.pictures, prepare, "photos", observe)
    return tuple(photos), seen


def _crop_squares(
    paths: Sequence[Path], fresh: Path, resolution_px: int, observe: Observer
) -> tuple[list[str], list[str]]:
    """Write the class images; return their names and the names of those that were enlarged."""
    names: list[str] = []
    small: list[str] = []

    def prepare(path: Path, name: str) -> None:
        square = crop_centre(_refuse_sliver(path, open_upright(path)))
        if square.width < resolution_px:
            small.append(path.name)
        scale_shorter_side(square, resolution_px).save(fresh / name)
        names.append(name)

    _for_each(paths, prepare, "priors", observe)
    return names, small


def _see(path: Path, resolution_px: int) -> _Seen:
    sha256 = _hash(path)
    image, orientation, has_location = read_upright(path)
    judgement = judge(_refuse_sliver(path, image), resolution_px)
    remarks = [_STORED[orientation]] if orientation in _STORED else []
    checked = CheckedPhoto(
        file=path.name,
        original_px=(image.height, image.width),
        stored_upright=orientation == 1,
        has_location=has_location,
        sharpness=round(judgement.sharpness, 1),
        issues=judgement.issues,
        remarks=(*remarks, *([_LOCATED] if has_location else [])),
    )
    return _Seen(image, checked, sha256, judgement.look)


def _refuse_sliver(path: Path, image: Image.Image) -> Image.Image:
    size = f"{path} has {image.width} × {image.height} pixels"
    if min(image.size) < _LEAST_SIDE_PX:
        raise PhotoError(
            f"{size}, but each side must have {_LEAST_SIDE_PX} or more.",
            "Replace it by a larger picture, or remove it.",
        )
    if max(image.size) > _MOST_ELONGATED * min(image.size):
        raise PhotoError(
            f"{size}, more than {_MOST_ELONGATED:.0f} times as long as wide.",
            "Cut out the part with the subject, or remove it.",
        )
    return image


def _judge_set(seen: Sequence[_Seen]) -> list[str]:
    notes = [
        f"{_name([one.checked.file for one in alike])} are the same file: keep one of them"
        for alike in group_alike(seen, _same_file)
    ]
    notes += [
        f"{_name([one.checked.file for one in alike])} are nearly the same picture: "
        "keep the best of them"
        for alike in group_alike(_one_of_each(seen), _same_look)
    ]
    if 0 < len(seen) < FEW_PHOTOS:
        notes.append(
            f"{_count(seen, 'photo')} {'is' if len(seen) == 1 else 'are'} few: "
            f"{FEW_PHOTOS} to {MANY_PHOTOS} are usual, and about {USUAL_PHOTOS} good ones do well"
        )
    if len(seen) > MANY_PHOTOS:
        notes.append(
            f"{len(seen)} photos are many: {FEW_PHOTOS} to {MANY_PHOTOS} are usual; choose the "
            "best, or raise train.updates"
        )
    return notes


def _same_file(one: _Seen, other: _Seen) -> bool:
    return one.sha256 == other.sha256


def _same_look(one: _Seen, other: _Seen) -> bool:
    return nearly_same(one.look, other.look)


def _one_of_each(seen: Sequence[_Seen]) -> list[_Seen]:
    return list({one.sha256: one for one in reversed(seen)}.values())[::-1]


def _what_to_add(seen: Sequence[_Seen]) -> tuple[str, ...]:
    distinct = _one_of_each(seen)
    repeated = sum(len(alike) - 1 for alike in group_alike(distinct, _same_look))
    good = sum(not one.checked.issues for one in distinct) - repeated
    missing = USUAL_PHOTOS - max(0, good)
    if missing <= 0:
        return ()
    return (
        f"add {missing} more good {'photo' if missing == 1 else 'photos'}: "
        "other places, other light, other sides, and one from close by",
    )


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _name(names: Sequence[str]) -> str:
    """Name the first few."""
    shown = ", ".join(names[:_LISTED_NAMES])
    rest = len(names) - _LISTED_NAMES
    return f"{shown} and {rest} more" if rest > 0 else shown

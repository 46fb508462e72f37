"""Checking photos: what is not ideal about each one, and about the set as a whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops

from dreamloom.core.errors import PhotoError
from dreamloom.core.events import Observer, Progress, silent
from dreamloom.core.manifests import CropShape
from dreamloom.core.toml_files import ClosedModel, write_out_bytes
from dreamloom.data.buckets import Box, Size, choose_bucket, list_buckets, scale_box, scale_to_cover
from dreamloom.data.image_io import Upright, find_marked, read_mask, read_upright, scale_mask
from dreamloom.data.photos.faces import (
    FaceBox,
    FaceFinder,
    comment_on_faces,
    find_faces,
)
from dreamloom.data.photos.listing import (
    USUAL_PHOTOS,
    PhotoMetadata,
    count,
    hash_file,
    list_photos,
    name_some,
)
from dreamloom.data.quality import PictureHash, group_alike, judge, nearly_same

FEW_PHOTOS, MANY_PHOTOS = 4, 30

# What is narrower or longer holds no subject, and scaling it up would fill the memory.
_LEAST_SIDE_PX, _MOST_ELONGATED = 32, 10.0

_STORED = {
    2: "was stored as in a mirror; it is used the right way round",
    3: "was stored upside down; it is used upright",
    4: "was stored upside down; it is used upright",
    **dict.fromkeys((5, 6, 7, 8), "was stored lying on its side; it is used upright"),
}
_LOCATED = "says where it was taken; that is left out of everything DreamLoom writes"
_TRANSPARENT = "is transparent in places, which show white"
_CUT_OUT = (
    "is cut out of its background: what is transparent shows white and serves as its mask, so that "
    "it counts objective.background_weight"
)
ALPHA = "its own transparency"
"""What stands for a mask's file where a photo's alpha is its mask."""
_SERIES = "holds more than one picture; the first is used"


class CheckedPhoto(ClosedModel):
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
    """How sharp it is, see `dreamloom.data.quality`; None if it cannot be read."""
    caption: str = ""
    """Its own prompt, where it has one."""
    has_box: bool = False
    """Whether metadata says where the subject is."""
    mask: str = ""
    """The file that is its mask, or `ALPHA`; empty without one."""
    unreadable: str = ""
    """Why it cannot be used and what to do, if so."""
    issues: tuple[str, ...] = ()
    """What is not ideal about it; each goes on where the photo's name begins the sentence."""
    remarks: tuple[str, ...] = ()
    """What is worth knowing about it, and needs nothing done."""
    faces: tuple[FaceBox, ...] | None = None
    """Its faces, the one that is taken first; None if they were not looked for."""


class PhotoCheck(ClosedModel):
    """What the check found out about a folder of photos."""

    folder: Path
    resolution_px: int
    photos: tuple[CheckedPhoto, ...]
    notes: tuple[str, ...] = ()
    """What holds for the set as a whole: ignored files, near-duplicates, too few."""
    to_add: tuple[str, ...] = ()
    """What would make the set better."""
    faces_unknown: str = ""
    """Why faces were not looked for, as a clause; empty if they were, or nobody asked."""

    @property
    def understood(self) -> str:
        """How many photos there are, and what lies beside them."""
        captions = sum(bool(photo.caption) for photo in self.photos)
        masks = sum(bool(photo.mask) for photo in self.photos)
        boxes = sum(photo.has_box for photo in self.photos)
        return f"{count(self.photos, 'photo')}: {say_companions(captions, masks, boxes)}"

    @property
    def usable(self) -> bool:
        """Whether `load_photos` would take the folder."""
        return bool(self.photos) and not any(photo.unreadable for photo in self.photos)


class MeasuredPhoto(NamedTuple):
    """One photo: its pixels, how crops are cut from it, and what is to say about it."""

    image: Image.Image
    """The upright original, or a smaller copy of a very large one."""
    original_px: Size
    bucket_px: Size
    scaled_px: Size
    box_px: Box | None
    """What crops must keep, in the scaled picture."""
    mask: Image.Image | None
    """Its mask, of the original's size; white where the subject is."""
    checked: CheckedPhoto
    sha256: str
    hash: PictureHash


def say_companions(captions: int, masks: int, boxes: int) -> str:
    """Say how many photos have a caption, a mask or a box."""
    told = (
        "no caption" if not captions else f"{captions} with a caption",
        "no mask" if not masks else f"{masks} with a mask",
        "no box" if not boxes else f"{boxes} with a box",
    )
    return ", ".join(told)


def judge_captions(captions: Sequence[str], subject: str, words: Sequence[str]) -> list[str]:
    """Say how many captions never name the subject, so that its word would learn nothing.

    Args:
        captions: Each photo's own caption, or several, one a line; empty where it has none.
        subject: The phrase that names the subject.
        words: The words that are taught: one of them in a caption is enough.
    """
    given = [line for caption in captions for line in caption.splitlines()]
    taught = compile_words(words)
    unnamed = [caption for caption in given if not taught.search(caption)]
    if not unnamed:
        return []
    return [
        f"{len(unnamed)} of {count(given, 'caption')} never name the subject, {subject}, which "
        f"learns nothing from those photos: write {' or '.join(words)} into them, or leave them "
        f'out (such as "{unnamed[0][:60]}")'
    ]


def compile_words(words: Sequence[str]) -> re.Pattern[str]:
    """Make the pattern that finds any of some words, whole and in any case; without words none."""
    found = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in words)
    return re.compile(found or "(?!)", re.I)


def list_shapes(resolution_px: int, shape: CropShape, step_px: int) -> list[Size]:
    """List the sizes of crops that photos may be cut to.

    Raises:
        ValueError: As `dreamloom.data.buckets.list_buckets`.
    """
    if shape == "square":
        return [(resolution_px, resolution_px)]
    return list_buckets(resolution_px, step_px)


def check_photos(
    folder: Path,
    resolution_px: int,
    observe: Observer = silent,
    *,
    shape: CropShape = "square",
    step_px: int = 64,
    faces: FaceFinder | None = None,
) -> PhotoCheck:
    """Look at a folder of photos as `load_photos` would, and write nothing.

    Args:
        folder: Where the photos lie, not in folders of their own.
        resolution_px: Side of a square of the area that will be trained on.
        observe: Hears of the progress.
        shape: Whether crops are squares or buckets.
        step_px: Sides of buckets are multiples of it.
        faces: Who finds faces; None looks for none.

    Returns:
        A row for each picture, also for those that cannot be read.

    Raises:
        PhotoError: If the folder is missing, is a file, or holds no picture; or if captions or
            metadata.jsonl are not as they should be.
    """
    listing = list_photos(folder)
    shapes = list_shapes(resolution_px, shape, step_px)
    rows, measured = [], []
    for done, path in enumerate(listing.pictures, start=1):
        try:
            photo = measure_photo(path, listing.metadata[path], shapes)
        except PhotoError as error:
            rows.append(CheckedPhoto(file=path.name, unreadable=str(error)))
        else:
            if faces is not None:
                photo = look_for_faces(photo, faces, resolution_px)
            rows.append(photo.checked)
            measured.append(forget_pixels(photo))
        observe(Progress("photos", "look at photos", done, len(listing.pictures)))
    return PhotoCheck(
        folder=Path(write_out_bytes(str(folder))),
        resolution_px=resolution_px,
        photos=tuple(rows),
        notes=(*listing.notes, *judge_set(measured)),
        to_add=_advise(measured),
    )


def measure_photo(path: Path, metadata: PhotoMetadata, shapes: Sequence[Size]) -> MeasuredPhoto:
    """Read and judge one photo, and find out how crops of one of the shapes are cut from it.

    Raises:
        PhotoError: If the photo or its mask cannot be used, or its box lies outside.
    """
    sha256 = hash_file(path)
    upright = read_upright(path)
    image = upright.image
    size = upright.original_size[::-1]
    refuse_sliver(path, image)
    bucket = choose_bucket(size, shapes)
    scaled = scale_to_cover(size, bucket)
    mask, mask_from = _find_mask(path, metadata, upright)
    box = _find_box(path, metadata, mask, size)
    box_px = scale_box(box, size, scaled) if box else None
    judgement = judge(image, bucket, upright.alpha)
    checked = CheckedPhoto(
        file=path.name,
        original_px=size,
        stored_upright=upright.orientation == 1,
        has_location=upright.has_location,
        sharpness=round(judgement.sharpness, 1),
        caption=metadata.caption,
        has_box=metadata.box is not None,
        mask=mask_from,
        issues=judgement.issues,
        remarks=_remark(upright, mask_from, box_px, bucket),
    )
    return MeasuredPhoto(image, size, bucket, scaled, box_px, mask, checked, sha256, judgement.hash)


def look_for_faces(photo: MeasuredPhoto, finder: FaceFinder, resolution_px: int) -> MeasuredPhoto:
    """Enter a photo's faces, and what is to say about them."""
    faces = find_faces(finder, photo.image, photo.original_px)
    issues, remarks = comment_on_faces(
        faces, finder.kind, photo.original_px, photo.scaled_px, resolution_px
    )
    checked = photo.checked.model_copy(
        update={
            "faces": faces,
            "issues": (*photo.checked.issues, *issues),
            "remarks": (*photo.checked.remarks, *remarks),
        }
    )
    return photo._replace(checked=checked)


def forget_pixels(photo: MeasuredPhoto) -> MeasuredPhoto:
    """Let go of many megapixels; what judges the set needs none."""
    return photo._replace(image=Image.new("RGB", (1, 1)), mask=None)


def refuse_sliver(path: Path, image: Image.Image) -> None:
    """Refuse a picture that is too small or too elongated to hold a subject.

    Raises:
        PhotoError: If so.
    """
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


def _find_box(
    path: Path, metadata: PhotoMetadata, mask: Image.Image | None, size: Size
) -> tuple[float, float, float, float] | None:
    """Find top, left, bottom and right of the subject in the original, as far as it is known."""
    if metadata.box is None:
        return find_marked(mask) if mask else None
    left, top, right, bottom = metadata.box
    if left < 0 or top < 0 or right > size[1] or bottom > size[0]:
        given = ", ".join(f"{side:g}" for side in metadata.box)
        raise PhotoError(
            f"{metadata.box_from}: the box [{given}] does not lie inside {path.name}, which has "
            f"{size[1]} × {size[0]} pixels.",
            "Give left, top, right and bottom in pixels of the upright photo.",
        )
    return top, left, bottom, right


def _find_mask(
    path: Path, metadata: PhotoMetadata, upright: Upright
) -> tuple[Image.Image | None, str]:
    """Read a photo's mask, or take what the photo leaves opaque if it is cut out; name which."""
    if metadata.mask:
        mask = read_mask(metadata.mask, upright, in_grey=metadata.mask_by_name)
        return mask, metadata.mask.name
    alpha = upright.alpha
    if alpha is None or find_marked(ImageChops.invert(alpha)) is None:
        return None, ""
    if find_marked(alpha) is None:
        raise PhotoError(
            f"{path} is transparent everywhere, so nothing of it would be seen.",
            "Save it again without transparency, or remove it.",
        )
    whole = alpha.size == upright.original_size
    return alpha if whole else scale_mask(alpha, upright.original_size[::-1]), ALPHA


def _remark(upright: Upright, mask: str, box: Box | None, bucket: Size) -> tuple[str, ...]:
    remarks = [_STORED[upright.orientation]] if upright.orientation in _STORED else []
    if upright.has_location:
        remarks.append(_LOCATED)
    if upright.is_series:
        remarks.append(_SERIES)
    if upright.image.size != upright.original_size:
        remarks.append("is very large; it is read at {} × {} pixels".format(*upright.image.size))
    if mask == ALPHA:
        remarks.append(_CUT_OUT)
    elif upright.alpha:
        remarks.append(_TRANSPARENT)
    if box and (box[2] - box[0] > bucket[0] or box[3] - box[1] > bucket[1]):
        remarks.append("has a subject larger than a crop; the middle of its box is kept")
    return tuple(remarks)


def judge_set(measured: Sequence[MeasuredPhoto]) -> list[str]:
    """Say what is not ideal about the photos together."""
    notes = [
        f"{name_some([one.checked.file for one in alike])} are the same file: keep one of them"
        for alike in group_alike(measured, lambda one, other: one.sha256 == other.sha256)
    ]
    notes += [
        f"{name_some([one.checked.file for one in alike])} are nearly the same picture: "
        "keep the best of them"
        for alike in group_alike(_one_of_each(measured), _nearly_same)
    ]
    if 0 < len(measured) < FEW_PHOTOS:
        notes.append(
            f"{count(measured, 'photo')} {'is' if len(measured) == 1 else 'are'} few: "
            f"{FEW_PHOTOS} to {MANY_PHOTOS} are usual, and about {USUAL_PHOTOS} good ones do well"
        )
    if len(measured) > MANY_PHOTOS:
        notes.append(
            f"{len(measured)} photos are many: {FEW_PHOTOS} to {MANY_PHOTOS} are usual; choose "
            "the best, or raise train.steps"
        )
    return notes


def _nearly_same(one: MeasuredPhoto, other: MeasuredPhoto) -> bool:
    return nearly_same(one.hash, other.hash)


def _one_of_each(measured: Sequence[MeasuredPhoto]) -> list[MeasuredPhoto]:
    return list({one.sha256: one for one in reversed(measured)}.values())[::-1]


def _advise(measured: Sequence[MeasuredPhoto]) -> tuple[str, ...]:
    distinct = _one_of_each(measured)
    repeated = sum(len(alike) - 1 for alike in group_alike(distinct, _nearly_same))
    good = sum(not one.checked.issues for one in distinct) - repeated
    missing = USUAL_PHOTOS - max(0, good)
    if missing <= 0:
        return ()
    return (
        f"add {missing} more good {'photo' if missing == 1 else 'photos'}: "
        "other places, other light, other sides, and one from close by",
    )

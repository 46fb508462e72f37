"""The faces in a set of photos, as ``dreamloom photos --faces`` finds them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from dreamloom.data.buckets import scale_to_cover
from dreamloom.data.photos.faces import FaceBox, comment_on_faces
from dreamloom.evaluation.encoders.store import list_models
from dreamloom.studio.context import Studio
from dreamloom.studio.photo_sets import PhotoSetFolder
from dreamloom.studio.words import say

_RESOLUTION_PX = {"picturebook": 128}
_USUAL_RESOLUTION_PX = 1024


def resolution_of(base: str) -> int:
    """Give the side that photos are looked at for, in pixels."""
    return _RESOLUTION_PX.get(base, _USUAL_RESOLUTION_PX)


@dataclass(frozen=True)
class PhotoFaces:
    """The faces of one photo.

    Args:
        boxes: Left, top, right and bottom of each in pixels, the one that is taken first.
        issues: What is not ideal about them.
        remarks: What is worth knowing about them.
    """

    boxes: tuple[FaceBox, ...]
    issues: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class SetFaces:
    """The faces of a set.

    Args:
        by_name: Each photo's, by its name; a photo that nobody looked at is not in it.
        unknown: Why they were not looked for, in one sentence; empty if they were.
    """

    by_name: dict[str, PhotoFaces] = field(default_factory=dict)
    unknown: str = ""


async def ask_for_faces(studio: Studio, photos: PhotoSetFolder, base: str) -> SetFaces:
    """Look for the faces of a set; what was found is kept until a photo or YuNet changes."""
    folder = os.path.relpath(photos.folder, studio.place)
    side = resolution_of(base)
    argv = ["photos", folder, "--faces", "--base", base, "--resolution", str(side), "--json"]
    finder = next(f"{one.state} {one.why}" for one in list_models() if one.model.name == "yunet")
    answer, said = await studio.ask(argv, because=f"{photos.changed()} {finder}")
    if answer is None:
        return SetFaces(unknown=said or say("photo.faces_failed"))
    if why := answer.get("faces_unknown"):
        return SetFaces(unknown=say("photo.faces_unknown", why=why))
    kind = "drawings" if base == "picturebook" else "photographs"
    return SetFaces(
        {
            row["file"]: _read_faces(row, kind, side)
            for row in answer["photos"]
            if row["faces"] is not None
        }
    )


def _read_faces(row: dict[str, Any], kind: str, side: int) -> PhotoFaces:
    boxes: tuple[FaceBox, ...] = tuple(tuple(box) for box in row["faces"])
    size = tuple(row["original_px"])
    scaled = scale_to_cover(size, (side, side))
    issues, remarks = comment_on_faces(boxes, kind, size, scaled, side)
    return PhotoFaces(boxes, tuple(issues), tuple(remarks))

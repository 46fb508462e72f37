"""Judging the faces of a photo: how many there are, cut off or small. Who finds them is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from PIL import Image

from dreamloom.data.buckets import Size

FaceBox: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of the upright photo; may reach beyond it."""

SMALL_SHARE = 1 / 8
"""A face that is narrower than this share of the resolution is small: a rule of thumb. At 1024 px
it is 128 px, which are 16 of the latents that a model sees."""

_NEAR_EDGE = 0.02  # of the face's width: what comes so near to an edge is cut off by it


class FaceFinder(Protocol):
    """Something that finds faces in photos."""

    kind: Literal["photographs", "drawings"]

    def find_boxes(self, image: Image.Image) -> list[tuple[float, float, float, float]]:
        """Find left, top, right and bottom of each face of an upright RGB picture.

        The one that is taken for the subject's comes first.
        """
        ...


def find_faces(finder: FaceFinder, image: Image.Image, size_px: Size) -> tuple[FaceBox, ...]:
    """Find the faces of a photo.

    Args:
        finder: Who finds them.
        image: The photo, or a smaller copy of it.
        size_px: The photo's own height and width.
    """
    across, down = size_px[1] / image.width, size_px[0] / image.height
    return tuple(
        (round(left * across), round(top * down), round(right * across), round(bottom * down))
        for left, top, right, bottom in finder.find_boxes(image)
    )


def judge_faces(
    faces: Sequence[FaceBox], size_px: Size, scaled_px: Size, resolution_px: int
) -> list[str]:
    """Say what is not ideal about a photo's faces; each goes on where its name begins the sentence.

    Args:
        faces: The faces that were found, the one that is taken first.
        size_px: The upright photo's height and width.
        scaled_px: The same once it is scaled for training.
        resolution_px: Side of a square of the area that is trained on.
    """
    if not faces:
        return [
            "shows no face that could be found: if it is there, it may be turned away, hidden or "
            "very small"
        ]
    issues = []
    if len(faces) > 1:
        others = "the other" if len(faces) == 2 else "the others"
        issues.append(
            f"shows {len(faces)} faces: the largest is taken, and {others} will be taught as well; "
            "crop or mask away whom it is not about"
        )
    if edges := list_cut(faces[0], size_px):
        issues.append(
            f"cuts its face off at the {' and '.join(edges)}: take one that shows all of it"
        )
    wide_px = (faces[0][2] - faces[0][0]) * scaled_px[1] / size_px[1]
    wanted_px = SMALL_SHARE * resolution_px
    if wide_px < wanted_px:
        issues.append(
            f"shows its face small: {wide_px:.0f} px wide once the photo is scaled for "
            f"{resolution_px} px, where {wanted_px:.0f} are wanted; cut the photo down to it, or "
            "take one from closer"
        )
    return issues


def comment_on_faces(
    faces: Sequence[FaceBox], kind: str, size_px: Size, scaled_px: Size, resolution_px: int
) -> tuple[list[str], list[str]]:
    """Give the issues and the remarks about a photo's faces, see `judge_faces`."""
    remarks = remark_on_faces(faces, kind)
    issues = [] if remarks else judge_faces(faces, size_px, scaled_px, resolution_px)
    return issues, remarks


def remark_on_faces(faces: Sequence[FaceBox], kind: str) -> list[str]:
    """Say what is worth knowing about a photo's faces, and needs nothing done."""
    if kind == "drawings" and not faces:
        return ["shows no face seen from the front; others are not looked for in drawings"]
    return []


def list_cut(face: FaceBox, size_px: Size) -> list[str]:
    """List the edges of a photo that cut a face off."""
    left, top, right, bottom = face
    near = _NEAR_EDGE * (right - left)
    beyond = {
        "left": left < near,
        "top": top < near,
        "right": right > size_px[1] - near,
        "bottom": bottom > size_px[0] - near,
    }
    return [edge for edge, is_cut in beyond.items() if is_cut]

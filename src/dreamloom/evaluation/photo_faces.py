"""Looking for faces in photos before they are taught: by YuNet, or by what knows drawings."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

from PIL import Image, ImageOps

from dreamloom.core.events import Observer, silent
from dreamloom.data.photos.check import PhotoCheck, check_photos
from dreamloom.data.photos.faces import FaceFinder
from dreamloom.evaluation.detectors.drawn_faces import DrawnFaces
from dreamloom.evaluation.encoders.catalogue import YUNET
from dreamloom.evaluation.encoders.face_boxes import (
    Found,
    YunetDetector,
    keep_separate,
    to_bgr,
)
from dreamloom.evaluation.encoders.store import NO_OPENCV, Missing, find_kept

Box: TypeAlias = tuple[float, float, float, float]

# The size that picturebook draws at, and how far from the middle a face may lie there to be found
# (`DrawnFaces` reaches 7.7 px to each side).
_DRAWN_PX, _STEP_PX = 128, 14


class PhotographedFaces:
    """Finds faces in photographs.

    Args:
        file: YuNet's ONNX file.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        EvaluationError: If the file is missing or damaged.
    """

    kind: Literal["photographs", "drawings"] = "photographs"

    def __init__(self, file: Path) -> None:
        self._detector = YunetDetector(file)

    def find_boxes(self, image: Image.Image) -> list[Box]:
        """Find left, top, right and bottom of each face of an RGB picture, the largest first."""
        return _give_sides(self._detector.find(to_bgr(image)))


class FacesInDrawings:
    """Finds faces that picturebook drew from the front, beside each other in drawings of any width.

    A drawing is looked at in squares of its height, one beside the other, also over its edges.
    """

    kind: Literal["photographs", "drawings"] = "drawings"

    def __init__(self) -> None:
        self._faces = DrawnFaces()

    def find_boxes(self, image: Image.Image) -> list[Box]:
        """Find left, top, right and bottom of each face of an RGB picture, the largest first."""
        scale = image.height / _DRAWN_PX
        width = max(1, round(image.width / scale))
        small = image.resize((width, _DRAWN_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
        margin = _DRAWN_PX // 2
        wide = ImageOps.expand(small, (margin, 0, margin, 0), fill=(128, 128, 128))
        found = []
        for start in range(0, width + _STEP_PX, _STEP_PX):
            square = wide.crop((start, 0, start + _DRAWN_PX, _DRAWN_PX))
            for face in self._faces.find(square).faces:
                left, top, right, bottom = (side * scale for side in face.box)
                moved = left + (start - margin) * scale
                found.append(Found((moved, top, right - left, bottom - top), (), 1.0))
        return _give_sides(keep_separate(found))


def load_face_finder(base: str) -> FaceFinder | Missing:
    """Load what finds faces in the photos that a base model is taught, or say why there is none.

    Raises:
        EvaluationError: If YuNet's file cannot be read.
    """
    if base == "picturebook":
        return FacesInDrawings()
    kept = find_kept(YUNET)
    absent = [kept.reason] if isinstance(kept, Missing) else []
    if find_spec("cv2") is None:
        absent.append(NO_OPENCV)
    if isinstance(kept, Missing) or absent:
        return Missing("; ".join(absent))
    return PhotographedFaces(kept.folder / YUNET.files[0].name)


def check_photos_and_faces(
    folder: Path, resolution_px: int, base: str, observe: Observer = silent
) -> PhotoCheck:
    """Look at a folder of photos as `check_photos` does, and for the faces in them.

    Args:
        folder: Where the photos lie.
        resolution_px: Side of a square of the area that will be trained on.
        base: The base model that is taught: ``picturebook`` is taught drawings, others photographs.
        observe: Hears of the progress.

    Returns:
        The check; ``faces_unknown`` says why faces could not be looked for.

    Raises:
        PhotoError: As `check_photos`.
        EvaluationError: If YuNet's file cannot be read.
    """
    finder = load_face_finder(base)
    if isinstance(finder, Missing):
        check = check_photos(folder, resolution_px, observe)
        return check.model_copy(update={"faces_unknown": finder.reason})
    return check_photos(folder, resolution_px, observe, faces=finder)


def _give_sides(faces: list[Found]) -> list[Box]:
    return [
        (left, top, left + width, top + height)
        for left, top, width, height in (face.box for face in faces)
    ]

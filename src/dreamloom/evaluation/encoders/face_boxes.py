"""Where the faces of a photograph are: YuNet, read by OpenCV, at all sizes; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from dreamloom.evaluation.encoders.store import explaining

FaceBox: TypeAlias = tuple[float, float, float, float]
"""Left, top, width and height in the picture's pixels."""
FacePoint: TypeAlias = tuple[float, float]

_SURE = 0.9  # OpenCV's own threshold for YuNet
_OVERLAP = 0.3  # and for two boxes of one face
_YUNET_FACE_PX = 300  # YuNet is trained on faces of 10 to 300 px
_INSIDE = 0.5  # a box that lies in a larger one to more than this is no face of its own


class Found(NamedTuple):
    """A face that a detector found, in the picture's pixels."""

    box: FaceBox
    landmarks: tuple[FacePoint, ...]
    score: float


class YunetDetector:
    """Finds the faces of a photograph.

    YuNet looks at the picture at its own size, and at halves of it as long as a face could be
    larger than those it was trained on.

    Args:
        file: YuNet's ONNX file.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        EvaluationError: If the file is missing or damaged.
    """

    def __init__(self, file: Path) -> None:
        import cv2

        self._cv2 = cv2
        with explaining(file):
            self._network = open_onnx(cv2.FaceDetectorYN, file, "", (320, 320), _SURE, _OVERLAP)

    def find(self, bgr: Any) -> list[Found]:
        """Find all faces in OpenCV's array of a picture, the largest first."""
        return keep_separate(
            [found for scale in list_halves(bgr.shape) for found in self._detect(bgr, scale)]
        )

    def _detect(self, bgr: Any, scale: int) -> list[Found]:
        height, width = (max(1, side // scale) for side in bgr.shape[:2])
        if scale > 1:
            bgr = self._cv2.resize(bgr, (width, height), interpolation=self._cv2.INTER_AREA)
        self._network.setInputSize((width, height))
        rows = self._network.detect(bgr)[1]
        return [] if rows is None else [_to_found(row, scale) for row in rows]


def open_onnx(kind: Any, file: Path, *options: Any) -> Any:
    """Open an ONNX file as one kind of OpenCV's face models.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If OpenCV cannot read it.
    """
    import cv2

    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        return kind.create(str(file), *options)
    except cv2.error as error:
        raise ValueError(f"OpenCV cannot read {file.name}") from error


def to_bgr(rgb: Any) -> Any:
    """Turn an RGB picture into OpenCV's array: height, width and blue, green, red."""
    return np.ascontiguousarray(np.asarray(rgb)[:, :, ::-1])


def keep_separate(faces: Sequence[Found]) -> list[Found]:
    """Keep one box of each face, the largest first.

    A face is found at several scales, and its eyes or its mouth may pass for small faces: what
    lies in a larger box by more than half is dropped.
    """
    kept: list[Found] = []
    for face in sorted(faces, key=lambda one: (-_area(one.box), -one.score)):
        if all(_shared(face.box, larger.box) <= _INSIDE * _area(face.box) for larger in kept):
            kept.append(face)
    return kept


def list_halves(shape: Sequence[int]) -> list[int]:
    """List by what to divide the picture's sides so that no face is too large for YuNet."""
    scales = [1]
    while max(shape[:2]) // scales[-1] > _YUNET_FACE_PX:
        scales.append(2 * scales[-1])
    return scales


def _to_found(row: Any, scale: int) -> Found:
    left, top, width, height, *points, score = (float(number) for number in row)
    return Found(
        (left * scale, top * scale, width * scale, height * scale),
        tuple((x * scale, y * scale) for x, y in zip(points[::2], points[1::2], strict=True)),
        score,
    )


def _area(box: FaceBox) -> float:
    return max(0.0, box[2]) * max(0.0, box[3])


def _shared(one: FaceBox, other: FaceBox) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)

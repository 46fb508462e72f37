"""Who is shown: the largest face of a picture, found, aligned and turned into a vector.

Two face models, which share nothing but the rule for what is too small: YuNet and SFace through
OpenCV, and dlib's. Where no face can be told, the row of features is NaN throughout: the picture
counts as a failure, and is not left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from dreamloom.evaluation.encoders.base import FaceBox, FacePoint, FaceReading, FaceStatus
from dreamloom.evaluation.encoders.computing import explaining
from dreamloom.evaluation.encoders.preprocessing import require_rgb

SMALLEST_BOX_PX = 64
"""A face's box must be so wide and so high before anybody can be told by it."""
SMALLEST_EYE_DISTANCE_PX = 20
"""And its eyes so far apart."""

_SURE = 0.9  # OpenCV's own threshold for YuNet
_OVERLAP = 0.3  # and for two boxes of one face
_YUNET_FACE_PX = 300  # YuNet is trained on faces of 10 to 300 px
# dlib's detector itself says 0; folds of cloth then pass for faces (docs/encoders.md).
_SURE_OF_DLIB = 0.5
_INSIDE = 0.5  # a box that lies in a larger one to more than this is no face of its own


class Found(NamedTuple):
    """A face that a detector found, in the picture's pixels."""

    box: FaceBox
    landmarks: tuple[FacePoint, ...]
    score: float


class _FaceFinder:
    """What finds the largest face of a picture and turns it into a vector."""

    may_miss = True
    key: str
    width: int

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images features"]:
        """Turn the largest face of each picture into a unit vector; NaN where there is none."""
        return stack_rows(self.find(images), self.width)

    def find(self, images: Sequence[Image.Image]) -> list[FaceReading]:
        """Find the largest face in each RGB picture of any size; dlib's from about 80 px on."""
        require_rgb(images)
        return [self._read(np.asarray(image)) for image in images]

    def _read(self, rgb: Any) -> FaceReading:
        raise NotImplementedError


class FaceEncoder(_FaceFinder):
    """YuNet finds the largest face, SFace says whose it is.

    YuNet looks at the picture at its own size, and at halves of it as long as a face could be
    larger than those it was trained on. SFace sees the face turned and scaled by its landmarks.

    Args:
        detector: YuNet's ONNX file.
        recogniser: SFace's ONNX file.
        name: How the key names the two.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        EvaluationError: If a file is missing, damaged, or another kind of model.
    """

    def __init__(self, detector: Path, recogniser: Path, name: str) -> None:
        import cv2

        self._cv2 = cv2
        self._detector = create_detector(detector)
        self._recogniser = create_recogniser(recogniser)
        self.width = int(self._recogniser.feature(np.zeros((112, 112, 3), np.uint8)).size)
        self.key = f"{name}/aligned-112"

    def _read(self, rgb: Any) -> FaceReading:
        bgr = to_bgr(rgb)
        faces = keep_separate(
            [found for scale in _halves(bgr.shape) for found in self._detect(bgr, scale)]
        )
        if not faces:
            return FaceReading("no_face", 0)
        largest = faces[0]
        status = judge_size(largest.box, largest.landmarks[0], largest.landmarks[1])
        features = None
        if status == "scored":
            row = [*largest.box, *(number for point in largest.landmarks for number in point)]
            aligned = self._recogniser.alignCrop(bgr, np.array([[*row, largest.score]], np.float32))
            features = to_unit(self._recogniser.feature(aligned))
        return FaceReading(
            status, len(faces), largest.box, largest.landmarks, largest.score, features
        )

    def _detect(self, bgr: Any, scale: int) -> list[Found]:
        height, width = (max(1, side // scale) for side in bgr.shape[:2])
        if scale > 1:
            bgr = self._cv2.resize(bgr, (width, height), interpolation=self._cv2.INTER_AREA)
        self._detector.setInputSize((width, height))
        rows = self._detector.detect(bgr)[1]
        return [] if rows is None else [_to_found(row, scale) for row in rows]


class DlibFaceEncoder(_FaceFinder):
    """dlib's face model: a second opinion, trained by others on other pictures.

    It was trained for distances between vectors, not for angles: cosines are high even between
    strangers, so that its scores mean something beside their floor and ceiling only.

    Source: D. E. King 2017, dlib's ``dlib_face_recognition_resnet_model_v1``.

    Args:
        folder: Holds the .dat files of the package ``face_recognition_models``.
        name: How the key names it.

    Raises:
        ModuleNotFoundError: If dlib is not installed.
        EvaluationError: If a file is missing or damaged.
    """

    RECOGNISER = "dlib_face_recognition_resnet_model_v1.dat"
    LANDMARKS = "shape_predictor_5_face_landmarks.dat"
    width = 128

    def __init__(self, folder: Path, name: str) -> None:
        import dlib

        self._detector = dlib.get_frontal_face_detector()
        with explaining(folder):
            self._landmarks = dlib.shape_predictor(str(folder / self.LANDMARKS))
            self._recogniser = dlib.face_recognition_model_v1(str(folder / self.RECOGNISER))
        self.key = f"{name}/aligned-150"

    def _read(self, rgb: Any) -> FaceReading:
        rgb = np.ascontiguousarray(rgb)
        boxes, scores, _ = self._detector.run(rgb, 0, _SURE_OF_DLIB)
        if not boxes:
            return FaceReading("no_face", 0)
        place = max(range(len(boxes)), key=lambda one: boxes[one].area())
        found = boxes[place]
        box = (
            *(float(found.left()), float(found.top())),
            *(float(found.width()), float(found.height())),
        )
        shape = self._landmarks(rgb, found)
        corners = [(float(point.x), float(point.y)) for point in shape.parts()]
        # The corners of the eye further right come first, then the other's, then the nose.
        status = judge_size(box, _middle(corners[2:4]), _middle(corners[0:2]))
        features = None
        if status == "scored":
            features = to_unit(np.array(self._recogniser.compute_face_descriptor(rgb, shape)))
        return FaceReading(status, len(boxes), box, None, float(scores[place]), features)


def create_detector(file: Path) -> Any:
    """Open YuNet's ONNX file.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        EvaluationError: If the file is missing or damaged.
    """
    import cv2

    with explaining(file):
        return _create(cv2, cv2.FaceDetectorYN, file, "", (320, 320), _SURE, _OVERLAP)


def create_recogniser(file: Path) -> Any:
    """Open SFace's ONNX file.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        EvaluationError: If the file is missing or damaged.
    """
    import cv2

    with explaining(file):
        return _create(cv2, cv2.FaceRecognizerSF, file, "")


def _create(cv2: Any, kind: Any, file: Path, *options: Any) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        return kind.create(str(file), *options)
    except cv2.error as error:
        raise ValueError(f"OpenCV cannot read {file.name}") from error


def to_bgr(rgb: Any) -> Any:
    """Turn an RGB picture into OpenCV's array: height, width and blue, green, red."""
    return np.ascontiguousarray(np.asarray(rgb)[:, :, ::-1])


def to_unit(features: Any) -> Float[Tensor, " features"]:
    """Turn a model's numbers into a unit vector."""
    flat = torch.tensor(np.asarray(features, dtype=np.float32)).flatten()
    return nn.functional.normalize(flat, dim=0)


def stack_rows(readings: Sequence[FaceReading], width: int) -> Float[Tensor, "readings features"]:
    """Give each reading's features a row; NaN throughout where there are none."""
    nobody = torch.full((width,), math.nan)
    rows = [nobody if one.features is None else one.features for one in readings]
    return torch.stack(rows) if rows else torch.empty(0, width)


def judge_size(box: FaceBox, one_eye: FacePoint, other_eye: FacePoint) -> FaceStatus:
    """Say whether a face has enough pixels to be told from another."""
    is_small = (
        min(box[2:]) < SMALLEST_BOX_PX or math.dist(one_eye, other_eye) < SMALLEST_EYE_DISTANCE_PX
    )
    return "too_small" if is_small else "scored"


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


def _halves(shape: Sequence[int]) -> list[int]:
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


def _middle(points: Sequence[FacePoint]) -> FacePoint:
    (left, top), (right, bottom) = points
    return (left + right) / 2, (top + bottom) / 2


def _area(box: FaceBox) -> float:
    return max(0.0, box[2]) * max(0.0, box[3])


def _shared(one: FaceBox, other: FaceBox) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)

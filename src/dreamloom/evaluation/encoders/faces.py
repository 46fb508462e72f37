"""Who is shown: the largest face of a picture, found, aligned and turned into a vector.

Two face models, which share nothing but the rule for what is too small: YuNet and SFace through
OpenCV, and dlib's. Where no face can be told, the row of features is NaN throughout: the picture
counts as a failure, and is not left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from dreamloom.evaluation.encoders.base import FaceReading, FaceStatus
from dreamloom.evaluation.encoders.face_boxes import (
    FaceBox,
    FacePoint,
    YunetDetector,
    open_onnx,
    to_bgr,
)
from dreamloom.evaluation.encoders.preprocessing import require_rgb
from dreamloom.evaluation.encoders.store import explaining

SMALLEST_BOX_PX = 64
"""A face's box must be so wide and so high before anybody can be told by it."""
SMALLEST_EYE_DISTANCE_PX = 20
"""And its eyes so far apart."""

# dlib's detector itself says 0; folds of cloth then pass for faces (docs/encoders.md).
_SURE_OF_DLIB = 0.5


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

    SFace sees the face turned and scaled by its landmarks.

    Args:
        detector: YuNet's ONNX file.
        recogniser: SFace's ONNX file.
        name: How the key names the two.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        EvaluationError: If a file is missing, damaged, or another kind of model.
    """

    def __init__(self, detector: Path, recogniser: Path, name: str) -> None:
        self._detector = YunetDetector(detector)
        self._recogniser = create_recogniser(recogniser)
        self.width = int(self._recogniser.feature(np.zeros((112, 112, 3), np.uint8)).size)
        self.key = f"{name}/aligned-112"

    def _read(self, rgb: Any) -> FaceReading:
        bgr = to_bgr(rgb)
        faces = self._detector.find(bgr)
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


def create_recogniser(file: Path) -> Any:
    """Open SFace's ONNX file.

    Raises:
        ModuleNotFoundError: If OpenCV is not installed.
        EvaluationError: If the file is missing or damaged.
    """
    import cv2

    with explaining(file):
        return open_onnx(cv2.FaceRecognizerSF, file, "")


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


def _middle(points: Sequence[FacePoint]) -> FacePoint:
    (left, top), (right, bottom) = points
    return (left + right) / 2, (top + bottom) / 2

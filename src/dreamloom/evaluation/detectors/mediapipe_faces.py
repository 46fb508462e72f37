"""Faces in photographs, found by MediaPipe's face landmarker.

MediaPipe and its model are both Apache-2.0. The package comes with ``dreamloom[detectors]``; the
model does not lie inside it and is a file of its own, which a user puts in place once (see
``docs/detectors.md``). Nothing is downloaded here, and nothing that is found is kept: landmarks of
a face are personal data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from dreamloom.core.run_folder import file_sha256
from dreamloom.evaluation.detectors.landmarks import (
    Eye,
    Face,
    FaceLandmarks,
    Points,
    SourceKind,
    order_faces,
)
from dreamloom.evaluation.encoders.store import Missing, models_folder

MODEL_FILE = "face_landmarker.task"
MODEL_SHA256 = "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"
"""Version 1 with 16-bit weights, 3,758,596 bytes: the one that the detectors were measured with."""

_MOST_FACES = 10
# Numbers of landmarks in the model's mesh. The subject's right eye is on the left of a picture.
_IRISES = ((468, 469, 470, 471, 472), (473, 474, 475, 476, 477))
_LIDS = (
    (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246),
    (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466),
)
_BLINKS = ("eyeBlinkRight", "eyeBlinkLeft")
_MOUTH = (
    *(78, 95, 88, 178, 87, 14, 317, 402, 318, 324),
    *(308, 415, 310, 311, 312, 13, 82, 81, 80, 191),
)


def default_model_path() -> Path:
    """Where the model is looked for unless told otherwise: beside the encoders' weights."""
    return models_folder() / "face_landmarker" / MODEL_FILE


def load_mediapipe(model: Path | None = None) -> MediaPipeFaces | Missing:
    """Load the finder of faces in photographs.

    Args:
        model: The model's file; None looks at `default_model_path`.

    Returns:
        The finder, or why there is none: the package or its model is absent, or the model is
        another one than its false alarms were measured with.
    """
    path = default_model_path() if model is None else model
    if find_spec("mediapipe") is None:
        return Missing("MediaPipe is not installed; install dreamloom[detectors]")
    if not path.is_file():
        return Missing(f"MediaPipe's model is not at {path}; docs/detectors.md says how to get it")
    if file_sha256(path) != MODEL_SHA256:
        return Missing(
            f"{path} is not the {MODEL_FILE} that the detectors' false alarms were measured with; "
            "docs/detectors.md says which one is"
        )
    return MediaPipeFaces(path)


class MediaPipeFaces:
    """Finds up to ten faces in a photograph, with irises, lids and mouths."""

    kind: SourceKind = "photographs"
    least_iris_px = 12.0
    cannot: Mapping[str, str] = {}

    def __init__(self, model: Path) -> None:
        self._model = model
        self.key = f"mediapipe-{metadata.version('mediapipe')}-face-landmarker-{MODEL_SHA256[:8]}"

    def find(self, image: Image.Image) -> FaceLandmarks:
        """Find the faces of an upright RGB picture.

        Raises:
            ValueError: If the picture is not RGB.
        """
        if image.mode != "RGB":
            raise ValueError(f"pictures must be 8-bit RGB, got {image.mode}")
        # MediaPipe's threads must end before the interpreter does, so each picture has its own.
        with _open_landmarker(self._model) as landmarker:
            faces = _look(landmarker, image)
            if faces:
                again = _look(landmarker, ImageOps.mirror(image))
                mirrored = [_mirror_irises(face, image.width) for face in again]
                faces = [_compare(face, mirrored) for face in faces]
        return FaceLandmarks((image.height, image.width), order_faces(faces))


def _open_landmarker(model: Path) -> Any:
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_path=str(model)),
        num_faces=_MOST_FACES,
        output_face_blendshapes=True,
        output_facial_transformation_matrixes=True,
    )
    return vision.FaceLandmarker.create_from_options(options)


def _look(landmarker: Any, image: Image.Image) -> list[Face]:
    import mediapipe

    pixels = np.ascontiguousarray(np.asarray(image))
    found = landmarker.detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels))
    return [
        _read_face(
            np.array([(point.x * image.width, point.y * image.height) for point in mesh]),
            {shape.category_name: float(shape.score) for shape in shapes},
            np.asarray(matrix, dtype=float),
        )
        for mesh, shapes, matrix in zip(
            found.face_landmarks,
            found.face_blendshapes,
            found.facial_transformation_matrixes,
            strict=True,
        )
    ]


def _read_face(mesh: Points, shapes: Mapping[str, Any], matrix: Float[np.ndarray, "4 4"]) -> Face:
    eyes = [
        Eye(
            centre=mesh[iris[0]],
            rim=mesh[list(iris[1:])],
            lids=mesh[list(lids)],
            blink=shapes.get(blink),
        )
        for iris, lids, blink in zip(_IRISES, _LIDS, _BLINKS, strict=True)
    ]
    first, second = sorted(eyes, key=lambda eye: float(eye.centre[0]))
    left, top = mesh.min(axis=0)
    right, bottom = mesh.max(axis=0)
    return Face(
        box=(float(left), float(top), float(right), float(bottom)),
        eyes=(first, second),
        mouth=mesh[list(_MOUTH)],
        turn_degrees=_turn(matrix),
    )


def _turn(matrix: Float[np.ndarray, "4 4"]) -> tuple[float, float, float]:
    """Read yaw, pitch and roll from the matrix that places a straight face in the picture."""
    yaw = np.arctan2(matrix[0, 2], matrix[2, 2])
    pitch = np.arcsin(np.clip(-matrix[1, 2], -1, 1))
    roll = np.arctan2(matrix[1, 0], matrix[1, 1])
    yaw, pitch, roll = np.degrees((yaw, pitch, roll))
    return float(yaw), float(pitch), float(roll)


def _mirror_irises(face: Face, width_px: int) -> Points:
    """Say where a mirrored picture's irises would be in the picture itself, left one first."""
    assert face.eyes is not None
    centres = np.array([eye.centre for eye in face.eyes[::-1]])
    return np.column_stack([width_px - centres[:, 0], centres[:, 1]])


def _compare(face: Face, mirrored: Sequence[Points]) -> Face:
    """Enter how far the irises of the nearest face of the mirrored picture lie away."""
    assert face.eyes is not None
    centres = np.array([eye.centre for eye in face.eyes])
    radius = float(np.mean([eye.radius_px for eye in face.eyes]))
    moves = [float(np.linalg.norm(other - centres, axis=1).max()) for other in mirrored]
    return replace(face, unsteadiness=min(moves, default=np.inf) / radius)

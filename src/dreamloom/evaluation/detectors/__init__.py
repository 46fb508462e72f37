"""Detectors of what drawn faces get wrong: eyes, teeth, and faces too many or too few."""

from dreamloom.evaluation.detectors.drawn_faces import DrawnFaces
from dreamloom.evaluation.detectors.eyes import Abstention
from dreamloom.evaluation.detectors.false_alarms import MEASURED, Tally, Trial
from dreamloom.evaluation.detectors.flagging import Flagging, Shown, flag_pictures
from dreamloom.evaluation.detectors.judges import (
    DETECTORS,
    PHOTO,
    Detector,
    DetectorName,
    Finding,
    Wanted,
)
from dreamloom.evaluation.detectors.landmarks import Eye, Face, FaceLandmarks, FaceSource
from dreamloom.evaluation.detectors.mediapipe_faces import (
    MediaPipeFaces,
    default_model_path,
    load_mediapipe,
)

__all__ = [
    "DETECTORS",
    "MEASURED",
    "PHOTO",
    "Abstention",
    "Detector",
    "DetectorName",
    "DrawnFaces",
    "Eye",
    "Face",
    "FaceLandmarks",
    "FaceSource",
    "Finding",
    "Flagging",
    "MediaPipeFaces",
    "Shown",
    "Tally",
    "Trial",
    "Wanted",
    "default_model_path",
    "flag_pictures",
    "load_mediapipe",
]

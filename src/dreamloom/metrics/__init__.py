"""What the scores are: similarity of features, the scorecard, and the bench that fills it."""

from dreamloom.metrics.bench import Bench, Seen, look_at
from dreamloom.metrics.scorecard import Group, PictureScores, Score, Scorecard, find_alarms
from dreamloom.metrics.similarity import (
    MEASURES,
    Measure,
    cosines,
    differences,
    photo_ceiling,
    prompt_fidelity,
    subject_fidelity,
    variety,
)

__all__ = [
    "MEASURES",
    "Bench",
    "Group",
    "Measure",
    "PictureScores",
    "Score",
    "Scorecard",
    "Seen",
    "cosines",
    "differences",
    "find_alarms",
    "look_at",
    "photo_ceiling",
    "prompt_fidelity",
    "subject_fidelity",
    "variety",
]

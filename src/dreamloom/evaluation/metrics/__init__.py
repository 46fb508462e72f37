"""What the scores are: similarity of features, the scorecard, and the bench that fills it."""

from dreamloom.evaluation.metrics.build_scorecard import fill_card
from dreamloom.evaluation.metrics.embed import Seen, look_at
from dreamloom.evaluation.metrics.evaluator import Bench
from dreamloom.evaluation.metrics.measures import MEASURE, MEASURES, Measure, Role
from dreamloom.evaluation.metrics.recognition import (
    calibrate_threshold,
    is_nearest,
    is_own_prompt_best,
)
from dreamloom.evaluation.metrics.roles import assign_roles
from dreamloom.evaluation.metrics.scorecard import (
    Flags,
    Group,
    PictureScores,
    Score,
    Scorecard,
    find_alarms,
)
from dreamloom.evaluation.metrics.similarity import (
    cosines,
    differences,
    drift,
    photo_ceiling,
    prompt_fidelity,
    subject_fidelity,
    variety,
)

__all__ = [
    "MEASURE",
    "MEASURES",
    "Bench",
    "Flags",
    "Group",
    "Measure",
    "PictureScores",
    "Role",
    "Score",
    "Scorecard",
    "Seen",
    "assign_roles",
    "calibrate_threshold",
    "cosines",
    "differences",
    "drift",
    "fill_card",
    "find_alarms",
    "is_nearest",
    "is_own_prompt_best",
    "look_at",
    "photo_ceiling",
    "prompt_fidelity",
    "subject_fidelity",
    "variety",
]

"""The evaluate stage: pictures and photos in, scores with n, interval, floor and ceiling out."""

from dreamloom.evaluation.merges import MergeSets, evaluate_merge, evaluate_merge_run
from dreamloom.evaluation.scoring import (
    STAGE,
    Floor,
    evaluate_folder,
    evaluate_images,
    evaluate_run,
    list_pictures,
    pick_encoders,
    read_pictures,
    read_scorecards,
    refuse_drawn_photos,
    replace_subject,
)

__all__ = [
    "STAGE",
    "Floor",
    "MergeSets",
    "evaluate_folder",
    "evaluate_images",
    "evaluate_merge",
    "evaluate_merge_run",
    "evaluate_run",
    "list_pictures",
    "pick_encoders",
    "read_pictures",
    "read_scorecards",
    "refuse_drawn_photos",
    "replace_subject",
]

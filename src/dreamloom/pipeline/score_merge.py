"""Score a merge beside its parts, from folders of pictures."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.events import Observer, silent
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.merges import MergeSets, evaluate_merge
from dreamloom.evaluation.metrics.retention import Retention
from dreamloom.evaluation.scoring import pick_encoders, read_pictures
from dreamloom.pipeline.score import PHOTO_SIDE_PX


def score_merge(
    folders: dict[str, Path],
    photos_folder: Path,
    style_folder: Path | None,
    config: LoomConfig,
    observe: Observer = silent,
) -> Retention:
    """Say how much of the subject and of the style a merge has kept.

    Args:
        folders: The pictures of ``base``, ``subject``, ``style`` and ``merged``: the same prompts
            and seeds, drawn by the base model, by each adapter alone, and by the merge.
        photos_folder: The subject's photos.
        style_folder: Pictures in the style; None takes what the style's adapter drew.
        config: Names the encoders and the device.
        observe: Told of progress.

    Raises:
        EvaluationError: If a folder holds no picture, or the sets have none in common.
        PhotoError: If a photo cannot be read or there is none.
    """
    sets = MergeSets(**{name: read_pictures(folder) for name, folder in folders.items()})
    side = sets.merged.resolution_px or PHOTO_SIDE_PX
    with TemporaryDirectory() as scratch:
        photos, style = (
            load_photos(folder, RunFolder(Path(scratch) / name), side, observe) if folder else None
            for name, folder in (("subject", photos_folder), ("style", style_folder))
        )
        assert photos is not None
        encoders = pick_encoders(config.evaluate, sets.merged, config.device)
        return evaluate_merge(sets, photos, style, config.evaluate, encoders)

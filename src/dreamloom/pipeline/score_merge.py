"""Score a merge beside its parts, from folders of pictures."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from dreamloom.core.config.settings import EvaluateConfig, LoomConfig
from dreamloom.core.device import measure_effort
from dreamloom.core.events import Observer, StageDone, StageSkipped, StageStarted, silent
from dreamloom.core.manifests import PhotoSet
from dreamloom.core.run_folder import Record, RunFolder, fingerprint
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.retention import MergeSets, Retention, evaluate_merge
from dreamloom.evaluation.scoring import pick_encoders, read_pictures
from dreamloom.pipeline.score import PHOTO_SIDE_PX
from dreamloom.pipeline.score_set import evaluation_options

STAGE = "retention"


def score_merge(
    folders: dict[str, Path],
    photos_folder: Path,
    style_folder: Path | None,
    config: LoomConfig,
    observe: Observer = silent,
) -> Retention:
    """Say how much of the subject and of the style a merge has kept.

    Where the merge's pictures lie in a run, the answer is kept in it, for the report.

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
        encoders = pick_encoders(config.evaluate.encoders, sets.merged.base_name, config.device)
        run = RunFolder(sets.merged.folder.absolute().parents[1])
        if sets.merged.folder.absolute().parent == run.images and run.is_run():
            return evaluate_merge_run(run, sets, photos, style, config.evaluate, encoders, observe)
        return evaluate_merge(sets, photos, style, encoders, evaluation_options(config.evaluate))


def evaluate_merge_run(
    run: RunFolder,
    sets: MergeSets,
    photos: PhotoSet,
    style_pictures: PhotoSet | None,
    config: EvaluateConfig,
    encoders: Encoders,
    observe: Observer = silent,
) -> Retention:
    """Say what a merge has kept, and keep the answer as the run's record ``retention-<name>``.

    Nothing is done again if the pictures, photos, encoders and settings are as they were.
    """
    stage = f"{STAGE}-{sets.merged.folder.name}"
    inputs = {
        **{images.folder.name: images.fingerprint for images in sets.all()},
        "photos": photos.fingerprint,
        "in the style": style_pictures.fingerprint if style_pictures else "none",
        "encoders": fingerprint(encoders.keys()),
        "settings": fingerprint(config),
    }
    if record := run.finished(stage, inputs):
        observe(StageSkipped(stage, "already scored"))
        return Retention.model_validate(record.results)
    observe(StageStarted(stage, "what the merge has kept"))
    with measure_effort() as effort:
        found = evaluate_merge(sets, photos, style_pictures, encoders, evaluation_options(config))
    run.write_record(
        Record(
            stage=stage,
            inputs=inputs,
            settings={"evaluate": config.model_dump()},
            outputs={},
            results=found.model_dump(mode="json"),
            base=sets.merged.base,
            runtime=f"{encoders.device} fp32",
            seconds=effort.seconds,
            peak_mib=effort.peak_mib,
        )
    )
    observe(StageDone(stage, effort.seconds))
    return found

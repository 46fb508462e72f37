"""Score a folder the way the script did that this project grew from, beside the right way."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import EvaluationError
from dreamloom.core.events import Observer, Progress, silent
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.scoring import pick_encoders, read_pictures, replace_subject
from dreamloom.experiments.seed_audit import (
    Audit,
    AuditedImage,
    Wording,
    audit_faults,
    bare_clip,
    count_rows,
)
from dreamloom.pipeline.score import PHOTO_SIDE_PX, find_subject


def score_as_seed(
    images: Path,
    photos_folder: Path,
    config: LoomConfig,
    target_text: str | None = None,
    floor: Path | None = None,
    observe: Observer = silent,
) -> Audit:
    """Score a folder the way the seed's faulty script did, fault by fault, beside the right way.

    Args:
        images: The pictures' folder.
        photos_folder: The subject's photos.
        config: Names the encoders, the device and, if it should, the subject.
        target_text: The text that the script was given; None takes "A photo of a" and the phrase.
        floor: A folder of other pictures to compare with the photos.
        observe: Told of progress.

    Raises:
        EvaluationError: If a folder holds no picture, or CLIP is not on this machine.
        PhotoError: If a photo cannot be read or there is none.
    """
    pictures = read_pictures(images)
    if not pictures.pictures:
        raise EvaluationError(
            f"There is no picture to score in {images}.", "Draw some, or name another folder."
        )
    below = read_pictures(floor).paths() if floor else []
    subject = find_subject(config, pictures)
    encoders = pick_encoders(config.evaluate.encoders, pictures.base_name, config.device)
    clip = bare_clip(encoders.clip)
    words = subject.phrase, subject.class_noun
    target = target_text or f"A photo of a {subject.phrase}"
    drawn = pictures.pictures if all(one.prompt for one in pictures.pictures) else ()
    wording = Wording(
        target=target,
        target_without=replace_subject(target, *words),
        prompts=tuple(picture.prompt for picture in drawn),
        prompts_without=tuple(replace_subject(picture.prompt, *words) for picture in drawn),
        seeds=tuple(picture.seed for picture in drawn),
    )
    total = count_rows(wording)
    with TemporaryDirectory() as scratch:
        side = pictures.resolution_px or PHOTO_SIDE_PX
        photos = load_photos(photos_folder, RunFolder(scratch), side, observe)
        return audit_faults(
            [AuditedImage(path, path) for path in pictures.paths()],
            [
                AuditedImage(photos_folder / photo.source, photos.folder / photo.file)
                for photo in photos.photos
            ],
            clip,
            wording,
            floor=[AuditedImage(path, path) for path in below],
            familiar=encoders.familiar,
            on_row=lambda done: observe(Progress("audit", "scoring", done, total)),
        )

"""Score a set of a run's pictures once, and keep the scorecard in the run."""

from __future__ import annotations

import json
from typing import Any

from filelock import FileLock

from dreamloom.core.config.loading import load_run_settings
from dreamloom.core.config.settings import EvaluateConfig, SubjectConfig
from dreamloom.core.device import measure_effort
from dreamloom.core.events import Note, Observer, StageDone, StageSkipped, StageStarted, silent
from dreamloom.core.manifests import MANIFEST, ImageSet, PhotoSet, read_photo_set
from dreamloom.core.run_folder import Record, RunFolder, fingerprint, write_json
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.metrics.measures import SubjectWords
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.scoring import (
    STAGE,
    EvaluationOptions,
    Floor,
    PartedPhotos,
    evaluate_images,
    pick_encoders,
    require_pictures,
)


def evaluation_options(config: EvaluateConfig) -> EvaluationOptions:
    """Give evaluation what it needs of the settings."""
    return EvaluationOptions(**config.model_dump())


def evaluate_run(
    run: RunFolder,
    images: ImageSet,
    photos: PhotoSet,
    *,
    floor: ImageSet | Floor | None = None,
    config: EvaluateConfig,
    subject: SubjectConfig,
    encoders: Encoders | None = None,
    observe: Observer = silent,
) -> Scorecard:
    """Score a set of pictures and keep the scorecard in the run's ``scores.json``.

    The set goes by its folder's name, and its record is ``evaluate-<name>``. Nothing is done
    again if the pictures, photos, encoders and settings are as they were.

    Args:
        run: Where the scores and the record go.
        images: The pictures.
        photos: The subject's photos, prepared.
        floor: The base model's pictures of the same prompts and seeds, alone or with strangers.
        config: How to score.
        subject: What the subject is called in prompts.
        encoders: From `pick_encoders`; None picks them, on the best device.
        observe: Told of progress.

    Raises:
        EvaluationError: If there is no picture or no photo, or a picture's file is gone.
        PhotoError: If a picture cannot be read.
    """
    key = images.folder.name
    stage = f"{STAGE}-{key}"
    require_pictures(images, photos, floor)
    held_out = find_held_out(run, photos)
    loaded = encoders or pick_encoders(config.encoders, images.base_name)
    inputs = {
        "images": images.fingerprint,
        "photos": photos.fingerprint,
        "floor": floor.fingerprint if floor else "none",
        "encoders": fingerprint(loaded.keys()),
        "settings": fingerprint(config, subject, key),
        # Scores of before, which know of none, stay valid where none was held out.
        **({"held-out photos": fingerprint(sorted(held_out))} if held_out else {}),
    }
    # The file of scores is shared by all sets; the card's own fingerprint says whether it holds.
    record, known = run.read_record(stage), read_scorecards(run).get(key)
    is_same = record and known and record.results.get("card") == fingerprint(known)
    if record and known and is_same and record.inputs == inputs:
        observe(StageSkipped(stage, "already scored"))
        return known
    observe(StageStarted(stage, f"{len(images.pictures)} pictures"))
    with measure_effort() as effort:
        card = evaluate_images(
            images,
            PartedPhotos(photos, held_out),
            subject=SubjectWords(subject.phrase, subject.class_noun),
            floor=floor,
            options=evaluation_options(config),
            encoders=loaded,
            observe=observe,
            stage=stage,
        )
    _keep_scorecard(run, key, card, observe)
    run.write_record(
        Record(
            stage=stage,
            inputs=inputs,
            settings={"evaluate": config.model_dump(), "subject": subject.model_dump()},
            outputs=run.hash_outputs(run.scores),
            results={
                "card": fingerprint(card),
                "scores": {measure: score.value for measure, score in card.scores.items()},
                "alarms": list(card.alarms),
            },
            base=images.base,
            runtime=f"{loaded.device} fp32",
            seconds=effort.seconds,
            peak_mib=effort.peak_mib,
        )
    )
    observe(StageDone(stage, effort.seconds, str(run.scores)))
    return card


def name_held_out(photos: PhotoSet, count: int) -> frozenset[str]:
    """Name the photos that a training holds out, by the hashes of their files: the last ones."""
    first = max(0, len(photos.photos) - count)
    return frozenset(photo.source_sha256 for photo in photos.photos[first:])


def find_held_out(run: RunFolder, photos: PhotoSet) -> frozenset[str]:
    """Find which photos a run's training held out; none where it has no settings or photos."""
    if not (run.settings_file.is_file() and (run.photos / MANIFEST).is_file()):
        return frozenset()
    count = load_run_settings(run.settings_file).validation.held_out_photos
    held_out = name_held_out(read_photo_set(run.photos), count)
    return held_out & {photo.source_sha256 for photo in photos.photos}


def read_scorecards(run: RunFolder) -> dict[str, Scorecard]:
    """Read a run's scorecards by the name of their set.

    Cards of another version, which cannot be read, are left out; of an absent or damaged file
    nothing is read.
    """
    cards = {}
    for name, card in (_read_scores(run) or {}).items():
        try:
            cards[name] = Scorecard.model_validate(card)
        except ValueError:
            continue
    return cards


def _read_scores(run: RunFolder) -> dict[str, Any] | None:
    """Read a run's scores as they were written; None if there are none that can be read."""
    try:
        found = json.loads(run.scores.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _keep_scorecard(run: RunFolder, key: str, card: Scorecard, observe: Observer) -> None:
    """Add a card to the run's scores, which keep whatever else they hold.

    Several evaluations may end at once, so they wait for each other between reading and writing.
    """
    with FileLock(run.path / ".scores.lock"):
        known = _read_scores(run)
        if known is None and run.scores.exists():
            number = len(list(run.path.glob("scores.damaged-*.json"))) + 1
            aside = run.scores.rename(run.path / f"scores.damaged-{number}.json")
            text = f"{run.scores} cannot be read; it is kept as {aside.name}"
            observe(Note(f"{STAGE}-{key}", text, warning=True))
        write_json(run.scores, {**(known or {}), key: card})

"""The evaluate stage: pictures and photos in, scores with n, interval, floor and ceiling out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dreamloom.config import EvaluateConfig, SubjectConfig
from dreamloom.errors import EvaluationError
from dreamloom.events import Note, Observer, Progress, StageDone, StageSkipped, StageStarted, silent
from dreamloom.features import Encoders, Missing, load_encoders
from dreamloom.metrics import (
    MEASURES,
    Bench,
    Group,
    PictureScores,
    Score,
    Scorecard,
    find_alarms,
    look_at,
)
from dreamloom.pictures import MANIFEST, ImageSet, PhotoSet, Picture, image_files, read_image_set
from dreamloom.rundir import Record, RunDir, file_sha256, fingerprint, write_json
from dreamloom.runtime import measure_effort, pick_runtime

STAGE = "evaluate"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Files that count as pictures in a folder without a manifest."""


def evaluate_run(
    run: RunDir,
    images: ImageSet,
    photos: PhotoSet,
    *,
    floor: ImageSet | None = None,
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
        floor: The base model's pictures of the same prompts and seeds.
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
    _require(images, photos, floor)
    loaded = encoders or pick_encoders(config, images)
    inputs = {
        "images": images.fingerprint,
        "photos": photos.fingerprint,
        "floor": floor.fingerprint if floor else "none",
        "encoders": fingerprint(loaded.keys()),
        "settings": fingerprint(config, subject, key),
    }
    record = run.finished(stage, inputs)
    known = read_scorecards(run)
    if record and key in known and record.results.get("card") == fingerprint(known[key]):
        observe(StageSkipped(stage, "already scored"))
        return known[key]
    observe(StageStarted(stage, f"{len(images.pictures)} pictures"))
    with measure_effort() as effort:
        card = evaluate_images(
            images,
            photos,
            floor=floor,
            config=config,
            subject=subject,
            encoders=loaded,
            observe=observe,
            stage=stage,
        )
    write_json(run.scores, {**known, key: card})
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


def pick_encoders(config: EvaluateConfig, images: ImageSet, device: str = "auto") -> Encoders:
    """Load the encoders that the settings name; auto knows picturebook's own pictures.

    Raises:
        ConfigError: If the device is unknown or not there.
    """
    kind = config.encoders
    if kind == "auto":
        kind = "picturebook" if images.base.get("name") == "picturebook" else "standard"
    return load_encoders(kind, pick_runtime(device, "fp32").device)


def read_scorecards(run: RunDir) -> dict[str, Scorecard]:
    """Read a run's scorecards by the name of their set; none if the file is absent or damaged."""
    try:
        found = json.loads(run.scores.read_text(encoding="utf-8"))
        return {name: Scorecard.model_validate(card) for name, card in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def evaluate_folder(
    folder: Path,
    photos: PhotoSet,
    *,
    floor: Path | None = None,
    config: EvaluateConfig,
    subject: SubjectConfig,
    encoders: Encoders | None = None,
    observe: Observer = silent,
) -> Scorecard:
    """Score a folder of pictures, with a manifest or without; see `evaluate_images`.

    Raises:
        EvaluationError: If a folder does not exist or holds no picture.
    """
    return evaluate_images(
        read_pictures(folder),
        photos,
        floor=read_pictures(floor) if floor else None,
        config=config,
        subject=subject,
        encoders=encoders,
        observe=observe,
    )


def read_pictures(folder: Path) -> ImageSet:
    """Read a folder of drawn pictures; without a manifest, prompts and seeds stay unknown.

    Raises:
        EvaluationError: If the folder does not exist or holds no picture.
    """
    if not folder.is_dir():
        raise EvaluationError(
            f"There is no folder {folder}.", "Name a folder of pictures to score."
        )
    if (folder / MANIFEST).is_file():
        return read_image_set(folder)
    files = image_files(folder, SUFFIXES)
    if not files:
        raise EvaluationError(
            f"{folder} holds no pictures.", f"Put pictures there: {', '.join(SUFFIXES)}."
        )
    pictures = tuple(
        Picture(file=path.name, prompt="", seed=index, scheduler="", steps=0, guidance=0.0)
        for index, path in enumerate(files)
    )
    return ImageSet(folder=folder, base={}, resolution_px=0, pictures=pictures)


def evaluate_images(
    images: ImageSet,
    photos: PhotoSet,
    *,
    floor: ImageSet | None = None,
    config: EvaluateConfig,
    subject: SubjectConfig,
    encoders: Encoders | None = None,
    observe: Observer = silent,
    stage: str = STAGE,
) -> Scorecard:
    """Score pictures of a subject against its photos and their own prompts.

    Args:
        images: The pictures, with prompts and seeds.
        photos: The subject's photos, prepared.
        floor: The base model's pictures of the same prompts, seeds, schedulers and steps.
        config: Which encoders, and how many resamples for which confidence.
        subject: Its phrase is replaced by its class noun in the text that pictures are compared
            with: encoders cannot know the phrase.
        encoders: From `pick_encoders`; None picks them, on the best device.
        observe: Told of progress and of alarms.
        stage: The name under which it is told.

    Returns:
        The scorecard. A score whose encoder is not on this machine is not measured, and its note
        says what to do about it.

    Raises:
        EvaluationError: If there is no picture or no photo, or a picture's file is gone.
        PhotoError: If a picture cannot be read.
    """
    _require(images, photos, floor)
    loaded = encoders or pick_encoders(config, images)
    sets = [images.paths(), photos.paths(), floor.paths() if floor else []]
    total, done = sum(map(len, sets)), 0
    seen = []
    for task, paths in zip(("pictures", "photos", "floor"), sets, strict=True):
        seen.append(
            look_at(
                paths,
                loaded,
                lambda now, task=task, done=done: observe(  # type: ignore[misc]
                    Progress(stage, f"looking at {task}", done + now, total)
                ),
            )
        )
        done += len(paths)
    words = subject.phrase, subject.class_noun
    prompts = [replace_subject(picture.prompt, *words) for picture in images.pictures]
    bench = Bench(
        pictures=images.pictures,
        prompts=prompts,
        partners=_pair_up(images, floor, subject),
        seen=seen[0],
        photos=seen[1],
        below=seen[2] if floor else None,
        encoders=loaded,
        resamples=config.resamples,
        confidence=config.confidence,
    )
    card = _fill_in(bench, images, photos)
    for text in card.alarms:
        observe(Note(stage, text, warning=True))
    if card.warning:
        observe(Note(stage, card.warning, warning=True))
    return card


def replace_subject(prompt: str, phrase: str, class_noun: str) -> str:
    """Say a prompt without the invented word: "a photo of rraj person" as "a photo of person".

    Example:
        >>> replace_subject("a photo of Rraj person at night", "rraj person", "person")
        'a photo of person at night'
    """
    named = rf"(?<!\w){re.escape(phrase)}(?!\w)"
    return re.sub(named, lambda _: class_noun, prompt, flags=re.IGNORECASE)


def _require(images: ImageSet, photos: PhotoSet, floor: ImageSet | None) -> None:
    if not images.pictures:
        raise EvaluationError(
            f"There is no picture to score in {images.folder}.",
            "Draw some, or name another folder.",
        )
    if not photos.photos:
        raise EvaluationError(
            "There is no photo to compare with.", "Name a folder of the subject's photos: --photos."
        )
    paths = [*images.paths(), *photos.paths(), *(floor.paths() if floor else [])]
    gone = [path for path in paths if not path.is_file()]
    if gone:
        raise EvaluationError(
            f"{len(gone)} listed pictures are gone, first {gone[0]}.",
            "Draw or prepare them again, or put them back.",
        )


def _pair_up(images: ImageSet, floor: ImageSet | None, subject: SubjectConfig) -> list[int | None]:
    """Find each picture's floor: the same words, seed, scheduler and steps."""

    def moment(picture: Picture) -> tuple[str, int, str, int]:
        prompt = replace_subject(picture.prompt, subject.phrase, subject.class_noun)
        return prompt, picture.seed, picture.scheduler, picture.steps

    pictures = floor.pictures if floor else ()
    places = {moment(picture): place for place, picture in enumerate(pictures) if picture.prompt}
    return [places.get(moment(picture)) for picture in images.pictures]


def _fill_in(bench: Bench, images: ImageSet, photos: PhotoSet) -> Scorecard:
    pictures = images.pictures
    scores, ceilings = bench.scores(range(len(pictures))), bench.ceilings()
    own = {
        measure.name: values.mean(axis=1) if measure.kind == "subject" else values
        for measure in MEASURES
        if measure.kind != "variety" and measure.name in bench.values
        for values, _ in [bench.values[measure.name]]
    }
    listed = tuple(
        PictureScores(
            file=picture.file,
            prompt=picture.prompt or None,
            category=picture.category,
            seed=picture.seed if picture.prompt else None,
            scheduler=picture.scheduler or None,
            steps=picture.steps or None,
            values={name: float(values[row]) for name, values in own.items()},
        )
        for row, picture in enumerate(pictures)
    )
    sources = {photo.source_sha256 for photo in photos.photos}
    alarms = find_alarms(
        scores=scores,
        ceilings=ceilings,
        pictures=listed,
        prints=bench.seen.prints,
        copied=[
            shown in bench.photos.prints or file_sha256(path) in sources
            for shown, path in zip(bench.seen.prints, images.paths(), strict=True)
        ],
        flat=bench.seen.flat,
        floor_prints=[
            None if place is None or bench.below is None else bench.below.prints[place]
            for place in bench.partners
        ],
    )
    warning = _warning(bench)
    if warning:
        scores = {name: _doubt(score) for name, score in scores.items()}
    return Scorecard(
        warning=warning,
        alarms=(*alarms, *_breakdowns(bench)),
        notes=tuple(_notes(bench)),
        scores=scores,
        floors=bench.floors(),
        ceilings=ceilings,
        by_category=_groups(bench, "category"),
        by_prompt=_groups(bench, "prompt", "category"),
        by_cell=_groups(bench, "scheduler", "steps"),
        encoders=bench.encoders.kind,
        photos=len(photos.photos),
        confidence=bench.confidence,
        resamples=bench.resamples,
        pictures=listed,
    )


def _breakdowns(bench: Bench) -> list[str]:
    sets = (("pictures", bench.seen), ("photos", bench.photos), ("floor pictures", bench.below))
    return [
        f"{bench.encoders.keys()[name]} gave no usable numbers for {count} {what}, so nothing "
        f"that depends on it is measured."
        for what, seen in sets
        if seen
        for name, count in seen.broken.items()
    ]


def _groups(bench: Bench, *names: str) -> tuple[Group, ...]:
    """Score together what shares a value of each name; unknown values make no group."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row, picture in enumerate(bench.pictures):
        shared = tuple(getattr(picture, name) or None for name in names)
        if shared[0] is not None:
            found.setdefault(shared, []).append(row)
    return tuple(
        Group(
            **dict(zip(names, shared, strict=True)),
            scored=bench.prompts[rows[0]] if "prompt" in names else None,
            pictures=len(rows),
            scores=bench.scores(rows),
        )
        for shared, rows in found.items()
    )


def _doubt(score: Score) -> Score:
    text = "outside the world that this encoder knows"
    return score.model_copy(update={"note": f"{score.note}; {text}" if score.note else text})


def _warning(bench: Bench) -> str | None:
    """Say so if the encoders have never seen anything like these photos or pictures."""
    found = [
        f"These {what} are outside picturebook's world of drawings: its judges know only that, "
        f"so these scores mean nothing about real likeness."
        for what, seen in (("photographs", bench.photos), ("pictures", bench.seen))
        if 2 * seen.familiar.count(False) > len(seen.familiar)
    ]
    return found[0] if found else None


def _notes(bench: Bench) -> list[str]:
    notes = []
    alone = bench.partners.count(None)
    if bench.below is not None and alone:
        notes.append(
            f"{alone} of {len(bench.partners)} pictures have no floor of the same prompt, seed, "
            f"scheduler and steps; floors and lifts are those of the others."
        )
    if not all(bench.prompts):
        notes.append(
            "The prompts are unknown, so all pictures count as one prompt's, also for variety."
        )
    elif not isinstance(bench.encoders.clip, Missing):
        notes += [
            f"This prompt is too long for the encoder and is scored by its beginning: {text}"
            for text in bench.encoders.clip.too_long(list(dict.fromkeys(bench.prompts)))
        ]
    if len(bench.photos.prints) < 3:
        notes.append(
            "With fewer than three photos the ceiling has no interval, and no lift is given."
        )
    return notes

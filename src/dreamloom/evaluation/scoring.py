"""Scoring a set of pictures against a subject's photos."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from dreamloom.core.config.settings import EvaluateConfig, SubjectConfig
from dreamloom.core.device import measure_effort, pick_runtime
from dreamloom.core.errors import DreamLoomError, EvaluationError
from dreamloom.core.events import (
    Note,
    Observer,
    Progress,
    StageDone,
    StageSkipped,
    StageStarted,
    silent,
)
from dreamloom.core.manifests import (
    MANIFEST,
    ImageSet,
    PhotoSet,
    Picture,
    image_files,
    read_image_set,
)
from dreamloom.core.run_folder import Record, RunFolder, file_sha256, fingerprint, write_json
from dreamloom.data.prompts.packs import is_person
from dreamloom.evaluation.copy_detection import correlate_layouts, find_copies
from dreamloom.evaluation.detectors.drawn_faces import DrawnFaces
from dreamloom.evaluation.detectors.flagging import Flagging, Shown, flag_pictures
from dreamloom.evaluation.detectors.judges import Wanted
from dreamloom.evaluation.detectors.mediapipe_faces import load_mediapipe
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.encoders.loading import load_encoders
from dreamloom.evaluation.metrics.build_scorecard import build_scorecard
from dreamloom.evaluation.metrics.embed import Embeddings, embed_images
from dreamloom.evaluation.metrics.evaluator import Evaluator
from dreamloom.evaluation.metrics.measures import PictureRole
from dreamloom.evaluation.metrics.roles import assign_roles
from dreamloom.evaluation.metrics.scorecard import Scorecard

STAGE = "evaluate"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Files that count as pictures in a folder without a manifest."""


@dataclass(frozen=True)
class Floor:
    """What likeness is measured from.

    Args:
        images: The base model's pictures of the same prompts, seeds, schedulers and steps.
        impostors: Pictures of others of the subject's class, each of them somebody else, such as
            class images. They join the floor's pictures of the class: the threshold of verification
            is set by them, and where they are nearer to the photos they are the floor of identity.
    """

    images: ImageSet
    impostors: Sequence[Path] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The base model's pictures."""
        return self.images.pictures

    @property
    def fingerprint(self) -> str:
        """Hash over all pictures' bytes and the manifest."""
        if not self.impostors:
            return self.images.fingerprint
        return fingerprint(self.images.fingerprint, [file_sha256(path) for path in self.impostors])

    def paths(self) -> list[Path]:
        """The base model's pictures, and the strangers after them."""
        return [*self.images.paths(), *self.impostors]


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


def read_scorecards(run: RunFolder) -> dict[str, Scorecard]:
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
    if (folder / MANIFEST).is_file():
        return read_image_set(folder)
    return list_pictures(folder)


def list_pictures(folder: Path) -> ImageSet:
    """List the pictures of a folder, whatever a manifest may say of them.

    Raises:
        EvaluationError: If the folder does not exist or holds no picture.
    """
    if not folder.is_dir():
        raise EvaluationError(
            f"There is no folder {folder}.", "Name a folder of pictures to score."
        )
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


def refuse_drawn_photos(folder: Path) -> None:
    """Refuse to take for photos what DreamLoom drew: the two folders were swapped.

    Raises:
        EvaluationError: If the folder has the manifest of drawn pictures.
    """
    if not (folder / MANIFEST).is_file():
        return
    try:
        read_image_set(folder)
    except DreamLoomError:
        return  # the manifest of something else
    raise EvaluationError(
        f"{folder} holds pictures that DreamLoom drew, not photos.",
        "Were the two folders swapped? First the pictures, then --photos with the subject's.",
    )


def evaluate_images(
    images: ImageSet,
    photos: PhotoSet,
    *,
    floor: ImageSet | Floor | None = None,
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
        floor: The base model's pictures of the same prompts, seeds, schedulers and steps, alone or
            with strangers.
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
    impostors = floor.impostors if isinstance(floor, Floor) else ()
    sets = [images.paths(), photos.paths(), floor.paths() if floor else []]
    total, done = sum(map(len, sets)), 0
    embeddings = []
    for task, paths in zip(("pictures", "photos", "floor"), sets, strict=True):
        embeddings.append(
            embed_images(
                paths,
                loaded,
                lambda now, task=task, done=done: observe(  # type: ignore[misc]
                    Progress(stage, f"looking at {task}", done + now, total)
                ),
                views=task == "photos",
            )
        )
        done += len(paths)
    words = subject.phrase, subject.class_noun
    others: list[PictureRole] = ["class"] * len(impostors)
    beneath = floor.pictures if floor else ()
    roles = assign_roles(
        [picture.prompt for picture in images.pictures],
        [picture.category for picture in images.pictures],
        *words,
    )
    partners = _pair_up(images, floor, subject)
    nearness = correlate_layouts(embeddings[0].layouts, embeddings[1].views)
    evaluator = Evaluator(
        pictures=images.pictures,
        prompts=[replace_subject(picture.prompt, *words) for picture in images.pictures],
        roles=roles,
        partners=partners,
        embeddings=embeddings[0],
        photos=embeddings[1],
        nearness=nearness,
        copied=_find_copies(images, photos, nearness, embeddings[0], embeddings[1]),
        below=embeddings[2] if floor else None,
        below_prompts=[
            *(replace_subject(picture.prompt, *words) for picture in beneath),
            *([""] * len(impostors)),
        ],
        below_roles=[
            *assign_roles(
                [picture.prompt for picture in beneath],
                [picture.category for picture in beneath],
                *words,
            ),
            *others,
        ],
        below_units=[
            *(f"seed {picture.seed}" for picture in beneath),
            *(f"stranger {number}" for number in range(len(impostors))),
        ],
        encoders=loaded,
        resamples=config.resamples,
        confidence=config.confidence,
    )
    flaggings = (
        _flag(images, roles, photos, loaded, subject, observe, stage) if config.detectors else ()
    )
    card = build_scorecard(evaluator, photos, subject.class_noun, flaggings)
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


def _require(images: ImageSet, photos: PhotoSet, floor: ImageSet | Floor | None) -> None:
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


def _pair_up(
    images: ImageSet, floor: ImageSet | Floor | None, subject: SubjectConfig
) -> list[int | None]:
    """Find each picture's floor: the same words, seed, scheduler and steps."""

    def moment(picture: Picture) -> tuple[str, int, str, int]:
        prompt = replace_subject(picture.prompt, subject.phrase, subject.class_noun)
        return prompt, picture.seed, picture.scheduler, picture.steps

    pictures = floor.pictures if floor else ()
    places = {moment(picture): place for place, picture in enumerate(pictures) if picture.prompt}
    return [places.get(moment(picture)) for picture in images.pictures]


def _find_copies(
    images: ImageSet,
    photos: PhotoSet,
    nearness: Float[Tensor, "images photos"],
    embeddings: Embeddings,
    known: Embeddings,
) -> Bool[np.ndarray, " images"]:
    """Say which pictures repeat a photo: the same file, the same pixels, or the same layout."""
    among = correlate_layouts(known.layouts, known.views)
    repeated = find_copies(nearness, among).numpy()
    sources = {photo.source_sha256 for photo in photos.photos}
    return np.array(
        [
            bool(again) or shown in known.prints or file_sha256(path) in sources
            for again, shown, path in zip(repeated, embeddings.prints, images.paths(), strict=True)
        ]
    )


def _flag(
    images: ImageSet,
    roles: Sequence[PictureRole],
    photos: PhotoSet,
    encoders: Encoders,
    subject: SubjectConfig,
    observe: Observer,
    stage: str,
) -> tuple[Flagging, ...]:
    """Look for failures in the pictures of the subject."""
    shown = [
        Shown(
            picture.file,
            path,
            Wanted(
                picture.style,
                picture.face,
                None if picture.may_change is None else frozenset(picture.may_change),
            ),
        )
        for picture, path, role in zip(images.pictures, images.paths(), roles, strict=True)
        if role == "subject"
    ]
    source = DrawnFaces() if encoders.kind == "picturebook" else load_mediapipe()
    return flag_pictures(
        shown,
        photos.paths(),
        source,
        of_person=is_person(subject.class_noun),
        observe=lambda done, total: observe(Progress(stage, "looking for faults", done, total)),
    )

"""Scoring a set of pictures against a subject's photos."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from dreamloom.core.device import pick_runtime
from dreamloom.core.errors import DreamLoomError, EvaluationError
from dreamloom.core.events import Note, Observer, Progress, silent
from dreamloom.core.manifests import (
    MANIFEST,
    ImageSet,
    PhotoSet,
    Picture,
    image_files,
    read_image_set,
)
from dreamloom.core.run_folder import file_sha256, fingerprint
from dreamloom.data.picture_files import PICTURE_SUFFIXES
from dreamloom.data.prompts.packs import is_person
from dreamloom.evaluation.copy_detection import correlate_layouts, find_copies
from dreamloom.evaluation.detectors.drawn_faces import DrawnFaces
from dreamloom.evaluation.detectors.flagging import Flagging, Shown, flag_pictures
from dreamloom.evaluation.detectors.judges import Wanted
from dreamloom.evaluation.detectors.mediapipe_faces import load_mediapipe
from dreamloom.evaluation.encoders.base import EncoderKind, Encoders
from dreamloom.evaluation.encoders.loading import load_encoders
from dreamloom.evaluation.metrics.build_scorecard import build_scorecard
from dreamloom.evaluation.metrics.embed import Embeddings, embed_images
from dreamloom.evaluation.metrics.evaluator import Evaluator
from dreamloom.evaluation.metrics.evidence import Evidence
from dreamloom.evaluation.metrics.measures import (
    PictureRole,
    SubjectWords,
    asks_for_other_looks,
    assign_roles,
)
from dreamloom.evaluation.metrics.per_image import value_pictures
from dreamloom.evaluation.metrics.scorecard import Scorecard

STAGE = "evaluate"


@dataclass(frozen=True)
class EvaluationOptions:
    """How pictures are scored.

    Args:
        encoders: Which encoders look at the pictures; auto uses picturebook's judges for its own.
        detectors: Whether to look for failures, too; ``experimental`` adds the detectors that
            are not known to work.
        resamples: Bootstrap resamples behind each interval.
        confidence: Coverage of the intervals, between 0 and 1.
    """

    encoders: Literal["auto"] | EncoderKind = "auto"
    detectors: bool | Literal["experimental"] = True
    resamples: int = 2000
    confidence: float = 0.95


@dataclass(frozen=True)
class PartedPhotos:
    """The subject's photos, of which some were held out from training.

    Args:
        photos: All of them.
        held_out: The hashes of the files of those that were held out.
    """

    photos: PhotoSet
    held_out: frozenset[str] = frozenset()


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


def pick_encoders(kind: Literal["auto"] | EncoderKind, base: str, device: str = "auto") -> Encoders:
    """Load the encoders that know the pictures of a base model.

    Raises:
        ConfigError: If the device is unknown or not there.
    """
    if kind == "auto":
        kind = "picturebook" if base == "picturebook" else "standard"
    return load_encoders(kind, pick_runtime(device, "fp32").device)


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
    files = image_files(folder, PICTURE_SUFFIXES)
    if not files:
        raise EvaluationError(
            f"{folder} holds no pictures.", f"Put pictures there: {', '.join(PICTURE_SUFFIXES)}."
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
    photos: PhotoSet | PartedPhotos,
    *,
    subject: SubjectWords,
    floor: ImageSet | Floor | None = None,
    options: EvaluationOptions = EvaluationOptions(),
    encoders: Encoders | None = None,
    observe: Observer = silent,
    stage: str = STAGE,
) -> Scorecard:
    """Score pictures of a subject against its photos and their own prompts.

    Args:
        images: The pictures, with prompts and seeds.
        photos: The subject's photos, prepared, alone or with which were held out from training.
        subject: Its phrase is replaced by its class noun in the text that pictures are compared
            with: encoders cannot know the phrase.
        floor: The base model's pictures of the same prompts, seeds, schedulers and steps, alone or
            with strangers.
        options: Which encoders and detectors, and how many resamples for which confidence.
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
    parted = photos if isinstance(photos, PartedPhotos) else PartedPhotos(photos)
    photos = parted.photos
    require_pictures(images, photos, floor)
    encoders = encoders or pick_encoders(options.encoders, images.base_name)
    evidence = _look_at(images, photos, floor, subject, encoders, observe, stage)
    held = tuple(photo.source_sha256 in parted.held_out for photo in photos.photos)
    evidence = replace(evidence, held_out=held)
    flaggings: tuple[Flagging, ...] = ()
    if options.detectors:
        wanted = [
            Shown(
                picture.file,
                path,
                Wanted(
                    picture.style,
                    picture.face,
                    None if picture.may_change is None else frozenset(picture.may_change),
                ),
            )
            for picture, path, role in zip(
                images.pictures, images.paths(), evidence.roles, strict=True
            )
            if role in ("subject", "altered")
        ]
        flaggings = flag_pictures(
            wanted,
            photos.paths(),
            DrawnFaces() if encoders.kind == "picturebook" else load_mediapipe(),
            of_person=is_person(subject.class_noun),
            experimental=options.detectors == "experimental",
            observe=lambda done, total: observe(Progress(stage, "looking for faults", done, total)),
        )
    values = value_pictures(evidence)
    evaluator = Evaluator(evidence, values, options.resamples, options.confidence)
    card = build_scorecard(evaluator, photos, subject.class_noun, flaggings)
    for text in (*card.alarms, *([card.warning] if card.warning else [])):
        observe(Note(stage, text, warning=True))
    return card


def _look_at(
    images: ImageSet,
    photos: PhotoSet,
    floor: ImageSet | Floor | None,
    subject: SubjectWords,
    encoders: Encoders,
    observe: Observer,
    stage: str,
) -> Evidence:
    """Show every picture to the encoders, and find out what each is for and what it pairs with."""
    impostors = floor.impostors if isinstance(floor, Floor) else ()
    beneath = floor.pictures if floor else ()
    sets = [images.paths(), photos.paths(), floor.paths() if floor else []]
    total, done = sum(map(len, sets)), 0
    embeddings = []
    for task, paths in zip(("pictures", "photos", "floor"), sets, strict=True):
        embeddings.append(
            embed_images(
                paths,
                encoders,
                lambda now, task=task, done=done: observe(  # type: ignore[misc]
                    Progress(stage, f"looking at {task}", done + now, total)
                ),
                views=task == "photos",
            )
        )
        done += len(paths)
    shown, known, below = embeddings
    prompts, prompts_below = (
        [replace_subject(picture.prompt, *subject) for picture in pictures]
        for pictures in (images.pictures, beneath)
    )
    roles, roles_below = (
        assign_roles(
            [picture.prompt for picture in pictures],
            [picture.category for picture in pictures],
            *subject,
        )
        for pictures in (images.pictures, beneath)
    )
    roles = [
        "altered"
        if role == "subject" and asks_for_other_looks(picture.category, picture.may_change)
        else role
        for role, picture in zip(roles, images.pictures, strict=True)
    ]
    # A picture's floor has the same words, seed, scheduler and steps.
    cells, cells_below = (
        [(text, one.seed, one.scheduler, one.steps) for text, one in zip(texts, some, strict=True)]
        for texts, some in ((prompts, images.pictures), (prompts_below, beneath))
    )
    others: list[PictureRole] = ["class"] * len(impostors)
    places = {cell: place for place, cell in enumerate(cells_below) if beneath[place].prompt}
    nearness = correlate_layouts(shown.layouts, known.views)
    return Evidence(
        pictures=images.pictures,
        prompts=prompts,
        roles=roles,
        partners=[places.get(cell) for cell in cells],
        embeddings=shown,
        photos=known,
        nearness=nearness,
        copied=_find_copies(images, photos, nearness, shown, known),
        below=below if floor else None,
        below_prompts=[*prompts_below, *([""] * len(impostors))],
        below_roles=[*roles_below, *others],
        below_units=[
            *(f"seed {picture.seed}" for picture in beneath),
            *(f"stranger {number}" for number in range(len(impostors))),
        ],
        encoders=encoders,
    )


def _find_copies(
    images: ImageSet,
    photos: PhotoSet,
    nearness: Float[Tensor, "images photos"],
    shown: Embeddings,
    known: Embeddings,
) -> Bool[np.ndarray, " images"]:
    """Say which pictures repeat a photo: the same file, the same pixels, or the same layout."""
    repeated = find_copies(nearness, correlate_layouts(known.layouts, known.views)).numpy()
    sources = {photo.source_sha256 for photo in photos.photos}
    return np.array(
        [
            bool(again) or pixels in known.prints or file_sha256(path) in sources
            for again, pixels, path in zip(repeated, shown.prints, images.paths(), strict=True)
        ]
    )


def replace_subject(prompt: str, phrase: str, class_noun: str) -> str:
    """Say a prompt without the invented word: "a photo of rraj person" as "a photo of person".

    Example:
        >>> replace_subject("a photo of Rraj person at night", "rraj person", "person")
        'a photo of person at night'
    """
    named = rf"(?<!\w){re.escape(phrase)}(?!\w)"
    return re.sub(named, lambda _: class_noun, prompt, flags=re.IGNORECASE)


def require_pictures(images: ImageSet, photos: PhotoSet, floor: ImageSet | Floor | None) -> None:
    """Refuse to score what is not there.

    Raises:
        EvaluationError: If there is no picture or no photo, or a picture's file is gone.
    """
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

"""The evaluate stage: pictures and photos in, scores out, each with n, interval, floor and ceiling."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from dreamloom import metrics, statistics
from dreamloom.config import EvaluateConfig, SubjectConfig
from dreamloom.errors import EvaluationError
from dreamloom.events import Note, Observer, Progress, StageDone, StageSkipped, StageStarted, silent
from dreamloom.features import EncoderKind, Encoders, Missing, Seen, load_encoders, look_at
from dreamloom.metrics import MEASURES, Measure
from dreamloom.pictures import MANIFEST, ImageSet, PhotoSet, Picture, image_files, read_image_set
from dreamloom.rundir import Record, RunDir, fingerprint, write_json
from dreamloom.statistics import Draws, Sampled
from dreamloom.runtime import measure_effort, pick_runtime

STAGE = "evaluate"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Files that count as pictures in a folder without a manifest."""

_Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class _Listed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Listed):
    """One score. What is absent is None, never 0, and ``note`` says why."""

    value: float | None = None
    """The mean over pictures, balanced over prompts."""
    n: int | None = None
    """How many pictures were scored."""
    interval: tuple[float, float] | None = None
    floor: float | None = None
    """The base model's score for the same prompts and seeds."""
    ceiling: float | None = None
    """The photos' score among themselves."""
    lift: float | None = None
    """How far from the floor (0) to the ceiling (1)."""
    key: str | None = None
    """Encoder, revision and preprocessing; only scores of one key may be compared."""
    lift_interval: tuple[float, float] | None = None
    note: str = ""


class Group(_Listed):
    """The scores of some of the pictures: one prompt, one category, or one sampler."""

    prompt: str | None = None
    scored: str | None = None
    """The text that pictures of this prompt were compared with."""
    category: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    pictures: int
    scores: dict[str, Score]


class PictureScores(_Listed):
    """One picture's own values."""

    file: str
    prompt: str | None
    category: str
    seed: int | None
    scheduler: str | None
    steps: int | None
    identity: float | None = None
    clip_i: float | None = None
    dino: float | None = None
    clip_t: float | None = None


class Scorecard(_Listed):
    """What was measured, and what speaks against believing it."""

    warning: str | None = None
    """Why the scores as a whole mean less than they seem to."""
    alarms: tuple[str, ...] = ()
    """Signs of a mistake, each in a sentence."""
    notes: tuple[str, ...] = ()
    scores: dict[str, Score]
    floors: dict[str, Score] = {}
    ceilings: dict[str, Score] = {}
    by_category: tuple[Group, ...] = ()
    by_prompt: tuple[Group, ...] = ()
    by_cell: tuple[Group, ...] = ()
    """One group for each scheduler and number of steps."""
    encoders: str
    photos: int
    confidence: float
    resamples: int
    pictures: tuple[PictureScores, ...]


def evaluate_run(
    run: RunDir,
    images: ImageSet,
    photos: PhotoSet,
    *,
    name: str = "",
    floor: ImageSet | None = None,
    config: EvaluateConfig,
    subject: SubjectConfig,
    device: str = "auto",
    encoders: Encoders | None = None,
    observe: Observer = silent,
) -> Scorecard:
    """Score a set of pictures and keep the scorecard in the run's ``scores.json``.

    Nothing is done again if the pictures, photos, encoders and settings are as they were.

    Args:
        run: Where the scores and the record go.
        images: The pictures.
        photos: The subject's photos, prepared.
        name: The set's name in scores.json, the record being ``evaluate-<name>``; empty takes
            the folder's name, and the record is ``evaluate``.
        floor: The base model's pictures of the same prompts and seeds.
        config: How to score.
        subject: What the subject is called in prompts.
        device: Where to compute.
        encoders: Loaded encoders; None loads those that the configuration names.
        observe: Told of progress.

    Raises:
        EvaluationError: If there is no picture or no photo, or a picture's file is gone.
        PhotoError: If a picture cannot be read.
    """
    stage, key = f"{STAGE}-{name}" if name else STAGE, name or images.folder.name
    _require(images, photos, floor)
    runtime = pick_runtime(device, "fp32")
    loaded = encoders or load_encoders(_kind(config, images), runtime.device)
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
    with measure_effort(runtime) as effort:
        card = evaluate_images(
            images,
            photos,
            floor=floor,
            config=config,
            subject=subject,
            device=device,
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
            runtime=runtime.name,
            seconds=effort.seconds,
            peak_mib=effort.peak_mib,
        )
    )
    observe(StageDone(stage, effort.seconds, str(run.scores)))
    return card


def read_scorecards(run: RunDir) -> dict[str, Scorecard]:
    """Read a run's scorecards by the name of their set; none if the file is absent or damaged."""
    try:
        found = json.loads(run.scores.read_text(encoding="utf-8"))
        return {name: Scorecard.model_validate(card) for name, card in found.items()}
    except (OSError, ValueError, AttributeError, ValidationError):
        return {}


def evaluate_folder(
    folder: Path,
    photos: PhotoSet,
    *,
    floor: Path | None = None,
    config: EvaluateConfig,
    subject: SubjectConfig,
    device: str = "auto",
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
        device=device,
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
    device: str = "auto",
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
        device: Where to compute; always in float32.
        encoders: Loaded encoders; None loads those that the configuration names.
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
    loaded = encoders or load_encoders(
        _kind(config, images), pick_runtime(device, "fp32").device
    )
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
    prompts = [
        replace_subject(picture.prompt, subject.phrase, subject.class_noun)
        for picture in images.pictures
    ]
    bench = _Bench(
        images, floor, prompts, seen[0], seen[1], seen[2] if floor else None, loaded, config, subject
    )
    card = _fill_in(bench, photos)
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


def _kind(config: EvaluateConfig, images: ImageSet) -> EncoderKind:
    if config.encoders == "auto":
        return "picturebook" if images.base.get("name") == "picturebook" else "standard"
    return config.encoders


def _require(images: ImageSet, photos: PhotoSet, floor: ImageSet | None) -> None:
    if not images.pictures:
        raise EvaluationError(
            f"There is no picture to score in {images.folder}.", "Draw some, or name another folder."
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


@dataclass
class _Bench:
    """Everything seen, and the scores of any part of it."""

    images: ImageSet
    floor: ImageSet | None
    prompts: list[str]
    """For each picture, the text it is compared with; empty where the prompt is unknown."""
    seen: Seen
    photos: Seen
    below: Seen | None
    """What the encoders saw in the floor's pictures."""
    encoders: Encoders
    config: EvaluateConfig
    subject: SubjectConfig
    _draws: dict[tuple[int, ...], Draws] = field(default_factory=dict)

    @cached_property
    def partners(self) -> list[int | None]:
        """For each picture, its floor: same words, seed, scheduler and steps."""
        if self.floor is None:
            return [None] * len(self.prompts)
        words = self.subject.phrase, self.subject.class_noun
        places = {
            _moment(picture, replace_subject(picture.prompt, *words)): index
            for index, picture in enumerate(self.floor.pictures)
            if picture.prompt
        }
        return [
            places.get(_moment(picture, prompt))
            for picture, prompt in zip(self.images.pictures, self.prompts, strict=True)
        ]

    def missing(self, measure: Measure) -> str:
        """Say why a score cannot be measured; empty if it can."""
        encoder = self.encoders.named()[measure.encoder]
        if isinstance(encoder, Missing):
            return encoder.reason
        sets = [seen for seen in (self.seen, self.photos, self.below) if seen]
        if any(measure.encoder in seen.broken for seen in sets):
            return f"{encoder.key} gave no usable numbers for some pictures"
        if measure.kind == "prompt" and not all(self.prompts):
            return "the prompts are unknown: the folder has no manifest"
        return ""

    @cached_property
    def values(self) -> dict[str, tuple[_Values, _Values | None]]:
        """Each measurable score's values for the pictures and for the floor's pictures.

        One row per picture; one column per photo, or per picture for variety.
        """
        found = {}
        for measure in MEASURES:
            if not self.missing(measure):
                of = partial(self._values, measure)
                found[measure.name] = (of(self.seen), of(self.below) if self.below else None)
        return found

    def _values(self, measure: Measure, seen: Seen) -> _Values:
        features = seen.features[measure.encoder]
        if measure.kind == "subject":
            photos = self.photos.features[measure.encoder]
            return metrics.subject_fidelity(generated=features, photos=photos).numpy()
        if measure.kind == "variety":
            return metrics.differences(features).numpy()
        if seen is self.seen:
            rows = self.texts
        else:
            places = {place: row for row, place in enumerate(self.partners) if place is not None}
            # A picture of the floor without a partner is never read; any text will do.
            rows = self.texts[[places.get(place, 0) for place in range(len(features))]]
        return metrics.prompt_fidelity(generated=features, prompts=rows).numpy()

    @cached_property
    def texts(self) -> Tensor:
        """Features of each picture's prompt."""
        clip = self.encoders.clip
        assert not isinstance(clip, Missing)
        known = list(dict.fromkeys(self.prompts))
        places = [known.index(prompt) for prompt in self.prompts]
        return clip.embed_texts(known)[places]

    def scores(self, rows: Sequence[int]) -> dict[str, Score]:
        """Score some of the pictures."""
        return {
            measure.name: self._score(measure, rows)
            for measure in MEASURES
            if measure.encoder != "dino" or self.encoders.kind == "standard"
        }

    def _score(self, measure: Measure, rows: Sequence[int]) -> Score:
        if reason := self.missing(measure):
            return Score(note=f"not measured: {reason}")
        encoder = self.encoders.named()[measure.encoder]
        assert not isinstance(encoder, Missing)
        own, below = self.values[measure.name]
        draws = self._draw(rows)
        sampled = self._sample(measure, own, rows, rows, draws)
        if np.isnan(sampled.value):
            return Score(note="not measured: it needs two pictures or more of one prompt")
        ceiling = self._ceiling(measure, draws)
        paired = [row for row in rows if self.partners[row] is not None]
        floor, lift, note = None, statistics.Lift(None), ""
        if below is not None and paired:
            # Where only some pictures have a floor, only those tell how far it was left behind.
            draws_below = self._draw(paired)
            places = [place for row in paired if (place := self.partners[row]) is not None]
            beneath = self._sample(measure, below, places, paired, draws_below)
            floor = None if np.isnan(beneath.value) else beneath.value
            if ceiling and floor is not None:
                both = self._sample(measure, own, paired, paired, draws_below)
                top = self._ceiling(measure, draws_below)
                assert top is not None
                lift = statistics.lift(
                    both, beneath, top, draws_below.independent, self.config.confidence
                )
                note = f"no lift: {lift.reason}" if lift.reason else ""
        return Score(
            value=sampled.value,
            n=len(rows),
            interval=self._interval(measure, sampled, draws),
            floor=floor,
            ceiling=ceiling.value if ceiling else None,
            lift=lift.value,
            key=encoder.key,
            lift_interval=lift.interval,
            note=note,
        )

    def _units(self, rows: Sequence[int]) -> tuple[list[tuple[str, int]], list[int]]:
        """Number the noises behind pictures: one prompt and seed, whatever sampler drew them."""
        noises = [(self.prompts[row], self.images.pictures[row].seed) for row in rows]
        units = list(dict.fromkeys(noises))
        numbers = {unit: number for number, unit in enumerate(units)}
        return units, [numbers[noise] for noise in noises]

    def _draw(self, rows: Sequence[int]) -> Draws:
        known = self._draws.get(tuple(rows))
        if known is None:
            units, _ = self._units(rows)
            known = self._draws[tuple(rows)] = statistics.draw(
                [prompt for prompt, _ in units],
                len(self.photos.prints),
                resamples=self.config.resamples,
                confidence=self.config.confidence,
            )
        return known

    def _sample(
        self,
        measure: Measure,
        values: _Values,
        places: Sequence[int],
        rows: Sequence[int],
        draws: Draws,
    ) -> Sampled:
        """Sample a score over ``places`` of its values, which belong to the pictures ``rows``."""
        units, unit_of = self._units(rows)
        member = np.zeros((len(units), len(rows)))
        member[unit_of, np.arange(len(rows))] = 1.0
        if measure.kind != "variety":
            share = member / member.sum(axis=1, keepdims=True)
            return statistics.sample_mean(share @ values[list(places)], draws)
        pictures = [self.images.pictures[row] for row in rows]
        together = np.array(
            [
                [
                    (self.prompts[row], one.scheduler, one.steps)
                    == (self.prompts[other_row], other.scheduler, other.steps)
                    for other_row, other in zip(rows, pictures, strict=True)
                ]
                for row, one in zip(rows, pictures, strict=True)
            ],
            dtype=float,
        )
        pairs = values[np.ix_(places, places)] * together
        return statistics.sample_pairs(
            member @ pairs @ member.T, member @ together @ member.T, draws
        )

    def _ceiling(self, measure: Measure, draws: Draws) -> Sampled | None:
        if measure.kind != "subject" or len(self.photos.prints) < 2:
            return None
        features = self.photos.features[measure.encoder]
        return statistics.sample_photo_pairs(metrics.cosines(features, features).numpy(), draws)

    def _interval(
        self, measure: Measure, sampled: Sampled, draws: Draws
    ) -> statistics.Interval | None:
        if measure.kind == "variety" and len(draws.clusters) < 3:
            return None  # one pair has no spread
        return statistics.interval(sampled, draws.independent, draws.confidence)

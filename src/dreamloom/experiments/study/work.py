"""The pieces of a study's work, each in a folder named by what it is made from.

What two arms have in common has one name, and is done once; what lies there already, from an
earlier call or from another study in the same folder, is not done again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dreamloom.core.config.aliases import use_earlier_names
from dreamloom.core.config.settings import NOT_TRAINED, LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Observer, silent, tee
from dreamloom.core.manifests import ClassImageSet, PhotoSet, read_image_set, read_photo_set
from dreamloom.core.run_folder import Record, RunFolder, fingerprint
from dreamloom.data.buckets import suggest_step
from dreamloom.data.photos.prepare import fingerprint_photos, load_photos
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.scoring import pick_encoders
from dreamloom.experiments.study.question import Arm, Study, count_updates
from dreamloom.inference.generate import ActiveAdapter, Prompt, check_request, generate_images
from dreamloom.models.base import Model
from dreamloom.pipeline.draw import pack_prompts
from dreamloom.pipeline.score_set import evaluate_run
from dreamloom.pipeline.session import open_session
from dreamloom.pipeline.train import find_class_images, open_run
from dreamloom.training.train import check_training, train_adapter

SET = "pictures"
"""The name of the one set of pictures in each folder of drawings."""

_KEY_DIGITS = 16
_pick_encoders = cache(pick_encoders)  # once per process


def name_trained_settings(config: LoomConfig) -> dict[str, object]:
    """Name the settings that what is trained depends on, as they were always called."""
    return use_earlier_names(
        {
            name: value
            for name, value in config.flat().items()
            # Settings that came later count only where they are used.
            if not name.startswith(NOT_TRAINED) and (name, value) != ("train.init_adapter", "")
        }
    )


@dataclass(frozen=True)
class Training:
    """One training: everything that its adapter depends on.

    Args:
        root: The study's folder.
        config: Settled settings; ``seed`` is the training seed.
        base: Fingerprint of the base model.
        prepared: Folder of the run that holds the prepared photos.
        files: Names of those of them that are trained on.
    """

    root: Path
    config: LoomConfig
    base: str
    prepared: Path
    files: tuple[str, ...]

    @property
    def photos(self) -> PhotoSet:
        """The photos that are trained on."""
        every = read_photo_set(RunFolder(self.prepared).photos)
        trained_on = tuple(photo for photo in every.photos if photo.file in self.files)
        return every.model_copy(update={"photos": trained_on})

    @property
    def key(self) -> str:
        """Name it by what it is made from."""
        settings = name_trained_settings(self.config)
        return fingerprint(settings, self.base, self.photos.fingerprint)[:_KEY_DIGITS]

    @property
    def run(self) -> RunFolder:
        """Where the adapter goes."""
        return RunFolder(self.root / "runs" / self.key)

    @property
    def class_run(self) -> RunFolder | None:
        """Where its class images go, which trainings may share; None if it needs none."""
        config = self.config
        if config.priors.kind not in {"generated", "folder"} or config.train.prior_weight == 0:
            return None
        priors = use_earlier_names(config.priors.model_dump(), "priors")
        parts = (config.class_prompt(), priors, config.photos.resolution_px, config.seed)
        key = fingerprint(self.base, *parts, *config.memory.changes_results)[:_KEY_DIGITS]
        return RunFolder(self.root / "class-images" / key)


@dataclass(frozen=True)
class DrawnSet:
    """One set of pictures, and what it is scored against.

    Args:
        root: The study's folder.
        config: Settled settings of drawing and scoring.
        base: Fingerprint of the base model.
        prompts: What is drawn.
        references: Folder of the run that holds the photos to score against.
        adapter: The adapter that is worn, within the study's folder; None draws the base model.
        weight: Weight of the adapter.
        floor: The base model's drawing of the same; None without one.
    """

    root: Path
    config: LoomConfig
    base: str
    prompts: tuple[Prompt, ...]
    references: Path
    adapter: Path | None = None
    weight: float = 1.0
    floor: DrawnSet | None = None

    @property
    def run(self) -> RunFolder:
        """Where the pictures and their scores go, named by what they are drawn from."""
        how = self.config.generate.drawn_with
        active = [str(self.adapter.relative_to(self.root)), self.weight] if self.adapter else []
        kept_as = self.config.memory.changes_results
        key = fingerprint(self.base, active, how, self.prompts, *kept_as)[:_KEY_DIGITS]
        return RunFolder(self.root / "pictures" / key)


@dataclass(frozen=True)
class Survey:
    """What a study turned out to be, once its base model and its photos were read.

    Args:
        base: Fingerprint of the base model.
        trainings: How each arm is taught with each training seed, by the arm's name and the seed.
        references: Folder of the run that holds the prepared photos to score against.
    """

    base: str
    trainings: Mapping[tuple[str, int], Training]
    references: Path


def survey(root: Path, study: Study, observe: Observer = silent) -> Survey:
    """Load the base model, read the photos, settle every arm, and check that each can train.

    The study's folder is made once all of that has succeeded which can be tried without it.

    Raises:
        PhotoError: If a photo cannot be read or there is none.
        ConfigError: If an arm asks for more photos than there are, or for what the base model
            does not know.
        BaseModelError: If the base model cannot be found or read.
    """
    configs, counts = {}, {arm.name: arm.photo_count for arm in study.list_arms()}
    for arm in study.list_arms():
        for seed in study.train_seeds:
            model, config = open_session(study.configure(arm, seed), observe=observe)
            configs[arm.name, seed] = config
        check_request(model, list_prompts(study, config), config.generate, [], SET)
        _find_photos(root, Path(study.photos), config, model)
    RunFolder(root).claim()
    trainings: dict[tuple[str, int], Training] = {}
    prepared: dict[str, Path] = {}
    for (name, seed), config in configs.items():
        model, how = open_session(config)[0], fingerprint(config.photos)
        if how not in prepared:
            prepared[how] = _prepare_photos(root, Path(study.photos), config, model, observe)
        every = read_photo_set(RunFolder(prepared[how]).photos)
        chosen = choose_photos(every, counts[name], seed).photos
        files = tuple(photo.file for photo in chosen)
        base = model.identity.fingerprint
        trainings[name, seed] = Training(root, config, base, prepared[how], files)
    _check_trainings(study, trainings)
    references = prepared[how]
    if study.references:
        references = _prepare_photos(root, Path(study.references), config, model, observe)
    return Survey(base, trainings, references)


def _check_trainings(study: Study, trainings: Mapping[tuple[str, int], Training]) -> None:
    """Find out whether every training that is left to do can be done at all.

    One training seed can be done if another can.
    """
    first = {t.key: t for (_, seed), t in trainings.items() if seed == study.train_seeds[0]}
    for training in first.values():
        if not training.run.adapter.is_file():
            captions = [photo.caption for photo in training.photos.photos]
            check_training(open_session(training.config)[0], captions, training.config)


def _find_photos(
    root: Path, folder: Path, config: LoomConfig, model: Model
) -> tuple[RunFolder, int]:
    """Read the photos, and name the folder of their prepared copies and the step of their sides."""
    side, shape = config.photos.resolution_px, config.photos.shape
    if side == "auto" or shape == "auto":
        raise ValueError("settings must be settled first")
    step_px = suggest_step(side, model.pixels_per_latent)
    keep_lines = config.photos.chooses_lines
    key = fingerprint_photos(folder, side, shape, step_px, keep_lines=keep_lines)[:_KEY_DIGITS]
    return RunFolder(root / "photos" / key), step_px


def _prepare_photos(
    root: Path, folder: Path, config: LoomConfig, model: Model, observe: Observer
) -> Path:
    side, shape = config.photos.resolution_px, config.photos.shape
    run, step_px = _find_photos(root, folder, config, model)
    assert side != "auto"
    assert shape != "auto"
    run.claim()
    keep_lines = config.photos.chooses_lines
    load_photos(folder, run, side, observe, shape=shape, step_px=step_px, keep_lines=keep_lines)
    return run.path


def choose_photos(photos: PhotoSet, count: int | None, train_seed: int) -> PhotoSet:
    """Choose some of the photos: more of them always include those of fewer.

    Each training seed draws an order of its own, so that the answer does not hang on which photo
    happens to come first.

    Raises:
        ConfigError: If there are not so many.
    """
    if count is None:
        return photos
    if count > len(photos.photos):
        raise ConfigError(
            f"An arm asks for {count} photos, but there are {len(photos.photos)}.",
            "Add photos, or leave that arm out.",
        )
    order = list(range(len(photos.photos)))
    random.Random(f"photos of training seed {train_seed}").shuffle(order)
    kept = tuple(photos.photos[place] for place in sorted(order[:count]))
    return photos.model_copy(update={"photos": kept})


def list_prompts(study: Study, config: LoomConfig) -> tuple[Prompt, ...]:
    """Fill in what the study draws: its own prompts and its packs; none of them twice."""
    words = {"subject": config.subject.phrase, "class_noun": config.subject.class_noun}
    packed = [prompt for pack in study.packs for prompt in pack_prompts(pack, *words.values())]
    own = [Prompt(text.format(**words)) for text in study.prompts]
    return tuple({prompt.text: prompt for prompt in (*own, *packed)}.values())


def plan_drawing(
    study: Study, found: Survey, arm: Arm, training: Training, seeds: range
) -> DrawnSet:
    """Say how an arm's adapter draws with some of the seeds, and what its floor is.

    Args:
        study: The study.
        found: Its survey.
        arm: One of its arms.
        training: How that was taught.
        seeds: Seeds of each prompt's pictures, all in a row.
    """
    config, updates = training.config, training.config.train.steps
    generate = config.generate.model_copy(
        update={"first_seed": seeds.start, "images_per_prompt": len(seeds)}
    )
    config = config.model_copy(update={"generate": generate})
    update = count_updates(arm.checkpoint, updates)
    run = training.run
    adapter = (
        run.adapter
        if update == updates
        else run.validation_samples / f"{update:06d}" / run.adapter.name
    )
    prompts = list_prompts(study, config)
    below = DrawnSet(training.root, config, found.base, prompts, found.references)
    return DrawnSet(
        training.root,
        config,
        found.base,
        prompts,
        found.references,
        adapter,
        arm.weight,
        below if study.floor else None,
    )


def draw_class_images(training: Training, observe: Observer = silent) -> ClassImageSet | None:
    """Draw the class images of a training, unless they lie there."""
    run = training.class_run
    if run is None:
        return None
    run.claim()
    return find_class_images(run, *open_session(training.config), observe)


def train(training: Training, observe: Observer = silent) -> Record:
    """Teach, unless it was done; its class images must be drawn."""
    model, config = open_session(training.config)
    priors = draw_class_images(training, observe)
    run = open_run(training.run.path, config)
    return train_adapter(run, model, training.photos, priors, config, tee(observe, run.observer()))


def draw(drawing: DrawnSet, observe: Observer = silent) -> float:
    """Draw, unless it was done; the adapter must be taught. Give the seconds a picture took."""
    run = drawing.run
    run.claim()
    active = [ActiveAdapter(drawing.adapter, drawing.weight)] if drawing.adapter else []
    model, config = open_session(drawing.config)
    generate_images(run, model, drawing.prompts, config.generate, active, SET, observe)
    record = run.read_record(f"generate-{SET}")
    return float(record.results["seconds_per_picture"]) if record else 0.0


def score(drawing: DrawnSet, observe: Observer = silent) -> Scorecard:
    """Score, unless it was done; the pictures and those of the floor must be drawn."""
    config = drawing.config
    images = read_image_set(drawing.run.images / SET)
    floor = drawing.floor
    return evaluate_run(
        drawing.run,
        images,
        read_photo_set(RunFolder(drawing.references).photos),
        floor=read_image_set(floor.run.images / SET) if floor else None,
        config=config.evaluate,
        subject=config.subject,
        encoders=_pick_encoders(config.evaluate.encoders, images.base_name, config.device),
        observe=observe,
    )

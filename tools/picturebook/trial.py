"""DreamBooth on trial: drawn people whom nothing was trained on are learned by the real stages.

Each of them has six photos. All are trained with the same class images, some of them without any
as well, and what the adapters draw is compared with the photos, with what the prompts ask for,
and with what the base model draws from the same prompts and seeds.

The work is cut into jobs for a pool of processes of one thread each: on two cores they finish
nearly twice as early as one process of two threads, because a small model's operations are too
short to be shared between threads. A trial's folder can be gone on with, like any run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import pick_runtime
from dreamloom.core.events import Observer, Progress, silent
from dreamloom.core.manifests import (
    ClassImageSet,
    ImageSet,
    read_class_image_set,
    read_image_set,
    read_photo_set,
)
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.class_images import make_class_images
from dreamloom.data.image_io import open_upright, to_tensor
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.metrics.measures import SubjectWords
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.evaluation.scoring import evaluate_images, pick_encoders
from dreamloom.evaluation.stats import intervals
from dreamloom.inference.generate import ActiveAdapter, Prompt, generate_images
from dreamloom.models.base import Model
from dreamloom.models.families import load_model
from dreamloom.picturebook.judges import load_attribute_reader
from dreamloom.picturebook.world import (
    JUDGING_SEED_START,
    Drawing,
    Identity,
    Scene,
    sample_drawing,
    vary,
)
from dreamloom.pipeline.score_set import evaluation_options
from dreamloom.pipeline.session import resolve_defaults
from dreamloom.pipeline.train import open_run
from dreamloom.training.train import train_adapter
from tools.picturebook.drawing import draw
from tools.picturebook.measurements import Row, at_least, at_most

PORTRAIT = "a photo of {subject}"
"""The prompt whose pictures are compared with the photos."""

ASKED: tuple[tuple[str, dict[str, str]], ...] = (
    ("a photo of {subject} in the snow", {"medium": "photo", "scene": "snow"}),
    ("a photo of {subject} at night", {"medium": "photo", "scene": "night"}),
    ("a painting of {subject} at Oktoberfest", {"medium": "painting", "scene": "oktoberfest"}),
    ("a pencil sketch of {subject} in a city", {"medium": "sketch", "scene": "city"}),
    ("a painting of {subject} in the style of Van Gogh", {"medium": "van gogh"}),
    ("a photo of {subject} wearing sunglasses", {"medium": "photo", "glasses": "sunglasses"}),
    ("a photo of {subject} with glasses in a forest", {"glasses": "glasses", "scene": "forest"}),
    ("a photo of {subject} wearing a top hat", {"medium": "photo", "hat": "top hat"}),
    ("a photo of {subject} wearing a cap in the mountains", {"hat": "cap", "scene": "mountains"}),
    ("a side view photo of {subject}", {"medium": "photo", "view": "side"}),
)
"""Prompts and the attributes that they ask for: none that contradicts who somebody is."""

LIFT_GOAL = 0.6
OBEDIENCE_GOAL = 0.10
LEAKAGE_GOAL = 2.0

_PEOPLE_SEED_START = JUDGING_SEED_START + 400_000
_ALIKE_AMONG = 5
_PHOTO_PX = 256
# Night, snow and Oktoberfest are left for prompts.
_PHOTO_SCENES: tuple[Scene, ...] = ("city", "beach", "forest", "studio", "mountains")
_SIDE_VIEW = 3  # the number of the one photo that is not from the front
_WITH, _WITHOUT = "with_prior", "without_prior"


@dataclass(frozen=True)
class TrialPlan:
    """How much is tried.

    Args:
        config: Settings of each run; portraits are drawn just as ``generate`` says.
        subjects: How many people are trained with class images.
        forgetful: How many of them are trained without class images as well.
        photos: Photos of each.
        asked_each: Pictures of each of the prompts `ASKED`.
        class_pictures: Pictures of the class prompt, for leakage.
        steps: Denoising steps of all pictures but the portraits.
    """

    config: LoomConfig
    subjects: int = 5
    forgetful: int = 2
    photos: int = 6
    asked_each: int = 2
    class_pictures: int = 16
    steps: int = 25


@dataclass(frozen=True)
class Outcome:
    """What came of one subject.

    Args:
        looks: Who it is, in a few words.
        identity: The portraits' likeness to the photos, with floor, ceiling and lift.
        obeyed: For each picture of `ASKED`, the share of what was asked for that the reader sees
            in it.
        obeyed_below: The same for the base model's pictures.
        rises: How much more like the subject than the base model's each picture of the class
            prompt is, by how the subject was trained: ``with_prior``, ``without_prior``; none
            where it was trained in one way only.
    """

    looks: str
    identity: Score
    obeyed: list[float]
    obeyed_below: list[float]
    rises: dict[str, list[float]]


def standard_plan() -> TrialPlan:
    """The trial that the table of goals asks for."""
    return TrialPlan(load_config("standard"))


def quick_plan() -> TrialPlan:
    """A trial that shows within a minute that everything runs, and measures nothing."""
    small = {
        "train.steps": 4,
        "priors.count": 4,
        "priors.steps": 4,
        "generate.steps": (4,),
        "generate.images_per_prompt": 3,
    }
    config = load_config("quick", overrides=small)
    return TrialPlan(config, subjects=2, forgetful=1, asked_each=1, class_pictures=3, steps=4)


def run_trial(
    pool: Executor, work: Path, plan: TrialPlan, observe: Observer = silent
) -> list[Outcome]:
    """Teach everybody, draw and judge.

    Args:
        pool: Processes to work in, each limited to one thread.
        work: Where the photos and the runs go; a trial that lies there is gone on with.
        plan: How much is tried.
        observe: Told of progress.

    Raises:
        RunFolderError: If ``work`` holds a trial with other settings.
    """
    people = choose_people(plan.subjects)
    for number, person in enumerate(people):
        draw_photos(person, number, plan.photos, _photo_folder(work, number))
    both = [*range(plan.forgetful)]
    # Teaching without class images need not wait for them.
    jobs: list[Future[None]] = [pool.submit(draw_class_images, work, plan)]
    jobs += [pool.submit(train_and_draw, work, plan, number, _WITHOUT) for number in both[:1]]
    jobs[0].result()
    # The longest first, so that no process ends long before the others.
    jobs += [
        pool.submit(train_and_draw, work, plan, number, _WITH) for number in range(plan.subjects)
    ]
    jobs += [pool.submit(train_and_draw, work, plan, number, _WITHOUT) for number in both[1:]]
    jobs += [pool.submit(draw_base, work, plan)]
    for done, job in enumerate(as_completed(jobs), start=1):
        job.result()
        observe(Progress("trial", "teaching and drawing", done, len(jobs)))
    judging = [
        pool.submit(judge_subject, work, plan, number, describe(person))
        for number, person in enumerate(people)
    ]
    return [job.result() for job in judging]


def choose_people(count: int) -> list[Identity]:
    """Choose persons whom nothing was trained on, any five in a row of different looks.

    They differ in the colour of their hair, in hair style and in skin, so that a likeness to the
    one is none to another.
    """
    chosen: list[Identity] = []
    seed = _PEOPLE_SEED_START
    while len(chosen) < count:
        drawing = sample_drawing(seed, kind="person")
        one, seed = drawing.identity, seed + 1
        unlike = all(
            one.hair != other.hair and one.style != other.style and one.skin != other.skin
            for other in chosen[1 - _ALIKE_AMONG :]
        )
        # Known persons have names, which training told the base model.
        if unlike and not drawing.name:
            chosen.append(one)
    return chosen


def describe(person: Identity) -> str:
    """Say in a few words how somebody looks."""
    words = [f"{person.skin} skin"]
    words += ["bald"] if person.style == "bald" else [f"{person.hair} hair, {person.style}"]
    words += [] if person.beard == "none" else [person.beard]
    return ", ".join(words)


def photo_records(person: Identity, number: int, count: int) -> list[Drawing]:
    """Say what a subject's photos show: different scenes, one side view, nothing worn.

    Whatever all photos share is learned as part of the subject; hats and glasses are not.
    """
    rng = random.Random(f"photos of subject {number}")
    return [
        vary(
            person,
            rng,
            medium="photo",
            scene=_PHOTO_SCENES[place % len(_PHOTO_SCENES)],
            view="side" if place == _SIDE_VIEW else "front",
            glasses="none",
            hat="none",
        )
        for place in range(count)
    ]


def draw_photos(person: Identity, number: int, count: int, folder: Path) -> None:
    """Draw a subject's photos into a folder, as a user would bring them."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, record in enumerate(photo_records(person, number, count)):
        draw(record, _PHOTO_PX).save(folder / f"{place}.png")


def draw_class_images(work: Path, plan: TrialPlan) -> None:
    """Draw the class images that all subjects share."""
    model, config = _prepare(plan)
    run, side = open_run(_base_folder(work), config), model.advice.resolution_px
    make_class_images(run, model, config.class_prompt(), config.worded_priors(), config.seed, side)


def draw_base(work: Path, plan: TrialPlan) -> None:
    """Draw with the base model whatever the adapters draw."""
    model, config = _prepare(plan)
    _draw_sets(open_run(_base_folder(work), config), model, config, plan)


def train_and_draw(work: Path, plan: TrialPlan, number: int, how: str) -> None:
    """Teach one subject, with or without class images, and draw with its adapter.

    Args:
        work: The trial's folder, in which the class images are drawn already.
        plan: How much is tried.
        number: The subject's number.
        how: ``with_prior`` or ``without_prior``.
    """
    model, config = _prepare(plan)
    priors: ClassImageSet | None = None
    if how == _WITH:
        priors = read_class_image_set(RunFolder(_base_folder(work)).priors)
    else:
        none = config.priors.model_copy(update={"kind": "none"})
        config = config.model_copy(update={"priors": none})
    run = open_run(_run_folder(work, number, how), config)
    photos = load_photos(_photo_folder(work, number), run, model.advice.resolution_px)
    train_adapter(run, model, photos, priors, config)
    _draw_sets(run, model, config, plan, number, how)


def _draw_sets(
    run: RunFolder,
    model: Model,
    config: LoomConfig,
    plan: TrialPlan,
    number: int | None = None,
    how: str = "",
) -> None:
    """Draw what is judged, with the adapter of a subject or else with the base model.

    Portraits, what is asked for, and the class where leakage is compared.
    """
    active = [ActiveAdapter(run.adapter)] if how else []
    phrase = config.subject.phrase

    def draw_set(name: str, texts: Sequence[str], each: int, steps: tuple[int, ...]) -> None:
        settings = config.generate.model_copy(update={"images_per_prompt": each, "steps": steps})
        prompts = [Prompt(text.format(subject=phrase)) for text in texts]
        generate_images(run, model, prompts, settings, active, name)

    # An adapter that was trained without class images is here for its leakage alone.
    if how != _WITHOUT:
        draw_set("portrait", [PORTRAIT], config.generate.images_per_prompt, config.generate.steps)
        draw_set("asked", [text for text, _ in ASKED], plan.asked_each, (plan.steps,))
    if number is None or number < plan.forgetful:
        draw_set("class", [config.class_prompt()], plan.class_pictures, (plan.steps,))


def judge_subject(work: Path, plan: TrialPlan, number: int, looks: str) -> Outcome:
    """Compare what a subject's adapters drew with the photos, the prompts and the base model."""
    base = _base_folder(work) / "images"
    trained = _run_folder(work, number, _WITH)
    own = trained / "images"
    portraits = judge_likeness(trained, own / "portrait", plan, base / "portrait")
    rises = {}
    if number < plan.forgetful:
        below = _likenesses(judge_likeness(trained, base / "class", plan))
        for how in (_WITH, _WITHOUT):
            drawn = _run_folder(work, number, how) / "images" / "class"
            above = _likenesses(judge_likeness(trained, drawn, plan))
            rises[how] = [one - other for one, other in zip(above, below, strict=True)]
    phrase = plan.config.subject.phrase
    return Outcome(
        looks=looks,
        identity=portraits.scores["identity"],
        obeyed=read_obedience(read_image_set(own / "asked"), phrase),
        obeyed_below=read_obedience(read_image_set(base / "asked"), phrase),
        rises=rises,
    )


def judge_likeness(
    trained: Path, drawn: Path, plan: TrialPlan, floor: Path | None = None
) -> Scorecard:
    """Score a folder of pictures against the photos that a run was trained with."""
    images = read_image_set(drawn)
    return evaluate_images(
        images,
        read_photo_set(RunFolder(trained).photos),
        floor=read_image_set(floor) if floor else None,
        subject=SubjectWords(plan.config.subject.phrase, plan.config.subject.class_noun),
        options=evaluation_options(plan.config.evaluate),
        encoders=pick_encoders(plan.config.evaluate.encoders, images.base_name, "cpu"),
    )


def read_obedience(images: ImageSet, phrase: str) -> list[float]:
    """Read pictures of `ASKED`; give the share of the asked attributes that each shows."""
    asked = {text.format(subject=phrase): wanted for text, wanted in ASKED}
    pixels = to_tensor([open_upright(path) for path in images.paths()])
    return [
        float(np.mean([seen.get(name) == value for name, value in asked[picture.prompt].items()]))
        for picture, seen in zip(images.pictures, load_attribute_reader().read(pixels), strict=True)
    ]


def trial_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Sum the trial up in rows of the table."""
    return [lift_row(outcomes), obedience_row(outcomes), leakage_row(outcomes)]


def lift_row(outcomes: Sequence[Outcome]) -> Row:
    """How like the subjects the portraits are, from the base model (0) to the photos (1)."""
    # Where floor and ceiling cannot be told apart, nothing was lifted.
    lifts = [outcome.identity.lift or 0.0 for outcome in outcomes]
    return at_least(
        "DreamBooth: median identity lift",
        median(lifts),
        LIFT_GOAL,
        len(lifts),
        note=f"each: {', '.join(f'{lift:.2f}' for lift in lifts)}",
    )


def obedience_row(outcomes: Sequence[Outcome]) -> Row:
    """How much less of what prompts ask for the adapters draw than the base model."""
    own = [share for outcome in outcomes for share in outcome.obeyed]
    below = [share for outcome in outcomes for share in outcome.obeyed_below]
    prompts = len(ASKED)
    each = len(own) // (prompts * len(outcomes))
    # Pictures of one prompt resemble each other, whoever is in them.
    clusters = [place // each % prompts for place in range(len(own))]
    lost = intervals.mean_with_interval(np.array(below) - np.array(own), clusters)
    return at_most(
        "DreamBooth: attributes lost against the base",
        lost.value,
        OBEDIENCE_GOAL,
        lost.n,
        lost.interval,
        note=f"{np.mean(own):.1%} with adapters, {np.mean(below):.1%} without",
    )


def leakage_row(outcomes: Sequence[Outcome]) -> Row:
    """How many times more of the subject leaks into its class without class images than with.

    A rise that cannot be told from none counts as large as its own uncertainty: dividing by it
    as it is would make the ratio as large as chance likes.
    """
    name = "DreamBooth: leakage without class images, of with"
    both = [outcome.rises for outcome in outcomes if outcome.rises]
    rise = {
        how: intervals.mean_with_interval(np.array([x for rises in both for x in rises[how]]))
        for how in (_WITH, _WITHOUT)
    }
    with_prior, without = rise[_WITH], rise[_WITHOUT]
    note = f"rise {without.value:.3f} without, {with_prior.value:.3f} with"
    ends = with_prior.interval
    uncertain = (ends[1] - ends[0]) / 2 if ends else 0.0
    if with_prior.value < uncertain:
        note += f", taken as {uncertain:.3f}"
    below = max(with_prior.value, uncertain)
    if below <= 0:
        return Row(name, None, LEAKAGE_GOAL, False, with_prior.n, None, f"{note}: no ratio")
    return at_least(name, without.value / below, LEAKAGE_GOAL, with_prior.n, note=note)


def _likenesses(card: Scorecard) -> list[float]:
    return [picture.values["identity"] for picture in card.pictures if "identity" in picture.values]


def _prepare(plan: TrialPlan) -> tuple[Model, LoomConfig]:
    model = _load(plan.config.base)
    return model, resolve_defaults(plan.config, model)


@cache
def _load(base: str) -> Model:
    """Load the base model once per process."""
    return load_model(base, pick_runtime("cpu"))


def _photo_folder(work: Path, number: int) -> Path:
    return work / "photos" / str(number)


def _base_folder(work: Path) -> Path:
    return work / "base"


def _run_folder(work: Path, number: int, how: str) -> Path:
    return work / f"subject-{number}" / how

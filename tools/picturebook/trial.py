"""DreamBooth on trial: drawn people whom nothing was trained on are learned by the real stages.

Each of them has six photos. All are trained with the same class images, some of them without any
as well, and what the adapters draw is compared with drawings of the same persons, with what the
prompts ask for, and with what the base model draws from the same prompts and seeds.

The work is cut into jobs for a pool of processes of one thread each: on two cores they finish
nearly twice as early as one process of two threads, because a small model's operations are too
short to be shared between threads. A trial's folder can be gone on with, like any run.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import pick_runtime
from dreamloom.core.events import Observer, Progress, silent
from dreamloom.core.manifests import ClassImageSet, ImageSet, read_class_image_set, read_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.class_images import make_class_images
from dreamloom.data.image_io import open_upright
from dreamloom.data.photos.prepare import load_photos
from dreamloom.inference.generate import ActiveAdapter, Prompt, generate_images
from dreamloom.models.base import Model
from dreamloom.models.families import load_model
from dreamloom.pipeline.session import resolve_defaults
from dreamloom.pipeline.train import open_run
from dreamloom.training.train import train_adapter
from tools.picturebook.trial_judging import (
    WITH,
    WITHOUT,
    Beside,
    Outcome,
    Shown,
    Subject,
    judge_subject,
)
from tools.picturebook.trial_people import choose_people, draw_photos
from tools.picturebook.trial_prompts import (
    ASKED,
    CLASS_ASKED,
    OTHERS,
    PORTRAIT,
    Ask,
    contradicting,
    contradicting_anybody,
)

FRONT_WEIGHTS = (0.4, 0.6, 0.8, 1.0, 1.2)
"""The weights of an adapter from which its front is drawn."""

MOST_SUBJECTS = 24
"""The base model draws what contradicts any of so many, so that a trial can be made larger."""


@dataclass(frozen=True)
class TrialPlan:
    """How much is tried.

    Args:
        config: Settings of each run; portraits are drawn just as ``generate`` says.
        subjects: How many people are trained with class images.
        forgetful: How many of them are trained without class images as well.
        photos: Photos of each.
        asked_each: Pictures of each of the prompts `ASKED`.
        contradicting_each: Pictures of each prompt that contradicts who somebody is.
        class_pictures: Pictures of the class prompt.
        class_asked_each: Pictures of each of the prompts `CLASS_ASKED`.
        others_each: Pictures of each of the prompts `OTHERS`.
        held_out: Drawings of the subject that pictures of one prompt are compared with.
        steps: Denoising steps of all pictures but the portraits.
        front: Weights at which further pictures are drawn, with class images and without; none
            where no front is asked for.
    """

    config: LoomConfig
    subjects: int = 8
    forgetful: int = 2
    photos: int = 6
    asked_each: int = 2
    contradicting_each: int = 4
    class_pictures: int = 16
    class_asked_each: int = 4
    others_each: int = 8
    held_out: int = 24
    steps: int = 25
    front: tuple[float, ...] = ()

    def ways_of(self, number: int) -> list[str]:
        """Say how a subject is taught: with class images, and some of them without as well."""
        return [WITH, WITHOUT] if self.front or number < self.forgetful else [WITH]


def standard_plan(subjects: int = 8, sets: Sequence[str] = (), front: bool = False) -> TrialPlan:
    """The trial that the table of goals asks for.

    Args:
        subjects: How many people are taught.
        sets: Settings of the runs that differ, as ``name=value``.
        front: Whether adapters are tried at several weights.
    """
    config = load_config("standard", sets=sets)
    return TrialPlan(config, subjects, min(2, subjects), front=FRONT_WEIGHTS if front else ())


def quick_plan(subjects: int = 2, sets: Sequence[str] = (), front: bool = False) -> TrialPlan:
    """A trial that shows within a minute that everything runs, and measures nothing."""
    small = {
        "train.steps": 4,
        "priors.count": 4,
        "priors.steps": 4,
        "generate.steps": (4,),
        "generate.images_per_prompt": 3,
    }
    config = load_config("quick", overrides=small, sets=sets)
    few = few_pictures(steps=4, held_out=3)
    return TrialPlan(config, subjects, 1, front=FRONT_WEIGHTS[-2:] if front else (), **few)


def few_pictures(steps: int, held_out: int) -> dict[str, Any]:
    """The numbers of a plan that draws as little as can be judged."""
    counts = {"asked_each": 1, "contradicting_each": 1, "class_pictures": 3}
    return {**counts, "class_asked_each": 1, "others_each": 1, "steps": steps, "held_out": held_out}


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

    def teach(way: tuple[int, str]) -> Future[None]:
        return pool.submit(train_and_draw, work, plan, *way)

    ways = [(number, how) for how in (WITH, WITHOUT) for number in range(plan.subjects)]
    ways = [(number, how) for number, how in ways if how in plan.ways_of(number)]
    # Teaching without class images need not wait for them.
    early = ways[-1:] if ways[-1][1] == WITHOUT else []
    jobs = [pool.submit(draw_class_images, work, plan), *map(teach, early)]
    jobs[0].result()
    # The longest first, so that no process ends long before the others.
    jobs += [teach(way) for way in ways if way not in early]
    jobs += [pool.submit(draw_base, work, plan)]
    for done, job in enumerate(as_completed(jobs), start=1):
        job.result()
        observe(Progress("trial", "teaching and drawing", done, len(jobs)))
    judging = [pool.submit(judge, work, plan, number) for number in range(plan.subjects)]
    return [job.result() for job in judging]


def draw_class_images(work: Path, plan: TrialPlan) -> None:
    """Draw the class images that all subjects share."""
    model, config = _prepare(plan)
    run, side = open_run(_base_folder(work), config), model.advice.resolution_px
    make_class_images(run, model, config.class_prompt(), config.worded_priors(), config.seed, side)


def draw_base(work: Path, plan: TrialPlan) -> None:
    """Draw with the base model whatever any of the adapters draws."""
    model, config = _prepare(plan)
    artist = _Artist(open_run(_base_folder(work), config), model, config, plan)
    for number in range(plan.subjects):
        artist.draw_portraits(_portraits_of(number), number)
    artist.draw_asked(contradicting_anybody(choose_people(MOST_SUBJECTS)))
    artist.draw_class()
    artist.draw_others()


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
    if how == WITH:
        priors = read_class_image_set(RunFolder(_base_folder(work)).priors)
    else:
        none = config.priors.model_copy(update={"kind": "none"})
        config = config.model_copy(update={"priors": none})
    run = open_run(_run_folder(work, number, how), config)
    photos = load_photos(_photo_folder(work, number), run, model.advice.resolution_px)
    train_adapter(run, model, photos, priors, config)
    artist = _Artist(run, model, config, plan)
    asks = contradicting(choose_people(plan.subjects)[number])
    # An adapter that was trained without class images is here for its leakage and its front.
    if how == WITH:
        artist.draw_portraits("portrait", number)
        artist.draw_asked(asks)
        artist.draw_others()
    artist.draw_class()
    for weight in plan.front:
        artist.draw_front(asks, weight, number)


@dataclass(frozen=True)
class _Artist:
    """Draws sets of pictures into a run, with its adapter if it has one."""

    run: RunFolder
    model: Model
    config: LoomConfig
    plan: TrialPlan

    def draw_portraits(self, name: str, number: int, weight: float = 1.0, part: int = 1) -> None:
        """Draw portraits, or one part of so many, from seeds that no other subject's have.

        A seed says much about a picture: of the base model's portraits from the seeds 0 to 7,
        three wear blue. Were the same eight drawn of everybody, all would share that chance.
        """
        generate = self.config.generate
        each = generate.images_per_prompt
        steps = generate.steps if part == 1 else (self.plan.steps,)
        self._draw(name, [PORTRAIT], max(1, each // part), steps, weight, number * each)

    def draw_asked(self, asks: Sequence[Ask]) -> None:
        """Draw what is asked for."""
        plan = self.plan
        self._draw("asked", [ask.text for ask in ASKED], plan.asked_each)
        self._draw("contradicting", [ask.text for ask in asks], plan.contradicting_each)

    def draw_class(self) -> None:
        """Draw the class, into which the subject may leak."""
        self._draw("class", [self.config.class_prompt()], self.plan.class_pictures)

    def draw_others(self) -> None:
        """Draw what else the adapter should leave alone: the class as asked, and other classes."""
        self._draw("class-asked", CLASS_ASKED, self.plan.class_asked_each)
        self._draw("others", [*OTHERS.values()], self.plan.others_each)

    def draw_front(self, asks: Sequence[Ask], weight: float, number: int) -> None:
        """Draw half as many pictures as else, at another weight of the adapter."""
        plan, draw = self.plan, partial(self._draw, weight=weight)
        self.draw_portraits(_front_set("portrait", weight), number, weight, part=2)
        half = max(1, plan.asked_each // 2)
        draw(_front_set("asked", weight), [ask.text for ask in ASKED], half)
        half = max(1, plan.contradicting_each // 2)
        draw(_front_set("contradicting", weight), [ask.text for ask in asks], half)

    def _draw(
        self,
        name: str,
        texts: Sequence[str],
        each: int,
        steps: tuple[int, ...] = (),
        weight: float = 1.0,
        first_seed: int = 0,
    ) -> None:
        subject = self.config.subject
        words = {"subject": subject.phrase, "class_noun": subject.class_noun}
        settings = self.config.generate.model_copy(
            update={
                "images_per_prompt": each,
                "first_seed": first_seed,
                "steps": steps or (self.plan.steps,),
            }
        )
        adapter = self.run.adapter
        active = [ActiveAdapter(adapter, weight)] if adapter.is_file() else []
        prompts = [Prompt(text.format(**words)) for text in texts]
        generate_images(self.run, self.model, prompts, settings, active, name)


def judge(work: Path, plan: TrialPlan, number: int) -> Outcome:
    """Judge what a subject's adapters drew; weight 0 of each front is the base model."""
    files = sorted(_photo_folder(work, number).glob("*.png"))
    subject = Subject(
        choose_people(plan.subjects)[number],
        plan.config.subject.phrase,
        [open_upright(file) for file in files],
        plan.held_out,
    )
    base = _base_folder(work)
    below = Shown(*(_read(base, name) for name in (_portraits_of(number), *Shown.NAMES[1:])))
    runs = {how: _run_folder(work, number, how) for how in plan.ways_of(number)}
    front = {
        how: {weight: _read_shown(run, weight) for weight in plan.front}
        | {0.0: _read_shown(runs[WITH], plan.front[0]).of_base(below)}
        for how, run in runs.items()
        if plan.front
    }
    return judge_subject(
        subject,
        (_read_shown(runs[WITH]), _read_beside(runs[WITH])),
        (below, _read_beside(base)),
        _read(runs[WITHOUT], "class") if WITHOUT in runs else None,
        front,
    )


def _read(run: Path, name: str) -> ImageSet:
    return read_image_set(run / "images" / name)


def _read_shown(run: Path, weight: float | None = None) -> Shown:
    names = [name if weight is None else _front_set(name, weight) for name in Shown.NAMES]
    return Shown(*(_read(run, name) for name in names))


def _read_beside(run: Path) -> Beside:
    return Beside(*(_read(run, name) for name in Beside.NAMES))


def _portraits_of(number: int) -> str:
    return f"portrait-{number}"


def _front_set(name: str, weight: float) -> str:
    return f"{name}-{round(100 * weight)}"


def _prepare(plan: TrialPlan) -> tuple[Model, LoomConfig]:
    model = load_base(plan.config.base)
    return model, resolve_defaults(plan.config, model)


@cache
def load_base(base: str) -> Model:
    """Load a base model once per process."""
    return load_model(base, pick_runtime("cpu"))


def _photo_folder(work: Path, number: int) -> Path:
    return work / "photos" / str(number)


def _base_folder(work: Path) -> Path:
    return work / "base"


def _run_folder(work: Path, number: int, how: str) -> Path:
    return work / f"subject-{number}" / how

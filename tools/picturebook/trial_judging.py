"""Judging what the adapters on trial drew: all that is measured of one subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from PIL import Image

from dreamloom.core.manifests import ImageSet
from dreamloom.picturebook.world import Identity
from tools.picturebook.obedience_front import FrontPoint
from tools.picturebook.trial_appearance import Appearance, judge_appearance, mean_of_pairs
from tools.picturebook.trial_measures import (
    ClassChange,
    Obedience,
    OthersChange,
    embed,
    judge_class,
    judge_obedience,
    judge_others,
    lift,
    mean_likeness,
    measure_lift,
    open_all,
    pair_up,
    read_obedience,
)
from tools.picturebook.trial_people import describe, draw_held_out
from tools.picturebook.trial_prompts import ASKED, OTHERS, PLAIN, Ask, contradicting

WITH, WITHOUT = "with_prior", "without_prior"
"""How a subject was taught: with class images, and without any."""


@dataclass(frozen=True)
class Shown:
    """What shows the subject: portraits, what is asked for, and what contradicts the subject."""

    NAMES: ClassVar = ("portrait", "asked", "contradicting")

    portrait: ImageSet
    asked: ImageSet
    contradicting: ImageSet

    def of_base(self, base: Shown) -> Shown:
        """Select the base model's partners."""
        names = [field.name for field in fields(self)]
        return Shown(*(pair_up(getattr(self, name), getattr(base, name)) for name in names))


@dataclass(frozen=True)
class Beside:
    """What should stay as it was: the class, the class as asked, and other classes."""

    NAMES: ClassVar = ("class", "class-asked", "others")

    plain_class: ImageSet
    class_asked: ImageSet
    others: ImageSet


@dataclass(frozen=True)
class Subject:
    """Who is judged.

    Args:
        person: Who it is.
        phrase: How prompts name the subject.
        photos: What was taught.
        held_out: How many drawings the pictures of one prompt are compared with.
    """

    person: Identity
    phrase: str
    photos: Sequence[Image.Image]
    held_out: int

    @cached_property
    def asks(self) -> list[Ask]:
        """What contradicts who it is."""
        return contradicting(self.person)

    @cached_property
    def drawings(self) -> dict[str, Float[np.ndarray, "_ d"]]:
        """For each prompt, vectors of drawings that obey it and keep everything else."""
        return {self.word(ask): embed(self.draw(ask)) for ask in (PLAIN, *ASKED, *self.asks)}

    def draw(self, ask: Ask) -> list[Image.Image]:
        """Draw the subject as a prompt asks, in other moments than the photos'."""
        return draw_held_out(self.person, self.held_out, ask.shown, ask.changed)

    def word(self, ask: Ask) -> str:
        """Write an ask's prompt."""
        return ask.text.format(subject=self.phrase)


@dataclass(frozen=True)
class Outcome:
    """What came of one subject.

    Args:
        looks: Who it is, in a few words.
        lift: The portraits' likeness to held-out drawings, from the base model's (0) to that of
            such drawings (1).
        lift_on_photos: The same for the taught photos.
        asked: Obedience to prompts that contradict nothing.
        contradicting: Obedience to the contradicting attribute of those that do.
        left_out: For each picture of the latter, whether no class prompt asks for that.
        kept: The likeness of the latter to drawings in which nothing else is changed, as ``lift``.
        appearance: How the pictures look.
        of_class: What happened to the class.
        others: What happened to other classes.
        rises: How much more like the subject than the base model's each picture of the class
            prompt is, by how the subject was taught; none where it was taught in one way only.
        front: Obedience and identity at several weights, by how the subject was taught.
    """

    looks: str
    lift: float
    lift_on_photos: float
    asked: Obedience
    contradicting: Obedience
    left_out: list[bool]
    kept: float
    appearance: Appearance
    of_class: ClassChange
    others: OthersChange
    rises: dict[str, list[float]]
    front: dict[str, list[FrontPoint]]


def judge_subject(
    subject: Subject,
    own: tuple[Shown, Beside],
    base: tuple[Shown, Beside],
    forgetful: ImageSet | None,
    front: Mapping[str, Mapping[float, Shown]],
) -> Outcome:
    """Compare what a subject's adapters drew with drawings, prompts and the base model.

    Args:
        subject: Who was taught.
        own: What the adapter drew that was taught with class images.
        base: What the base model drew, of further prompts and seeds too.
        forgetful: The class, by an adapter that was taught without class images.
        front: What the adapters draw, by how they were taught and by weight.
    """
    (shown, beside), below = own, own[0].of_base(base[0])
    asked = {subject.word(ask): ask.wanted for ask in ASKED}
    odd = {subject.word(ask): ask for ask in subject.asks}
    against = {text: {ask.contradicts: ask.wanted[ask.contradicts]} for text, ask in odd.items()}
    return Outcome(
        looks=describe(subject.person),
        lift=measure_lift([shown.portrait], [below.portrait], subject.drawings),
        lift_on_photos=lift_on_photos(subject.photos, shown.portrait, below.portrait),
        asked=judge_obedience(shown.asked, below.asked, asked),
        contradicting=judge_obedience(shown.contradicting, below.contradicting, against),
        left_out=[odd[picture.prompt].left_out for picture in shown.contradicting.pictures],
        kept=measure_lift([shown.contradicting], [below.contradicting], subject.drawings),
        appearance=judge_appearance(
            subject.person,
            open_all(shown.portrait),
            open_all(shown.asked, shown.contradicting),
            subject.draw(PLAIN),
        ),
        of_class=judge_class(
            (beside.plain_class, beside.class_asked),
            (base[1].plain_class, base[1].class_asked),
        ),
        others=judge_others(
            beside.others, base[1].others, {text: kind for kind, text in OTHERS.items()}
        ),
        rises=measure_rises(subject.photos, beside.plain_class, base[1].plain_class, forgetful),
        front={
            how: [judge_weight(subject, base[0], weight, one) for weight, one in sets.items()]
            for how, sets in front.items()
        },
    )


def lift_on_photos(photos: Sequence[Image.Image], own: ImageSet, base: ImageSet) -> float:
    """Place portraits between the base model's (0) and the taught photos themselves (1)."""
    taught = embed(photos)
    value, floor = (
        float(mean_likeness(embed(open_all(images)), taught).mean()) for images in (own, base)
    )
    return lift(value, floor, mean_of_pairs(taught))


def measure_rises(
    photos: Sequence[Image.Image], own: ImageSet, base: ImageSet, forgetful: ImageSet | None
) -> dict[str, list[float]]:
    """Measure how much more like the subject the class has become, by how that was taught."""
    if forgetful is None:
        return {}
    taught = embed(photos)
    below = mean_likeness(embed(open_all(base)), taught)
    return {
        how: (mean_likeness(embed(open_all(images)), taught) - below).tolist()
        for how, images in ((WITH, own), (WITHOUT, forgetful))
    }


def judge_weight(subject: Subject, base: Shown, weight: float, own: Shown) -> FrontPoint:
    """Measure obedience and identity of what an adapter draws at one weight.

    Args:
        subject: Who was taught.
        base: The base model's pictures, the partners among them.
        weight: The adapter's weight.
        own: What it draws.
    """
    below = own.of_base(base)
    wanted = {subject.word(ask): ask.wanted for ask in (*ASKED, *subject.asks)}
    shares = [
        share
        for images in (own.asked, own.contradicting)
        for share in read_obedience(images, wanted)
    ]
    identity = measure_lift(
        [own.portrait, own.asked], [below.portrait, below.asked], subject.drawings
    )
    return FrontPoint(weight, identity, float(np.mean(shares)))

"""The scores: what each asks, which encoder answers, and what a picture is for by its prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

PictureRole: TypeAlias = Literal["subject", "altered", "class", "other"]
"""What a picture's prompt names: the subject, the subject with other looks than its own, its class
without the subject, or neither."""

_LOOKS = {"age", "eyes", "hair", "skin"}

MeasureKind: TypeAlias = Literal[
    "subject", "nearest", "verified", "rank_1", "prompt", "retrieval", "variety", "copy", "drift"
]
"""How a score is computed from features; `metrics.per_image` has one function for each."""

PIXELS = "pixels"
"""Stands where an encoder's name would, for scores that look at the pixels themselves."""


@dataclass(frozen=True)
class Measure:
    """One score.

    Args:
        name: Its name in records.
        encoder: Which encoder's features it reads, or `PIXELS`.
        kind: How it is computed.
        label: Its name as a reader meets it.
        meaning: What it looks at, in a few words.
        better: Whether more of it is to be wished for.
        roles: Which pictures it looks at.
        drawn_encoder: The encoder in picturebook's world, where it has another one for this; empty
            for the same.
    """

    name: str
    encoder: str
    kind: MeasureKind
    label: str
    meaning: str
    better: Literal["higher", "lower", "neither"] = "higher"
    roles: tuple[PictureRole, ...] = ("subject",)
    drawn_encoder: str = ""

    @property
    def is_share(self) -> bool:
        """Whether it counts pictures: each of them has 0 or 1."""
        return self.kind in {"verified", "rank_1", "retrieval"}

    @property
    def needs_credit(self) -> bool:
        """Whether a copy of a photo, or a picture that shows nobody, could gain by it."""
        return self.kind in {"subject", "verified", "rank_1"} and self.roles == ("subject",)


# The subject, whatever it is asked to look like.
_ANY: tuple[PictureRole, ...] = ("subject", "altered")

MEASURES = (
    Measure(
        *("identity", "identity", "subject", "Identity"),
        "how much the subject is the one in the photos",
    ),
    Measure(
        *("verified", "identity", "verified", "Verified"),
        "how many pictures would pass for the subject",
    ),
    Measure(
        *("rank_1", "identity", "rank_1", "Rank 1"),
        "in how many the subject is nearer than all of the base model’s persons",
    ),
    Measure("clip_i", "clip", "subject", "CLIP-I", "how alike whole pictures and photos are"),
    Measure("dino", "dino", "subject", "DINO", "how alike pictures and photos are in detail"),
    Measure("dinov2", "dinov2", "subject", "DINOv2", "the same, by a later encoder"),
    Measure(
        *("clip_t", "clip", "prompt", "CLIP-T"),
        "how well pictures fit their prompts",
        "higher",
        _ANY,
    ),
    Measure(
        *("prompt_found", "clip", "retrieval", "Prompt found"),
        "for how many no other prompt of the set fits better",
        "higher",
        _ANY,
    ),
    Measure(
        *("variety", "clip", "variety", "Variety"),
        "how much pictures of one prompt differ; more is not always better",
        "neither",
        _ANY,
    ),
    Measure(
        *("diversity", "perceptual", "variety", "Diversity (LPIPS)"),
        "how much they differ to the eye; more is not always better",
        "neither",
        _ANY,
    ),
    Measure(
        *("copy", PIXELS, "copy", "Copy"),
        "how closely pictures repeat a photo; less is better",
        "lower",
        _ANY,
    ),
    Measure(
        *("copy_sscd", "copies", "nearest", "Copy (SSCD)"),
        "the same, by an encoder that knows repainted and cut copies; less is better",
        "lower",
        _ANY,
    ),
    Measure(
        *("leakage", "identity", "subject", "Leakage"),
        "how much the class without the subject looks like it; less is better",
        "lower",
        ("class",),
    ),
    Measure(
        *("pres", "dino", "subject", "PRES"),
        "the same, by DINO; less is better",
        "lower",
        ("class",),
    ),
    Measure(
        *("drift", "dinov2", "drift", "Drift"),
        "how far pictures beside the subject have moved; less is better",
        "lower",
        ("class", "other"),
        "clip",
    ),
)
"""Every score, in the order in which they are shown."""

MEASURE = {measure.name: measure for measure in MEASURES}

LABELS = {
    **{measure.name: measure.label for measure in MEASURES},
    "copy_paste": "Copy-paste",
    "identity_retention": "Subject kept",
    "style_retention": "Style kept",
}
"""Names of scores as a reader meets them, in the order in which they are shown."""

MEANINGS = {
    **{measure.name: measure.meaning for measure in MEASURES},
    "copy_paste": "how much nearer pictures are to taught photos than to held-out ones; its "
    "ceiling is what the photos alone can make of it; less is better",
    "identity_retention": "how much of the subject a merge has kept",
    "style_retention": "how much of the style a merge has kept",
}
"""What each of them looks at, in a few words."""


def label_of(name: str) -> str:
    """The name of a score as a reader meets it."""
    return LABELS.get(name, name.replace("_", " ").capitalize())


class SubjectWords(NamedTuple):
    """What the subject is called."""

    phrase: str
    """As prompts name it, such as ``rraj person``."""
    class_noun: str
    """What it is one of, such as ``person``."""


def names(prompt: str, words: str) -> bool:
    """Say whether a prompt holds these words, whole and in this order.

    Example:
        >>> names("a photo of Rraj person", "rraj person"), names("personality", "person")
        (True, False)
    """
    return bool(words) and bool(
        re.search(rf"(?<!\w){re.escape(words)}(?!\w)", prompt, flags=re.IGNORECASE)
    )


def asks_for_other_looks(category: str, may_change: Sequence[str] | None) -> bool:
    """Say whether a prompt asks for looks that are not the subject's own, such as blonde hair.

    Whoever obeys it is less like the photos, so its pictures count for obedience and not for
    likeness. What style or scene may change beside (``may_change`` of a painting) is no such wish.
    """
    return category == "attribute" and bool(_LOOKS & set(may_change or ()))


def assign_roles(
    prompts: Sequence[str], categories: Sequence[str], phrase: str, class_noun: str
) -> list[PictureRole]:
    """Say of each picture what its prompt names.

    Pictures of the class keep watch over what the subject has done to its class; pictures of
    neither, over everything else. Where no prompt names the subject, as in a folder without a
    manifest, every picture counts as one of the subject.

    Args:
        prompts: As they were drawn.
        categories: Of their packs: a prompt such as "an old man" is told to be of the class by
            its category ``class``, though it has not the noun.
        phrase: The subject, such as ``rraj person``.
        class_noun: Its class, such as ``person``.
    """
    if not any(names(prompt, phrase) for prompt in prompts):
        return ["subject"] * len(prompts)
    roles: list[PictureRole] = []
    for prompt, category in zip(prompts, categories, strict=True):
        if names(prompt, phrase):
            roles.append("subject")
        elif category == "class" or names(prompt, class_noun):
            roles.append("class")
        else:
            roles.append("other")
    return roles

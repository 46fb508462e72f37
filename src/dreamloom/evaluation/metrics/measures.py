"""The list of scores: what each asks, which encoder answers, and of which pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

PictureRole: TypeAlias = Literal["subject", "class", "other"]
"""What a picture's prompt names: the subject, its class without the subject, or neither."""

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
        question: What it answers, for pages and help.
        better: Whether more of it is to be wished for.
        roles: Which pictures it looks at.
        drawn_encoder: The encoder in picturebook's world, where it has another one for this; empty
            for the same.
    """

    name: str
    encoder: str
    kind: MeasureKind
    question: str
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


_APART: tuple[PictureRole, ...] = ("class", "other")

MEASURES = (
    Measure("identity", "identity", "subject", "Is it the same subject?"),
    Measure("verified", "identity", "verified", "Would it pass for the subject?"),
    Measure("rank_1", "identity", "rank_1", "Is the subject nearer than anybody else?"),
    Measure("clip_i", "clip", "subject", "Do the pictures look like the photos?"),
    Measure("dino", "dino", "subject", "Do the pictures resemble the photos in detail?"),
    Measure("dinov2", "dinov2", "subject", "Do they, for a second pair of eyes?"),
    Measure("clip_t", "clip", "prompt", "Do the pictures show what their prompts say?"),
    Measure("prompt_found", "clip", "retrieval", "Is its own prompt the one that fits best?"),
    Measure("variety", "clip", "variety", "Do pictures of one prompt differ?", "neither"),
    Measure("diversity", "perceptual", "variety", "Do they differ to the eye?", "neither"),
    Measure("copy", PIXELS, "copy", "Do the pictures repeat a photo?", "lower"),
    Measure("copy_sscd", "copies", "nearest", "Do they, repainted or cut?", "lower"),
    Measure(
        "leakage", "identity", "subject", "Has the class become the subject?", "lower", ("class",)
    ),
    Measure("pres", "dino", "subject", "Does the class resemble the photos?", "lower", ("class",)),
    Measure(
        "drift",
        "dinov2",
        "drift",
        "What did the adapter change that it should not?",
        "lower",
        _APART,
        "clip",
    ),
)
"""Every score, in the order in which they are shown."""

MEASURE = {measure.name: measure for measure in MEASURES}

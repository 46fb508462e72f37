"""What an evaluation says: scores with n, interval, floor and ceiling, and signs of mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_serializer


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

    def cells(self, absent: str = "") -> list[str]:
        """Write value, n, interval, floor, ceiling and lift as cells of a table."""
        if self.value is None:
            return ["not measured", *5 * [absent]]
        numbers = (self.value, self.floor, self.ceiling, self.lift)
        value, floor, ceiling, lift = ("–" if one is None else f"{one:.3f}" for one in numbers)
        between = "–" if self.interval is None else "{:.3f} to {:.3f}".format(*self.interval)
        return [value, str(self.n), between, floor, ceiling, lift]

    @property
    def reason(self) -> str:
        """Why there is no value, as a clause to stand behind "not measured:"."""
        return self.note.removeprefix("not measured: ")

    @property
    def measured(self) -> bool:
        """Whether there is a value at all."""
        return self.value is not None


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
    role: str = "subject"
    """What its prompt names: the subject, its class, or something other."""
    seed: int | None
    scheduler: str | None
    steps: int | None
    nearest_photo: str | None = None
    """The photo that it repeats most closely, as far as any."""
    copied: bool = False
    """Whether it repeats that photo, and so earns no credit for likeness."""
    values: dict[str, float] = {}
    """By score; one that was not measured for this picture is absent."""
    floor: dict[str, float] = {}
    """The same of the base model's picture of this prompt, seed, scheduler and steps, where it was
    seen; cards of before have none."""

    @model_serializer(mode="wrap")
    def _leave_plain(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # Without a floor it is written, and so fingerprinted, as before floors were kept.
        written = write(self)
        if not self.floor:
            written.pop("floor", None)
        return written


class Flags(_Listed):
    """What one detector of failures found."""

    label: str
    n: int
    """How many pictures there were."""
    judged: int
    """How many of them it could judge; the others are neither good nor bad."""
    abstained: dict[str, int]
    """How many it could not judge, by reason."""
    flagged: tuple[str, ...]
    """The files that it flagged."""
    rate: float | None
    interval: tuple[float, float] | None
    told: str
    """All of it in one line, with how often the detector itself is wrong."""


class Scorecard(_Listed):
    """What was measured, and what speaks against believing it."""

    warning: str | None = None
    """Why the scores as a whole mean less than they seem to."""
    alarms: tuple[str, ...] = ()
    """Signs of a mistake, each in a sentence."""
    findings: tuple[str, ...] = ()
    """What the adapter did beside what it should, each in a sentence."""
    notes: tuple[str, ...] = ()
    scores: dict[str, Score]
    floors: dict[str, Score] = {}
    ceilings: dict[str, Score] = {}
    flags: dict[str, Flags] = {}
    """What detectors of failures found, by detector; empty where they were not asked."""
    by_category: tuple[Group, ...] = ()
    by_prompt: tuple[Group, ...] = ()
    by_cell: tuple[Group, ...] = ()
    """One group for each scheduler and number of steps."""
    encoders: str
    photos: int
    confidence: float
    resamples: int
    pictures: tuple[PictureScores, ...]
    copy_paste: Score | None = None
    """How much nearer pictures are to taught photos than to held-out ones; the ceiling is what the
    photos themselves make of it. Cards of before have none."""

    @property
    def all_scores(self) -> dict[str, Score]:
        """The scores by name, with that of the held-out photos."""
        return self.scores | ({} if self.copy_paste is None else {"copy_paste": self.copy_paste})

    @model_serializer(mode="wrap")
    def _leave_plain(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # A card of before is written, and so fingerprinted, as it was.
        written = write(self)
        if self.copy_paste is None:
            written.pop("copy_paste", None)
        return written

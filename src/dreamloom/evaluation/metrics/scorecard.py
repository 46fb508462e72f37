"""What an evaluation says: scores with n, interval, floor and ceiling, and signs of mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from dreamloom.evaluation.metrics.measures import MEASURE


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


def find_alarms(
    *,
    scores: Mapping[str, Score],
    ceilings: Mapping[str, Score],
    pictures: Sequence[PictureScores],
    prints: Sequence[str],
    copied: Sequence[bool],
    flat: Sequence[bool],
    missed: Sequence[bool],
    floor_prints: Sequence[str | None],
) -> list[str]:
    """Look for signs that a mistake was measured instead of the pictures.

    Args:
        scores: The overall scores by name.
        ceilings: The photos' own scores by name, with their intervals.
        pictures: Every picture's own values.
        prints: A hash of each picture's pixels.
        copied: Whether each picture repeats a photo.
        flat: Whether each picture is one plain colour.
        missed: Whether nobody was found in each picture, though somebody was asked for.
        floor_prints: A hash of the pixels of each picture's floor; None where it has none.

    Returns:
        One sentence per sign.
    """
    files = [picture.file for picture in pictures]
    first: dict[str, str] = {}
    originals = [first.setdefault(shown, file) for shown, file in zip(prints, files, strict=True)]
    twice = [file for file, original in zip(files, originals, strict=True) if file != original]
    unchanged = [
        file for file, own, floor in zip(files, prints, floor_prints, strict=True) if own == floor
    ]
    found = [
        text.format(count=len(which), first=which[0])
        for which, text in (
            (
                [file for file, is_copy in zip(files, copied, strict=True) if is_copy],
                "{count} pictures repeat photos of the subject, first {first}: they prove "
                "nothing, and count as what the base model drew.",
            ),
            (
                [file for file, is_flat in zip(files, flat, strict=True) if is_flat],
                "{count} pictures are one plain colour, first {first}: a failed drawing or a "
                "safety filter; they are scored like the others.",
            ),
            (
                [file for file, nobody in zip(files, missed, strict=True) if nobody],
                "{count} pictures show no face, first {first}; they count as what the base "
                "model drew.",
            ),
            (
                twice,
                "{count} pictures are copies of others, first {first}: the seed had no effect.",
            ),
            (
                unchanged,
                "{count} pictures are the base model's own, first {first}: the adapter had no "
                "effect.",
            ),
        )
        if which
    ]
    for name, score in scores.items():
        # That every picture passes, or none, is a result.
        if name in MEASURE and MEASURE[name].is_share:
            continue
        values = [picture.values.get(name) for picture in pictures]
        embeddings = {round(value, 6) for value in values if value is not None}
        if (
            len(embeddings) == 1
            and len([v for v in values if v is not None]) > 2
            and len(first) > 1
        ):
            found.append(
                f"{name} is {embeddings.pop():.6f} for every picture: it does not depend on them."
            )
        top = ceilings.get(name)
        if score.value is None or top is None or top.value is None:
            continue
        end = top.interval[1] if top.interval else top.value
        if score.value > end:
            found.append(
                f"{name} is {score.value:.3f}, above the ceiling of {end:.3f} that the photos "
                f"reach among themselves: copies of photos, or a mistake."
            )
    return found

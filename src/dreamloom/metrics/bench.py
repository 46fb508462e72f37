"""Where pictures are scored: what the encoders saw, and the scores of any part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom import statistics
from dreamloom.features import Encoders, Missing
from dreamloom.metrics.scorecard import Score
from dreamloom.metrics.similarity import (
    MEASURES,
    Measure,
    cosines,
    differences,
    prompt_fidelity,
    subject_fidelity,
)
from dreamloom.pictures import Picture
from dreamloom.pixels import crop_centre, open_upright
from dreamloom.statistics import Draws, Interval, Sampled

_FLAT = 2  # of 255 grey levels: what is left of a black picture after JPEG
_Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Seen:
    """What the encoders saw in some pictures.

    Args:
        features: One row per picture, by encoder.
        prints: A hash of each picture's pixels: equal ones are copies, whatever their files.
        flat: Whether each picture is one plain colour.
        familiar: Whether each picture lies in the world that the encoders know.
        broken: Encoders that gave no usable numbers, with how many pictures.
    """

    features: dict[str, Float[Tensor, "images features"]]
    prints: list[str]
    flat: list[bool]
    familiar: list[bool]
    broken: dict[str, int]


def look_at(
    paths: Sequence[Path],
    encoders: Encoders,
    on_pictures: Callable[[int], None] = lambda done: None,
    batch: int = 16,
) -> Seen:
    """Show pictures to every encoder that is there: upright, and their largest centred square.

    Args:
        paths: The pictures' files.
        encoders: The encoders; missing ones are left out.
        on_pictures: Told how many pictures have been seen.
        batch: Pictures looked at together; changes memory and speed, never the features.

    Raises:
        PhotoError: If a picture cannot be read.
    """
    present = {
        name: encoder
        for name, encoder in encoders.named().items()
        if not isinstance(encoder, Missing)
    }
    rows: dict[str, list[Tensor]] = {name: [] for name in present}
    prints, flat, familiar = [], [], []
    for start in range(0, len(paths), batch):
        squares = []
        for path in paths[start : start + batch]:
            image = open_upright(path)
            prints.append(hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest())
            grey_levels = np.ptp(np.asarray(image).reshape(-1, 3), axis=0)
            flat.append(bool((grey_levels <= _FLAT).all()))
            squares.append(crop_centre(image))
        for name, encoder in present.items():
            rows[name].append(encoder.embed(squares))
        familiar += encoders.familiar(squares) if encoders.familiar else [True] * len(squares)
        on_pictures(len(prints))
    features = {name: torch.cat(found) for name, found in rows.items() if found}
    unusable = {
        name: int((~torch.isfinite(found).all(dim=1) | (found.norm(dim=1) == 0)).sum())
        for name, found in features.items()
    }
    broken = {name: count for name, count in unusable.items() if count}
    return Seen(features, prints, flat, familiar, broken)


@dataclass
class Bench:
    """Everything seen in one evaluation, and the scores of any part of it.

    Args:
        pictures: The pictures, in the order in which they were looked at.
        prompts: For each picture, the text it is compared with; empty where it is unknown.
        partners: For each picture, the place of its floor among the floor's pictures, or None.
        seen: What the encoders saw in the pictures.
        photos: What they saw in the photos.
        below: What they saw in the floor's pictures; None without a floor.
        encoders: The encoders.
        resamples: Bootstrap resamples behind each interval.
        confidence: Coverage of the intervals.
    """

    pictures: Sequence[Picture]
    prompts: Sequence[str]
    partners: Sequence[int | None]
    seen: Seen
    photos: Seen
    below: Seen | None
    encoders: Encoders
    resamples: int
    confidence: float
    _draws: dict[tuple[int, ...], Draws] = field(default_factory=dict)

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
            return subject_fidelity(generated=features, photos=photos).numpy()
        if measure.kind == "variety":
            return differences(features).numpy()
        if seen is self.seen:
            rows = self.texts
        else:
            places = {place: row for row, place in enumerate(self.partners) if place is not None}
            # A picture of the floor without a partner is never read; any text will do.
            rows = self.texts[[places.get(place, 0) for place in range(len(features))]]
        return prompt_fidelity(generated=features, prompts=rows).numpy()

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
                lift = self._lift(both, beneath, self._ceiling(measure, draws_below), draws_below)
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
        noises = [(self.prompts[row], self.pictures[row].seed) for row in rows]
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
                resamples=self.resamples,
                confidence=self.confidence,
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
        cells = [
            (self.prompts[row], self.pictures[row].scheduler, self.pictures[row].steps)
            for row in rows
        ]
        cell_of = np.array([cells.index(cell) for cell in cells])
        together = (cell_of[:, None] == cell_of).astype(float)
        pairs = values[np.ix_(places, places)] * together
        return statistics.sample_pairs(
            member @ pairs @ member.T, member @ together @ member.T, draws
        )

    @cached_property
    def photo_pairs(self) -> dict[str, _Values]:
        """Compare each photo with each, by measure."""
        return {
            measure.name: cosines(features, features).numpy()
            for measure in MEASURES
            if measure.kind == "subject" and not self.missing(measure)
            for features in [self.photos.features[measure.encoder]]
        }

    def _ceiling(self, measure: Measure, draws: Draws) -> Sampled | None:
        pairs = self.photo_pairs.get(measure.name)
        if pairs is None or len(pairs) < 2:
            return None
        return statistics.sample_photo_pairs(pairs, draws)

    def _lift(
        self, score: Sampled, floor: Sampled, ceiling: Sampled | None, draws: Draws
    ) -> statistics.Lift:
        if ceiling is None or len(self.photos.prints) < 3:
            return statistics.Lift(None, reason="it needs three photos or more")
        return statistics.lift(score, floor, ceiling, draws.independent, self.confidence)

    def _interval(self, measure: Measure, sampled: Sampled, draws: Draws) -> Interval | None:
        if measure.kind == "variety" and len(draws.clusters) < 3:
            return None  # one pair has no spread
        return statistics.interval(sampled, draws.independent, draws.confidence)

    def floors(self) -> dict[str, Score]:
        """Score the floor's pictures that have a partner."""
        paired = [row for row, place in enumerate(self.partners) if place is not None]
        places = [place for place in self.partners if place is not None]
        found = {}
        for measure in MEASURES:
            own_below = self.values.get(measure.name)
            if own_below is None or own_below[1] is None or not paired:
                continue
            draws = self._draw(paired)
            sampled = self._sample(measure, own_below[1], places, paired, draws)
            if not np.isnan(sampled.value):
                ends = self._interval(measure, sampled, draws)
                key = self.encoders.keys()[measure.encoder]
                found[measure.name] = Score(
                    value=sampled.value, n=len(paired), interval=ends, key=key
                )
        return found

    def ceilings(self) -> dict[str, Score]:
        """Score the photos among themselves."""
        found, photos = {}, len(self.photos.prints)
        draws = self._draw(range(len(self.prompts)))
        for measure in MEASURES:
            sampled = self._ceiling(measure, draws)
            if sampled:
                # Two photos are one pair, and one pair has no spread.
                ends = statistics.interval(sampled, photos if photos > 2 else 1, draws.confidence)
                key = self.encoders.keys()[measure.encoder]
                found[measure.name] = Score(value=sampled.value, n=photos, interval=ends, key=key)
        return found

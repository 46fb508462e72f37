"""Where pictures are scored: what the encoders saw, and the scores of any part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from dreamloom.core.manifests import Picture
from dreamloom.evaluation import copy_detection as copies
from dreamloom.evaluation.encoders.base import Encoders, Missing
from dreamloom.evaluation.metrics.embed import Embeddings
from dreamloom.evaluation.metrics.measures import PIXELS, Measure, PictureRole, measures_of
from dreamloom.evaluation.metrics.per_image import (
    Array,
    NotMeasured,
    PerImageValues,
    Subjects,
    value_pictures,
)
from dreamloom.evaluation.metrics.perceptual import measure_distances
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.stats import intervals as statistics
from dreamloom.evaluation.stats.intervals import Draws, Interval, Sampled

_ABSENT = {
    "subject": "no picture shows the subject",
    "class": "no picture shows the class without the subject; draw the pack class-v1 as well",
    "other": "no picture shows something else; draw the pack unrelated-v1 as well",
}


@dataclass
class Evaluator:
    """Everything seen in one evaluation, and the scores of any part of it.

    Args:
        pictures: The pictures, in the order in which they were looked at.
        prompts: For each picture, the text it is compared with; empty where it is unknown.
        roles: What each picture's prompt names.
        partners: For each picture, the place of its floor among the floor's pictures, or None.
        embeddings: What the encoders saw in the pictures.
        photos: What they saw in the photos.
        nearness: How closely each picture repeats each photo.
        copied: Whether each picture repeats a photo.
        below: What they saw in the floor's pictures; None without a floor.
        below_prompts: For each of the floor's pictures, the text it is compared with.
        below_roles: What each of the floor's prompts names; strangers, which stand behind the
            floor's own pictures, count as the class.
        below_units: The noise, or the stranger, behind each of them.
        encoders: The encoders.
        resamples: Bootstrap resamples behind each interval.
        confidence: Coverage of the intervals.
    """

    pictures: Sequence[Picture]
    prompts: Sequence[str]
    roles: Sequence[PictureRole]
    partners: Sequence[int | None]
    embeddings: Embeddings
    photos: Embeddings
    nearness: Float[Tensor, "images photos"]
    copied: Bool[np.ndarray, " images"]
    below: Embeddings | None
    below_prompts: Sequence[str]
    below_roles: Sequence[PictureRole]
    below_units: Sequence[str]
    encoders: Encoders
    resamples: int
    confidence: float
    _draws: dict[tuple[int, tuple[int, ...]], Draws] = field(default_factory=dict)

    @cached_property
    def measures(self) -> list[Measure]:
        """The scores that there are with these encoders, measurable or not."""
        present = {
            name
            for name, encoder in self.encoders.named().items()
            if not isinstance(encoder, Missing)
        }
        return measures_of(self.encoders.kind, present)

    def key(self, measure: Measure) -> str | None:
        """Name the encoder behind a score; None where it is missing."""
        name = self._encoder(measure)
        if name == PIXELS:
            return copies.KEY
        found = self.encoders.perceptual if name == "perceptual" else self.encoders.named()[name]
        return None if isinstance(found, Missing) else found.key

    @cached_property
    def values(self) -> dict[str, PerImageValues | str]:
        """Each score's values for single pictures, or why there are none."""
        return {measure.name: self._value(measure) for measure in self.measures}

    def _value(self, measure: Measure) -> PerImageValues | str:
        name = self._encoder(measure)
        if name == "perceptual":
            if isinstance(self.encoders.perceptual, Missing):
                return self.encoders.perceptual.reason
        elif name != PIXELS:
            encoder = self.encoders.named()[name]
            if isinstance(encoder, Missing):
                return encoder.reason
            sets = [
                embeddings
                for embeddings in (self.embeddings, self.photos, self.below)
                if embeddings
            ]
            if any(name in embeddings.broken for embeddings in sets):
                return f"{encoder.key} gave no usable numbers for some pictures"
        try:
            return value_pictures(measure, name, self.subjects)
        except NotMeasured as reason:
            return str(reason)

    @cached_property
    def subjects(self) -> Subjects:
        """What scores of single pictures look at."""
        known = list(dict.fromkeys(self.prompts))
        places = {prompt: place for place, prompt in enumerate(known)}
        named = all(known) and not isinstance(self.encoders.clip, Missing)
        cells = list(dict.fromkeys(self._cells(range(len(self.pictures)))))
        perceptual = self.encoders.perceptual
        return Subjects(
            embeddings=self.embeddings,
            photos=self.photos,
            below=self.below,
            partners=self.partners,
            roles=self.roles,
            roles_below=self.below_roles,
            units_below=self.below_units,
            groups=[cells.index(cell) for cell in self._cells(range(len(self.pictures)))],
            # What has no prompt of these is compared with nothing.
            groups_below=[
                places.get(prompt, -1 - place) for place, prompt in enumerate(self.below_prompts)
            ],
            texts=self._embed_texts(known) if named else None,
            own_text=[places[prompt] for prompt in self.prompts],
            # A picture of the floor that has no partner is never read; any text will do.
            own_text_below=[places.get(prompt, 0) for prompt in self.below_prompts],
            nearness=self.nearness,
            copied=self.copied,
            distances=None
            if isinstance(perceptual, Missing)
            else lambda embeddings, groups: measure_distances(perceptual, embeddings.paths, groups),
        )

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        clip = self.encoders.clip
        assert not isinstance(clip, Missing)
        return clip.embed_texts(list(texts))

    def _encoder(self, measure: Measure) -> str:
        return measure.encoder_for(self.encoders.kind)

    def scores(self, rows: Sequence[int], whole: bool = False) -> dict[str, Score]:
        """Score some of the pictures.

        Args:
            rows: Their places.
            whole: Whether these are all: a score that looks at none of them then says so, instead
                of being absent.
        """
        found = {measure.name: self._score(measure, rows, whole) for measure in self.measures}
        return {name: score for name, score in found.items() if score is not None}

    def _score(self, measure: Measure, rows: Sequence[int], whole: bool) -> Score | None:
        values = self.values[measure.name]
        looked_at = [row for row in rows if self.roles[row] in measure.roles]
        if not looked_at:
            absent = " and ".join(_ABSENT[role] for role in measure.roles[:1])
            return Score(note=f"not measured: {absent}") if whole else None
        if isinstance(values, str):
            return Score(note=f"not measured: {values}")
        if measure.kind == "drift":
            looked_at = [row for row in looked_at if self.partners[row] is not None]
            if not looked_at:
                return Score(note="not measured: the floor has no picture of the same prompts")
        draws = self._draw(looked_at, values)
        sampled = self._sample(measure, values.own, looked_at, looked_at, draws)
        if np.isnan(sampled.value):
            return Score(note="not measured: it needs two pictures or more of one prompt")
        return self._place(measure, values, looked_at, sampled, draws)

    def _place(
        self,
        measure: Measure,
        values: PerImageValues,
        rows: Sequence[int],
        sampled: Sampled,
        draws: Draws,
    ) -> Score:
        """Put a sampled score between its floor and its ceiling."""
        ceiling = self._ceiling(values, draws)
        floor, lift, note = None, statistics.Lift(None), values.note
        paired = [row for row in rows if self.partners[row] is not None]
        if values.below is not None and paired:
            # Where only some pictures have a floor, only those tell how far it was left behind.
            draws_below = self._draw(paired, values)
            beneath, _ = self._sample_floor(measure, values, paired, draws_below)
            floor = None if np.isnan(beneath.value) else beneath.value
            if ceiling and floor is not None:
                both = self._sample(measure, values.own, paired, paired, draws_below)
                lift = self._lift(both, beneath, self._ceiling(values, draws_below), draws_below)
                no_lift = f"no lift: {lift.reason}" if lift.reason else ""
                note = "; ".join(filter(None, (note, no_lift)))
        return Score(
            value=sampled.value,
            n=len(rows),
            interval=self._interval(measure, sampled, draws, len(rows)),
            floor=floor,
            ceiling=ceiling.value if ceiling else None,
            lift=lift.value,
            key=self.key(measure),
            lift_interval=lift.interval,
            note=note,
        )

    def _units(self, rows: Sequence[int]) -> tuple[list[tuple[str, int]], list[int]]:
        """Number the noises behind pictures: one prompt and seed, whatever sampler drew them."""
        noises = [(self.prompts[row], self.pictures[row].seed) for row in rows]
        units = list(dict.fromkeys(noises))
        numbers = {unit: number for number, unit in enumerate(units)}
        return units, [numbers[noise] for noise in noises]

    def _draw(self, rows: Sequence[int], values: PerImageValues) -> Draws:
        photos = len(self.photos.prints)
        if values.among_photos is not None:
            photos = len(values.among_photos)
        elif values.own.ndim == 2 and values.own.shape[1] != len(self.pictures):
            photos = values.own.shape[1]
        known = self._draws.get((photos, tuple(rows)))
        if known is None:
            units, _ = self._units(rows)
            known = self._draws[(photos, tuple(rows))] = statistics.draw(
                [prompt for prompt, _ in units],
                photos,
                resamples=self.resamples,
                confidence=self.confidence,
            )
        return known

    def _cells(self, rows: Sequence[int]) -> list[tuple[str, str, int]]:
        """Name what pictures of each may be compared with for variety: prompt and sampler."""
        return [
            (self.prompts[row], self.pictures[row].scheduler, self.pictures[row].steps)
            for row in rows
        ]

    def _sample(
        self,
        measure: Measure,
        values: Array,
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
        cells = self._cells(rows)
        numbers = {cell: number for number, cell in enumerate(dict.fromkeys(cells))}
        cell_of = np.array([numbers[cell] for cell in cells])
        together = (cell_of[:, None] == cell_of).astype(float)
        pairs = values[np.ix_(places, places)] * together
        return statistics.sample_pairs(
            member @ pairs @ member.T, member @ together @ member.T, draws
        )

    def _sample_floor(
        self, measure: Measure, values: PerImageValues, paired: Sequence[int], draws: Draws
    ) -> tuple[Sampled, Draws]:
        """Sample the base model's partners of pictures, or strangers where they count.

        Strangers are drawn independently of the pictures, but with the same photos.

        Returns:
            The floor, and the draws that it comes from.
        """
        assert values.below is not None
        if not values.impostors:
            places = [place for row in paired if (place := self.partners[row]) is not None]
            return self._sample(measure, values.below, places, paired, draws), draws
        drawn = statistics.draw(
            [self.below_units[place] for place in values.impostors],
            resamples=self.resamples,
            confidence=self.confidence,
            seed=1,
        )
        drawn = replace(drawn, photos=draws.photos)
        return statistics.sample_mean(values.below[list(values.impostors)], drawn), drawn

    def _ceiling(self, values: PerImageValues, draws: Draws) -> Sampled | None:
        apart = values.among_photos
        if apart is None or len(apart) < 2:
            return None
        if apart.ndim == 1:
            return Sampled(float(apart.mean()), draws.photos @ apart)
        return statistics.sample_photo_pairs(apart, draws)

    def _lift(
        self, score: Sampled, floor: Sampled, ceiling: Sampled | None, draws: Draws
    ) -> statistics.Lift:
        if ceiling is None or draws.photos.shape[1] < 3:
            return statistics.Lift(None, reason="it needs three photos or more")
        return statistics.lift(score, floor, ceiling, draws.independent, self.confidence)

    def _interval(
        self, measure: Measure, sampled: Sampled, draws: Draws, n: int
    ) -> Interval | None:
        if measure.kind == "variety" and len(draws.clusters) < 3:
            return None  # one pair has no spread
        ends = statistics.interval(sampled, draws.independent, draws.confidence)
        if not measure.is_share or ends is None:
            return ends
        # All or none right has no spread, and still may be luck.
        rate = statistics.wilson_interval(round(sampled.value * n), n, draws.confidence)
        assert rate is not None
        return max(0.0, min(ends[0], rate[0])), min(1.0, max(ends[1], rate[1]))

    def floors(self) -> dict[str, Score]:
        """Score the floor's pictures that have a partner."""
        found = {}
        for measure in self.measures:
            values = self.values[measure.name]
            paired = [
                row
                for row, place in enumerate(self.partners)
                if place is not None and self.roles[row] in measure.roles
            ]
            if isinstance(values, str) or values.below is None or not paired:
                continue
            sampled, draws = self._sample_floor(measure, values, paired, self._draw(paired, values))
            if not np.isnan(sampled.value):
                n = len(values.impostors) or len(paired)
                ends = self._interval(measure, sampled, draws, n)
                found[measure.name] = Score(
                    value=sampled.value, n=n, interval=ends, key=self.key(measure)
                )
        return found

    def ceilings(self) -> dict[str, Score]:
        """Score the photos among themselves."""
        found = {}
        for measure in self.measures:
            values = self.values[measure.name]
            if isinstance(values, str):
                continue
            draws = self._draw(range(len(self.prompts)), values)
            sampled = self._ceiling(values, draws)
            if sampled:
                photos = draws.photos.shape[1]
                # Two photos are one pair, and one pair has no spread.
                ends = statistics.interval(sampled, photos if photos > 2 else 1, draws.confidence)
                found[measure.name] = Score(
                    value=sampled.value, n=photos, interval=ends, key=self.key(measure)
                )
        return found

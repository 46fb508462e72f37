"""From values of single pictures to scores with interval, floor, ceiling and lift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dreamloom.evaluation.metrics.evidence import Evidence
from dreamloom.evaluation.metrics.measures import Measure
from dreamloom.evaluation.metrics.per_image import Array, PerImageValues
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.stats import intervals
from dreamloom.evaluation.stats.intervals import Draws, Interval, Sampled

_ABSENT = {
    "subject": "no picture shows the subject",
    "class": "no picture shows the class without the subject; draw the pack class-v1 as well",
    "other": "no picture shows something else; draw the pack unrelated-v1 as well",
}


@dataclass(frozen=True)
class Evaluator:
    """Scores any part of the pictures.

    Args:
        evidence: Everything that was seen.
        values: Each score's values for single pictures, or why there are none.
        resamples: Bootstrap resamples behind each interval.
        confidence: Coverage of the intervals.
    """

    evidence: Evidence
    values: Mapping[str, PerImageValues | str]
    resamples: int
    confidence: float
    _draws: dict[tuple[int, tuple[int, ...]], Draws] = field(default_factory=dict)

    def scores(self, rows: Sequence[int], whole: bool = False) -> dict[str, Score]:
        """Score some of the pictures.

        Args:
            rows: Their places.
            whole: Whether these are all: a score that looks at none of them then says so, instead
                of being absent.
        """
        found = {}
        for measure in self.evidence.measures:
            looked_at = [row for row in rows if self.evidence.roles[row] in measure.roles]
            if looked_at:
                found[measure.name] = self.score_measure(measure, looked_at)
            elif whole:
                found[measure.name] = Score(note=f"not measured: {_ABSENT[measure.roles[0]]}")
        return found

    def score_measure(self, measure: Measure, rows: Sequence[int]) -> Score:
        """Score pictures, and put the score between its floor and its ceiling."""
        values = self.values[measure.name]
        if isinstance(values, str):
            return Score(note=f"not measured: {values}")
        paired = [row for row in rows if self.evidence.partners[row] is not None]
        if measure.kind == "drift":
            rows = paired
            if not rows:
                return Score(note="not measured: the floor has no picture of the same prompts")
        draws = self._draw(rows, values)
        sampled = self._sample(measure, values.own, rows, rows, draws)
        if np.isnan(sampled.value):
            return Score(note="not measured: it needs two pictures or more of one prompt")
        ceiling = _sample_ceiling(values, draws)
        floor, lift, note = None, intervals.Lift(None), values.note
        if values.below is not None and paired:
            # Where only some pictures have a floor, only those tell how far it was left behind.
            draws_below = self._draw(paired, values)
            beneath, _ = self._sample_floor(measure, values, paired, draws_below)
            floor = None if np.isnan(beneath.value) else beneath.value
            if ceiling and floor is not None:
                lift = intervals.Lift(None, reason="it needs three photos or more")
                top = _sample_ceiling(values, draws_below)
                if top and draws_below.photos.shape[1] >= 3:
                    both = self._sample(measure, values.own, paired, paired, draws_below)
                    independent = draws_below.independent
                    lift = intervals.lift(both, beneath, top, independent, self.confidence)
                no_lift = f"no lift: {lift.reason}" if lift.reason else ""
                note = "; ".join(filter(None, (note, no_lift)))
        return Score(
            value=sampled.value,
            n=len(rows),
            interval=_find_interval(measure, sampled, draws, len(rows)),
            floor=floor,
            ceiling=ceiling.value if ceiling else None,
            lift=lift.value,
            key=self.evidence.key(measure),
            lift_interval=lift.interval,
            note=note,
        )

    def _units(self, rows: Sequence[int]) -> tuple[list[str], list[int]]:
        """Number the noises behind pictures: one prompt and seed, whatever sampler drew them.

        Returns:
            The prompt of each noise, and the number of each picture's.
        """
        noises = [(self.evidence.prompts[row], self.evidence.pictures[row].seed) for row in rows]
        numbers = {noise: number for number, noise in enumerate(dict.fromkeys(noises))}
        return [prompt for prompt, _ in numbers], [numbers[noise] for noise in noises]

    def _draw(self, rows: Sequence[int], values: PerImageValues) -> Draws:
        photos = len(self.evidence.photos.prints)
        if values.among_photos is not None:
            photos = len(values.among_photos)
        elif values.own.ndim == 2 and values.own.shape[1] != len(self.evidence.pictures):
            photos = values.own.shape[1]
        known = self._draws.get((photos, tuple(rows)))
        if known is None:
            known = self._draws[(photos, tuple(rows))] = intervals.draw(
                self._units(rows)[0],
                photos,
                resamples=self.resamples,
                confidence=self.confidence,
            )
        return known

    def _sample(
        self,
        measure: Measure,
        values: Array,
        places: Sequence[int],
        rows: Sequence[int],
        draws: Draws,
    ) -> Sampled:
        """Sample a score over ``places`` of its values, which belong to the pictures ``rows``."""
        prompts, unit_of = self._units(rows)
        member = np.zeros((len(prompts), len(rows)))
        member[unit_of, np.arange(len(rows))] = 1.0
        if measure.kind != "variety":
            share = member / member.sum(axis=1, keepdims=True)
            return intervals.sample_mean(share @ values[list(places)], draws)
        cell_of = np.array(self.evidence.cells)[list(rows)]
        together = (cell_of[:, None] == cell_of).astype(float)
        pairs = values[np.ix_(places, places)] * together
        return intervals.sample_pairs(
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
            partners = self.evidence.partners
            places = [place for row in paired if (place := partners[row]) is not None]
            return self._sample(measure, values.below, places, paired, draws), draws
        drawn = intervals.draw(
            [self.evidence.below_units[place] for place in values.impostors],
            resamples=self.resamples,
            confidence=self.confidence,
            seed=1,
        )
        drawn = replace(drawn, photos=draws.photos)
        return intervals.sample_mean(values.below[list(values.impostors)], drawn), drawn

    def floors(self) -> dict[str, Score]:
        """Score the floor's pictures that have a partner."""
        found = {}
        for measure in self.evidence.measures:
            values = self.values[measure.name]
            paired = [
                row
                for row, place in enumerate(self.evidence.partners)
                if place is not None and self.evidence.roles[row] in measure.roles
            ]
            if isinstance(values, str) or values.below is None or not paired:
                continue
            sampled, draws = self._sample_floor(measure, values, paired, self._draw(paired, values))
            if not np.isnan(sampled.value):
                n = len(values.impostors) or len(paired)
                ends = _find_interval(measure, sampled, draws, n)
                found[measure.name] = Score(
                    value=sampled.value, n=n, interval=ends, key=self.evidence.key(measure)
                )
        return found

    def ceilings(self) -> dict[str, Score]:
        """Score the photos among themselves."""
        found = {}
        for measure in self.evidence.measures:
            values = self.values[measure.name]
            if isinstance(values, str):
                continue
            draws = self._draw(range(len(self.evidence.pictures)), values)
            sampled = _sample_ceiling(values, draws)
            if sampled:
                photos = draws.photos.shape[1]
                # Two photos are one pair, and one pair has no spread.
                ends = intervals.interval(sampled, photos if photos > 2 else 1, draws.confidence)
                found[measure.name] = Score(
                    value=sampled.value, n=photos, interval=ends, key=self.evidence.key(measure)
                )
        return found


def _sample_ceiling(values: PerImageValues, draws: Draws) -> Sampled | None:
    apart = values.among_photos
    if apart is None or len(apart) < 2:
        return None
    if apart.ndim == 1:
        return Sampled(float(apart.mean()), draws.photos @ apart)
    return intervals.sample_photo_pairs(apart, draws)


def _find_interval(measure: Measure, sampled: Sampled, draws: Draws, n: int) -> Interval | None:
    if measure.kind == "variety" and len(draws.clusters) < 3:
        return None  # one pair has no spread
    ends = intervals.interval(sampled, draws.independent, draws.confidence)
    if not measure.is_share or ends is None:
        return ends
    # All or none right has no spread, and still may be luck.
    rate = intervals.wilson_interval(round(sampled.value * n), n, draws.confidence)
    assert rate is not None
    return max(0.0, min(ends[0], rate[0])), min(1.0, max(ends[1], rate[1]))

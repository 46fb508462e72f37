"""Retention: what a candidate keeps of each aim; harmonic mean, Pareto front, rank correlation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.retention import score_retention
from dreamloom.evaluation.stats import intervals
from dreamloom.experiments.merge_search.embeddings import MeasuredImage

Scores: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
"""A row for each picture; one value, or a column for each reference."""

AIMS = ("identity", "style", "prompt")
"""What a merge is to keep, in the order in which it is told."""

_STRETCHES = 1000
NO_ROOM = {
    "identity": "the subject's adapter alone is no more like the photos than the base model",
    "style": "the style's adapter alone is no more in the style than the subject's",
    "prompt": "the base model's pictures fit their own prompts no better than others",
}
"""Why nothing of an aim can be kept."""


@dataclass(frozen=True)
class Ends:
    """What is drawn beside the candidates, of the same prompts, seeds and steps.

    Args:
        prompts: Of each picture.
        base: By the base model alone.
        subject: By the subject's adapter alone.
        style: By the style's alone.
        scale: How far it is from nothing kept to everything, by aim, where other pictures than
            these say so: of few pictures it is hard to tell. None takes these.
    """

    prompts: Sequence[str]
    base: Sequence[MeasuredImage]
    subject: Sequence[MeasuredImage]
    style: Sequence[MeasuredImage]
    scale: Mapping[str, float] | None = None

    def value(self, measured_images: Sequence[MeasuredImage]) -> dict[str, Scores]:
        """Give each aim's values: a row for each picture, and a column for each reference.

        What shows nobody, or repeats a photo, earns what the base model's picture earned; what
        repeats a picture in the style earns what the subject's adapter earned. An aim that was not
        measured is absent.
        """
        identity = [None if one.copies_photo else one.identity for one in measured_images]
        style = [None if one.copies_style else one.style for one in measured_images]
        every = (*measured_images, *self.base, *self.subject, *self.style)
        base, subject = [one.identity for one in self.base], [one.style for one in self.subject]
        found = {
            "identity": _fill(identity, base, [one.identity for one in every]),
            "style": _fill(style, subject, [one.style for one in every]),
        }
        if all(one.prompt is not None for one in (*measured_images, *self.base)):
            found["prompt"] = np.array([one.prompt for one in measured_images], float)
        return {aim: values for aim, values in found.items() if values is not None}

    def bounds(self, aim: str) -> tuple[Scores, Scores] | None:
        """Give the values of nothing kept (0) and of everything kept (1); None if not measured."""
        if aim == "prompt":
            others = [one.others for one in self.base]
            own = self.value(self.base).get(aim)
            if own is None or any(other is None for other in others):
                return None
            return np.array(others, float), own
        sides = (self.base, self.subject) if aim == "identity" else (self.subject, self.style)
        low, high = (self.value(side).get(aim) for side in sides)
        return None if low is None or high is None else (low, high)

    def room(self, aim: str) -> float | None:
        """How far it is from nothing kept to everything; None if not measured or not above 0."""
        if self.scale is not None:
            return self.scale.get(aim)
        bounds = self.bounds(aim)
        if bounds is None:
            return None
        gap = average(bounds[1], self.prompts) - average(bounds[0], self.prompts)
        return gap if gap > 0 else None

    def rooms(self) -> dict[str, float]:
        """The room of each aim that has any."""
        found = {aim: self.room(aim) for aim in AIMS}
        return {aim: room for aim, room in found.items() if room is not None}

    def keep(self, measured_images: Sequence[MeasuredImage]) -> dict[str, float]:
        """Say which share of each aim is kept: 0 for nothing, 1 for all; it may lie outside.

        Aims that cannot be measured on these prompts are absent.
        """
        shares = {}
        for aim, values in self.value(measured_images).items():
            room, bounds = self.room(aim), self.bounds(aim)
            if room is not None and bounds is not None:
                low = average(bounds[0], self.prompts)
                shares[aim] = (average(values, self.prompts) - low) / room
        return {aim: shares[aim] for aim in AIMS if aim in shares}

    def score(
        self,
        measured_images: Sequence[MeasuredImage],
        keys: Mapping[str, str],
        resamples: int,
        confidence: float,
    ) -> dict[str, Score]:
        """Say the same with intervals, which hold the doubt of other prompts and references."""
        values, scores = self.value(measured_images), {}
        for aim in AIMS:
            bounds = self.bounds(aim)
            if bounds is None or aim not in values:
                scores[aim] = Score(note="not measured")
                continue
            columns = values[aim].shape[1] if values[aim].ndim == 2 else 0
            draws = intervals.draw(
                self.prompts, columns, resamples=resamples, confidence=confidence
            )
            no_room = f"perhaps {NO_ROOM[aim]}"
            scores[aim] = score_retention(
                values[aim], *bounds, draws=draws, key=keys.get(aim), no_room=no_room
            )
        return scores


def rank_key(shares: Mapping[str, float]) -> tuple[float, float]:
    """Order candidates: by what is kept of all aims together, and then by its plain sum."""
    if not shares:
        return 0.0, 0.0
    return join_shares(list(shares.values())), sum(shares.values())


def average(values: Scores, prompts: Sequence[str]) -> float:
    """Take the mean over references, then over a prompt's pictures, then over prompts."""
    rows = values.reshape(len(values), -1).mean(axis=1)
    labels = np.array(prompts)
    return float(np.mean([rows[labels == prompt].mean() for prompt in dict.fromkeys(prompts)]))


def _fill(
    rows: Sequence[tuple[float, ...] | None],
    below: Sequence[tuple[float, ...] | None],
    every: Sequence[tuple[float, ...] | None],
) -> Scores | None:
    """Give rows without a value what lies below them, or the mean of that, or zeros.

    None if none of ``every`` picture could be compared with a reference.
    """
    columns = max((len(row) for row in every if row is not None), default=0)
    if columns == 0:
        return None
    known = [row for row in below if row is not None] or [(0.0,) * columns]
    mean = np.mean(known, axis=0)
    filled = [
        next((side for side in (own, under) if side is not None), mean)
        for own, under in zip(rows, below, strict=True)
    ]
    table: Scores = np.array(filled, float)
    return table[:, 0] if columns == 1 else table


def join_shares(shares: Sequence[float]) -> float:
    """Give the harmonic mean of shares, each cut to between 0 and 1: none makes up for another.

    Args:
        shares: One or more.

    Raises:
        ValueError: If there is none.

    Example:
        >>> join_shares([1.0, 0.5]), join_shares([0.9, -0.1]), join_shares([2.0])
        (0.6666666666666666, 0.0, 1.0)
    """
    if not shares:
        raise ValueError("there must be at least one share")
    cut = [min(1.0, max(0.0, share)) for share in shares]
    return 0.0 if min(cut) == 0 else len(cut) / sum(1 / share for share in cut)


def attribute_change(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Say by how much each share counts in what `join_shares` changes from first to second.

    The gradient is averaged over the straight line from one to the other, so that the change is
    the sum of each share's own change times its number here.

    Source:
        Sundararajan et al., Axiomatic Attribution for Deep Networks (arXiv:1703.01365), Eq. 1.

    Example:
        >>> [round(number, 3) for number in attribute_change([0.2, 0.4], [0.4, 0.4])]
        [0.667, 0.365]
    """
    start, end = np.asarray(first, float), np.asarray(second, float)
    middles = (np.arange(_STRETCHES) + 0.5)[:, None] / _STRETCHES
    path = start + middles * (end - start)
    inverse = 1 / path.clip(1e-9, 1)
    gradients = len(start) * inverse**2 / inverse.sum(axis=1, keepdims=True) ** 2
    # Nothing is gained above 1, and nothing by one share while another is at 0.
    flat = (path >= 1) | (path.min(axis=1, keepdims=True) <= 0)
    return [float(number) for number in np.where(flat, 0.0, gradients).mean(axis=0)]


def find_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Find the points that no other one beats: as good in every aim, and better in one.

    Args:
        points: For each, how good it is in each aim; higher is better.

    Returns:
        Their numbers, rising.

    Example:
        >>> find_front([[1, 0], [0, 1], [0.5, 0.5], [0.4, 0.5]])
        [0, 1, 2]
    """
    return [
        number
        for number, own in enumerate(points)
        if not any(
            all(theirs >= mine for theirs, mine in zip(other, own, strict=True))
            and any(theirs > mine for theirs, mine in zip(other, own, strict=True))
            for other in points
        )
    ]


def correlate_ranks(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Say how alike two orders of the same things are: 1 the same, -1 turned around, 0 unrelated.

    Returns:
        None with fewer than three things, or where all are alike on one side.

    Source:
        Spearman, The Proof and Measurement of Association between Two Things (1904).

    Example:
        >>> correlate_ranks([0.1, 0.5, 0.9], [1.0, 2.0, 3.0])
        1.0
    """
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    one, other = _number_places(first), _number_places(second)
    one, other = one - one.mean(), other - other.mean()
    return float((one @ other) / math.sqrt((one @ one) * (other @ other)))


def _number_places(values: Sequence[float]) -> Float[np.ndarray, " things"]:
    """Number values from the lowest up; equal ones share the mean of their places."""
    listed = np.asarray(values, float)
    below = (listed[:, None] > listed).sum(axis=1)
    alike = (listed[:, None] == listed).sum(axis=1)
    ranks: Float[np.ndarray, " things"] = below + (alike - 1) / 2
    return ranks

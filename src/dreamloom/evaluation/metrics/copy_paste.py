"""Whether pictures show the subject or repeat its photos: the photos held out from training tell.

Who has learned a person draws somebody as like to photos that were never taught as to those that
were. Who has learned the photos by heart is nearer to the taught ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.evaluator import Evaluator
from dreamloom.evaluation.metrics.evidence import Evidence
from dreamloom.evaluation.metrics.measures import MEASURE
from dreamloom.evaluation.metrics.per_image import Array, NotMeasured, PerImageValues
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.metrics.similarity import cosines

# More ways to hold photos out than these tell nothing more of their spread.
_MOST_CHOICES = 500
# With two there is one pair, and nothing to compare it with.
_FEWEST_PHOTOS = 3


@dataclass(frozen=True)
class PhotoGaps:
    """What gap photos have that repeat nothing, by chance alone.

    Args:
        expected: The mean over all ways to hold photos out. It is above 0 where more photos are
            taught than held out: the nearest of many is nearer.
        spread: How far above that the gap may lie.
    """

    expected: float
    spread: float


def score_copy_paste(evidence: Evidence, resamples: int, confidence: float) -> Score:
    """Score how much nearer pictures are to the taught photos than to the held-out ones.

    A picture's gap is its identity with the nearest taught photo less that with the nearest
    held-out one. The value is the mean gap less the one that photos have among themselves, so that
    0 is what pictures come to that repeat nothing. Its interval draws prompts and pictures; the
    photos stay what they are. How much they alone can make is the ceiling, see
    `measure_photo_gaps`. The floor is the base model's, which has seen neither. Copies of photos
    count here as what they are; pictures without a face are left out.

    Args:
        evidence: What was seen, with which photos were held out.
        resamples: Bootstrap resamples behind the interval.
        confidence: Coverage of the interval, and the share of choices that the spread covers.

    Source:
        After the copy-paste measure of WithAnyone and its MultiID-Bench (arXiv:2510.14975), which
        sets a picture's nearness to the one reference given against that to another photo of the
        person. We have several of both, take the nearest of each, and subtract what that does.
    """
    try:
        return _measure(evidence, resamples, confidence)
    except NotMeasured as reason:
        return Score(note=f"not measured: {reason}")


def _measure(evidence: Evidence, resamples: int, confidence: float) -> Score:
    measure = MEASURE["identity"]
    name, encoder = evidence.encoder_name(measure), evidence.encoder_of(measure)
    if isinstance(encoder, Missing):
        raise NotMeasured(encoder.reason)
    sets = [one for one in (evidence.embeddings, evidence.photos, evidence.below) if one]
    if any(name in embeddings.broken for embeddings in sets):
        raise NotMeasured("its encoder gave no usable numbers for some pictures")
    photos, held = _part_photos(evidence, evidence.photos.features[name])
    own = _gaps(evidence.embeddings.features[name], photos, held)
    rows = [
        row
        for row, role in enumerate(evidence.roles)
        if role == "subject" and not np.isnan(own[row])
    ]
    if not rows:
        raise NotMeasured("no picture of the subject shows a face")
    below = None
    if evidence.below is not None:
        below = _gaps(evidence.below.features[name], photos, held)
        seen = below[~np.isnan(below)]
        below = np.where(np.isnan(below), seen.mean(), below) if len(seen) else None
    chance = measure_photo_gaps(cosines(photos, photos).numpy(), int(held.sum()), confidence)
    values = PerImageValues(
        np.nan_to_num(own) - chance.expected, None if below is None else below - chance.expected
    )
    score = Evaluator(evidence, {measure.name: values}, resamples, confidence).score_measure(
        measure, rows
    )
    told = f"{int((~held).sum())} photos taught, {int(held.sum())} held out"
    return score.model_copy(update={"ceiling": chance.spread, "note": told})


def _part_photos(evidence: Evidence, features: Tensor) -> tuple[Tensor, Tensor]:
    """Give the features of the photos that show somebody, and which of them were held out."""
    if not any(evidence.held_out):
        raise NotMeasured(
            "no photo was held out from training; validation.held_out_photos holds some out"
        )
    shown = ~features.isnan().all(dim=1)
    held = torch.tensor(evidence.held_out)[shown]
    if held.all() or not held.any():
        raise NotMeasured(f"no {'taught' if held.any() else 'held-out'} photo shows a face")
    if len(held) < _FEWEST_PHOTOS:
        raise NotMeasured("it needs three photos or more")
    return features[shown], held


def measure_photo_gaps(
    similar: Float[np.ndarray, "photos photos"], held_out: int, confidence: float
) -> PhotoGaps:
    """Measure what gap the photos alone can make, whichever of them are held out.

    For each choice of held-out photos, every photo is taken for a picture and compared with the
    others alone; the mean of their gaps is what pictures would have that repeat nothing, were they
    as various as the photos.

    Args:
        similar: Similarities of the photos with each other; the diagonal is not read.
        held_out: How many are held out, at least 1, and fewer than there are photos.
        confidence: Which share of the choices lies within the spread: all of them, where they are
            few.

    Raises:
        ValueError: If there are fewer than three photos, or none is left to be taught.
    """
    count = len(similar)
    if count < _FEWEST_PHOTOS or not 0 < held_out < count:
        raise ValueError(f"of {count} photos {held_out} cannot be held out and compared")
    gaps = np.array([_gap_of_choice(similar, choice) for choice in _choose(count, held_out)])
    expected = float(gaps.mean())
    return PhotoGaps(expected, float(np.quantile(gaps, confidence, method="higher")) - expected)


def _choose(count: int, held_out: int) -> Sequence[Sequence[int]]:
    """List the ways to hold photos out; of very many, some that are always the same."""
    if comb(count, held_out) <= _MOST_CHOICES:
        return list(combinations(range(count), held_out))
    rng = np.random.default_rng(0)
    return [rng.choice(count, held_out, replace=False).tolist() for _ in range(_MOST_CHOICES)]


def _gap_of_choice(similar: Float[np.ndarray, "photos photos"], choice: Sequence[int]) -> float:
    held = np.zeros(len(similar), dtype=bool)
    held[list(choice)] = True
    others = ~np.eye(len(similar), dtype=bool)
    gaps = [
        row[apart & ~held].max() - row[apart & held].max()
        for row, apart in zip(similar, others, strict=True)
        if (apart & held).any() and (apart & ~held).any()
    ]
    return float(np.mean(gaps))


def _gaps(features: Tensor, photos: Tensor, held: Tensor) -> Array:
    """Give each picture's gap; nan where nobody is shown."""
    gaps = np.full(len(features), np.nan)
    shown = ~features.isnan().all(dim=1)
    if shown.any():
        near = cosines(features[shown], photos)
        gaps[shown.numpy()] = (near[:, ~held].amax(dim=1) - near[:, held].amax(dim=1)).numpy()
    return gaps


def find_copy_paste(score: Score) -> str:
    """Say that pictures repeat what was taught, where they do; empty where they don't.

    They do where the gap is larger than photos alone can make it, and its interval above 0.
    """
    if score.value is None or score.ceiling is None or score.value <= score.ceiling:
        return ""
    if score.interval is not None and score.interval[0] <= 0:
        return ""
    between = ""
    if score.interval is not None:
        between = " ({:.3f} to {:.3f})".format(*score.interval)
    return (
        f"Pictures are nearer to the photos that were taught than to those held out, by "
        f"{score.value:.3f}{between} more than photos that repeat nothing, whose own spread is "
        f"{score.ceiling:.3f}: what was taught is repeated."
    )

"""Appearance: a picture's mean colour and sharpness, how far they moved, and which are off.

No score sees these: a face recognised at 0.95 may be blue, and a class may lose its colours while
its persons stay persons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image

from dreamloom.data.image_io import scale_shorter_side
from dreamloom.data.quality import STANDARD_PX, sharpness
from dreamloom.evaluation.detectors.colour import to_lab, to_light
from dreamloom.evaluation.stats.intervals import Estimate, Interval, mean_with_interval
from dreamloom.evaluation.stats.tests import student_quantile

AXES = ("lightness", "green to red", "blue to yellow", "sharpness")
"""What `measure_appearance` measures, in its order."""

PREDICTED_SHARE = 0.9998
"""A picture is off where it lies outside the interval that should hold this share of the base
model's pictures; `benchmarks/off_pictures.py` says how many it holds."""
LEAST_LIMITS = np.array([10.0, 10.0, 10.0, 1.0])
"""No limit is lower: 10 units of colour are seen at a glance, and 1 is half or twice as sharp."""
LEAST_FREEDOM = 8
"""With fewer degrees of freedom the spread is not known well enough: four prompts of three seeds,
or eight of two, are the least."""

_COLOUR_PX = 128  # a mean colour needs no detail
_LEAST_SHARPNESS = 0.5  # rounding to 8 bits leaves a variance of 1/12, six times in a difference
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class AppearanceShift:
    """How far pictures have moved from their partners, on average.

    Args:
        n: How many pairs.
        axes: By how much lightness, green to red and blue to yellow changed, in CIELAB units.
        difference: ΔE*ab of that step, 0 or more.
        difference_interval: From the nearest to the farthest point of what all three together may
            be with 95 % confidence: above 0 only where one of them, so judged, is not 0. None
            for a single pair.
        sharpness: By how much log2 of sharpness changed: −1 is half as sharp.
    """

    n: int
    axes: tuple[Estimate, Estimate, Estimate]
    difference: float
    difference_interval: Interval | None
    sharpness: Estimate

    @property
    def has_moved(self) -> bool:
        """Whether the colour can be told to have moved at all."""
        return self.difference_interval is not None and self.difference_interval[0] > 0


@dataclass(frozen=True)
class Spread:
    """How far pictures of one prompt lie from each other, pooled over prompts.

    Args:
        deviation: Standard deviation within prompts, for each of `AXES`.
        freedom: How many pictures there are more than prompts.
    """

    deviation: Float[np.ndarray, " 4"]
    freedom: int


def measure_appearance(image: Image.Image) -> Float[np.ndarray, " 4"]:
    """Measure a picture's mean colour and its sharpness.

    Args:
        image: RGB, upright, of 3 px or more a side.

    Returns:
        As in `AXES`: the mean of L* (0 black to 100 white), a* and b* (about −100 to 100) over the
        picture, and log2 of its sharpness (−1 or more): one more is twice as sharp.

    Raises:
        ValueError: If a side has fewer than 3 pixels.

    Source:
        CIE 15:2004, section 8.2.1 (`detectors.colour.to_lab`); the Laplacian variance of
        `data.quality.sharpness`.
    """
    small = image if min(image.size) <= STANDARD_PX else scale_shorter_side(image, STANDARD_PX)
    figure = sharpness(np.asarray(small.convert("L"), dtype=np.float64))
    image = image if min(image.size) <= _COLOUR_PX else scale_shorter_side(image, _COLOUR_PX)
    colour = to_lab(to_light(np.asarray(image, dtype=np.float64) / 255)).mean(axis=(0, 1))
    return np.append(colour, math.log2(max(figure, _LEAST_SHARPNESS)))


def measure_shift(
    before: Float[np.ndarray, "pairs 4"],
    after: Float[np.ndarray, "pairs 4"],
    prompts: Sequence[str],
) -> AppearanceShift:
    """Measure how far pictures have moved from their partners of the same prompts and seeds.

    Each axis has its own 95 % interval. Whether anything moved is asked of all three together, so
    that where nothing did, that is told in 5 % of all cases at most (Bonferroni); only then do the
    axes' own intervals say whereto. Prompts count alike, and are what is drawn again; see
    `stats.intervals`.

    Args:
        before: From `measure_appearance`, a row for each partner.
        after: The same for the pictures.
        prompts: Of each pair.

    Raises:
        ValueError: If there is no pair.

    Source:
        ΔE*ab: CIE 15:2004, section 8.2.1. Asking about the parts only where the whole has changed:
        Fisher, The Design of Experiments (1935).
    """
    moved = after - before

    def estimate(axis: int, confidence: float) -> Estimate:
        return mean_with_interval(moved[:, axis], prompts, confidence=confidence)

    axes = (estimate(0, _CONFIDENCE), estimate(1, _CONFIDENCE), estimate(2, _CONFIDENCE))
    joint = [estimate(axis, 1 - (1 - _CONFIDENCE) / 3).interval for axis in range(3)]
    ends = [one for one in joint if one is not None]
    nearest = math.hypot(*(max(0.0, low, -high) for low, high in ends))
    farthest = math.hypot(*(max(-low, high) for low, high in ends))
    return AppearanceShift(
        n=len(moved),
        axes=axes,
        difference=math.hypot(*(one.value for one in axes)),
        difference_interval=(nearest, farthest) if len(ends) == len(axes) else None,
        sharpness=estimate(3, _CONFIDENCE),
    )


def measure_spread(groups: Sequence[Float[np.ndarray, "_ 4"]]) -> Spread | None:
    """Measure how far pictures of one prompt, drawn from different seeds, lie from each other.

    Args:
        groups: Of each prompt, a row for each picture, from `measure_appearance`.

    Returns:
        None where `LEAST_FREEDOM` is not reached.
    """
    freedom = sum(len(group) - 1 for group in groups)
    if freedom < LEAST_FREEDOM:
        return None
    squares = sum(((group - group.mean(axis=0)) ** 2).sum(axis=0) for group in groups)
    return Spread(np.sqrt(squares / freedom), freedom)


def measure_limits(others: int, spread: Spread) -> Float[np.ndarray, " 4"]:
    """Say how far from the mean of a prompt's pictures another one of that prompt may lie.

    It is Student's prediction interval, so that few pictures make wide limits and no more false
    alarms than many.

    Args:
        others: Of how many pictures the mean is, 1 or more.
        spread: How far such pictures lie from each other.

    Source:
        Hahn and Meeker, Statistical Intervals (1991), on prediction intervals for one further
        observation.
    """
    reach = -student_quantile((1 - PREDICTED_SHARE) / 2, spread.freedom)
    limits: Float[np.ndarray, " 4"] = np.maximum(
        reach * spread.deviation * math.sqrt(1 + 1 / others), LEAST_LIMITS
    )
    return limits


def measure_deviation(
    picture: Float[np.ndarray, " 4"], others: Float[np.ndarray, "_ 4"], spread: Spread
) -> Float[np.ndarray, " 4"]:
    """Say how far a picture lies from the base model's pictures of its prompt.

    Args:
        picture: From `measure_appearance`.
        others: The same of the base model's pictures of its prompt.
        spread: How far the base model's pictures lie from each other.

    Returns:
        For each of `AXES`, with its sign, in units of `measure_limits`: beyond 1 or −1 it is off.
    """
    off: Float[np.ndarray, " 4"] = (picture - others.mean(axis=0)) / measure_limits(
        len(others), spread
    )
    return off

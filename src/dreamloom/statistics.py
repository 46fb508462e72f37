"""How sure a score is: intervals from resampling, and rates.

The unit is the picture, never the pair of a picture and a photo: pairs share pictures, and
intervals over pairs come out several times too narrow. Pictures of one prompt resemble each other,
so prompts are resampled first, and then the pictures within them. Where a score is a mean over
photos, the photos are resampled too: with six of them, another six would give another score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

Interval = tuple[float, float]
"""Lower and upper end."""


@dataclass(frozen=True)
class Draws:
    """One bootstrap over pictures and photos, to be shared by every score that is compared.

    Each row holds the weights of one resample, and the weights of a row sum to 1. Scores that
    share their draws are paired: a resample that contains a picture contains its floor too.

    Args:
        units: Weights of the pictures in each resample.
        photos: Weights of the photos in each resample; none where the score has no photos.
        clusters: For each picture, the number of its prompt.
        confidence: Coverage of the intervals, between 0 and 1.
    """

    units: Float[np.ndarray, "resamples units"]
    photos: Float[np.ndarray, "resamples photos"]
    clusters: tuple[int, ...]
    confidence: float

    @property
    def independent(self) -> int:
        """How many independent draws there were: of prompts, or of one prompt's pictures."""
        prompts = len(set(self.clusters))
        return prompts if prompts > 1 else len(self.clusters)

    @property
    def plain(self) -> Float[np.ndarray, " units"]:
        """The weights of the sample itself: every prompt counts alike, however many pictures."""
        sizes = np.bincount(self.clusters)
        return 1.0 / (np.count_nonzero(sizes) * sizes[list(self.clusters)].astype(float))


@dataclass(frozen=True)
class Sampled:
    """A score of the sample, and the same score of each resample (nan where it is undefined)."""

    value: float
    resampled: Float[np.ndarray, " resamples"]


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval; no interval where fewer than two values were seen."""

    value: float
    n: int
    interval: Interval | None


@dataclass(frozen=True)
class Lift:
    """How far a score has come from the floor to the ceiling; ``reason`` says why it is absent."""

    value: float | None
    interval: Interval | None = None
    reason: str = ""


def draw(
    clusters: Sequence[str | int],
    photos: int = 0,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Draws:
    """Draw resamples: prompts with replacement, pictures within each drawn prompt, and photos.

    Args:
        clusters: For each picture, what it shares with others, such as its prompt.
        photos: How many photos the pictures are compared with; 0 for scores without photos.
        resamples: How many resamples, 1 or more.
        confidence: Coverage of the intervals, between 0 and 1.
        seed: The same seed gives the same draws.

    Raises:
        ValueError: If there is no picture, no resample, or the confidence is no proportion.

    Source:
        Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8. Drawing
        at both levels is on the safe side: it gives slightly wide intervals.
    """
    if not clusters:
        raise ValueError("there must be at least one picture")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"resamples must be 1 or more and confidence between 0 and 1, "
            f"got {resamples} and {confidence}"
        )
    dice = np.random.default_rng(seed)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    of_unit = np.array([numbers[name] for name in clusters])
    prompts = len(numbers)
    drawn = dice.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    units = np.zeros((resamples, len(clusters)))
    for prompt in range(prompts):
        members = np.flatnonzero(of_unit == prompt)
        # A prompt drawn twice draws its pictures twice, independently.
        counts = dice.multinomial(
            drawn[:, prompt] * len(members), np.full(len(members), 1 / len(members))
        )
        units[:, members] = counts / (prompts * len(members))
    weights = np.zeros((resamples, 0))
    if photos:
        weights = dice.multinomial(photos, np.full(photos, 1 / photos), size=resamples) / photos
    return Draws(units, weights, tuple(of_unit.tolist()), confidence)


def sample_mean(
    values: Float[np.ndarray, " units"] | Float[np.ndarray, "units photos"], draws: Draws
) -> Sampled:
    """Take the mean over photos, then over a prompt's pictures, then over prompts.

    Args:
        values: One value per picture, or one per picture and photo.
        draws: From `draw`, for just these pictures and photos.

    Example:
        >>> draws = draw(["beach", "beach", "snow"], resamples=10)
        >>> sample_mean(np.array([0.0, 1.0, 1.0]), draws).value
        0.75
    """
    if values.ndim == 1:
        return Sampled(float(draws.plain @ values), draws.units @ values)
    resampled = ((draws.units @ values) * draws.photos).sum(axis=1)
    return Sampled(float(draws.plain @ values.mean(axis=1)), resampled)


def sample_pairs(
    values: Float[np.ndarray, "units units"],
    allowed: Float[np.ndarray, "units units"],
    draws: Draws,
) -> Sampled:
    """Take the mean over pairs of a prompt's pictures, then over prompts.

    Args:
        values: A value for each pair of pictures, summed where a pair was seen several times.
        allowed: How often each pair was seen; 0 for pairs that do not count. A picture is never
            paired with itself, and neither with its own copy in a resample.
        draws: From `draw`, for just these pictures.

    Returns:
        The mean over the prompts that have a pair; nan where none has one.
    """
    clusters = np.array(draws.clusters)
    weights = np.concatenate([draws.plain[None], draws.units])
    total, share = np.zeros(len(weights)), np.zeros(len(weights))
    for prompt in np.unique(clusters):
        members = np.flatnonzero(clusters == prompt)
        inside = weights[:, members]
        # Pairs that cannot be were multiplied away, so that nan there does no harm.
        counts = allowed[np.ix_(members, members)] * (1 - np.eye(len(members)))
        sums = np.where(counts > 0, values[np.ix_(members, members)], 0.0)
        pairs = ((inside @ counts) * inside).sum(axis=1)
        found = ((inside @ sums) * inside).sum(axis=1)
        defined = pairs > 0
        weight = np.where(defined, inside.sum(axis=1), 0.0)
        total += weight * np.divide(found, pairs, out=np.zeros_like(found), where=defined)
        share += weight
    means = np.divide(total, share, out=np.full_like(total, np.nan), where=share > 0)
    return Sampled(float(means[0]), means[1:])


def sample_photo_pairs(values: Float[np.ndarray, "photos photos"], draws: Draws) -> Sampled:
    """Take the mean over pairs of different photos; nan with fewer than two.

    Args:
        values: A value for each pair of photos; the diagonal is not read.
        draws: From `draw`, with these photos.
    """
    photos = len(values)
    alone = Draws(draws.photos, draws.photos, (0,) * photos, draws.confidence)
    return sample_pairs(values, np.ones((photos, photos)), alone)


def interval(sampled: Sampled, independent: int, confidence: float) -> Interval | None:
    """Give the expanded percentile interval of a score.

    Percentiles of a small sample's resamples cover too little (89 % instead of 95 % for eight
    pictures); the percentiles are moved outward as Student's t would.

    Args:
        sampled: The score and its resamples.
        independent: How many independent draws lie behind it: prompts, pictures or photos.
        confidence: Coverage, between 0 and 1.

    Returns:
        Lower and upper end; None with fewer than two independent draws, or where resamples are
        undefined too often to tell.

    Source:
        Hesterberg, What Teachers Should Know About the Bootstrap (arXiv:1411.5279), section 5.
    """
    if independent < 2 or np.isnan(sampled.resampled).mean() > 0.5:
        return None
    quantile = _student_t_quantile((1 - confidence) / 2, independent - 1)
    tail = NormalDist().cdf(math.sqrt(independent / (independent - 1)) * quantile)
    low, high = np.nanquantile(sampled.resampled, [tail, 1 - tail])
    if not (np.isfinite(low) and np.isfinite(high)):
        return None
    return float(low), float(high)


def mean_with_interval(
    values: Float[np.ndarray, " units"] | Float[np.ndarray, "units photos"],
    clusters: Sequence[str | int] | None = None,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Estimate a mean from a handful of pictures.

    Args:
        values: One value per picture, or one per picture and photo.
        clusters: For each picture, its prompt; None if all share one.
        resamples: How many resamples, 1 or more.
        confidence: Coverage, between 0 and 1.
        seed: The same seed gives the same interval.

    Returns:
        The mean, the number of pictures, and the interval: None for a single picture.

    Example:
        >>> mean_with_interval(np.array([0.25])).interval is None
        True
        >>> estimate = mean_with_interval(np.array([0.2, 0.3, 0.4, 0.3]))
        >>> estimate.interval[0] < 0.3 < estimate.interval[1]
        True
    """
    photos = values.shape[1] if values.ndim == 2 else 0
    groups = clusters if clusters is not None else [0] * len(values)
    draws = draw(groups, photos, resamples=resamples, confidence=confidence, seed=seed)
    sampled = sample_mean(values, draws)
    return Estimate(sampled.value, len(values), interval(sampled, draws.independent, confidence))


def mean_over_runs(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Estimate a mean over trainings, of which there are always few.

    Resamples of three values hardly leave them, so that their percentiles are far too narrow;
    Student's interval is right if the values are near enough to normal.

    Args:
        values: One value for each training.
        confidence: Coverage, between 0 and 1.

    Returns:
        The mean, the number of trainings, and the interval: None for a single one.

    Raises:
        ValueError: If there is no value.

    Source:
        Student, The Probable Error of a Mean (1908).

    Example:
        >>> low, high = mean_over_runs([0.4, 0.5, 0.6]).interval
        >>> round(low, 3), round(high, 3)
        (0.252, 0.748)
    """
    count = len(values)
    if count == 0:
        raise ValueError("there must be at least one value")
    mean = float(np.mean(values))
    if count == 1:
        return Estimate(mean, 1, None)
    quantile = -_student_t_quantile((1 - confidence) / 2, count - 1)
    reach = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, count, (mean - reach, mean + reach))


def lift(
    score: Sampled, floor: Sampled, ceiling: Sampled, independent: int, confidence: float
) -> Lift:
    """Place a score on the way from the floor (0) to the ceiling (1).

    Args:
        score: The pictures' score.
        floor: The base model's, from the same draws.
        ceiling: The photos' own, from the same draws.
        independent: How many independent draws lie behind it.
        confidence: Coverage, between 0 and 1.

    Returns:
        The lift with its interval. Below 0 is worse than the base model, above 1 is suspicious.
        Absent where the ceiling does not lie clearly above the floor: there is then no way to go.

    Example:
        >>> steady = lambda value: Sampled(value, np.full(100, value))
        >>> lift(steady(0.5), steady(0.25), steady(0.75), independent=8, confidence=0.95).value
        0.5
    """
    room = Sampled(ceiling.value - floor.value, ceiling.resampled - floor.resampled)
    ends = interval(room, independent, confidence)
    if ends is None:
        return Lift(None, reason="there are too few pictures or photos to tell floor from ceiling")
    if ends[0] <= 0 or room.value <= 0:
        return Lift(None, reason="the ceiling does not lie clearly above the floor")
    gain = score.resampled - floor.resampled
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(room.resampled > 0, gain / room.resampled, np.sign(gain) * np.inf)
    ratios = np.where(np.isnan(room.resampled), np.nan, ratios)
    value = (score.value - floor.value) / room.value
    return Lift(value, interval(Sampled(value, ratios), independent, confidence))


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval | None:
    """Give the interval of a rate; honest where nothing, or everything, was a success.

    Args:
        successes: How often it happened, 0 to ``trials``.
        trials: How often it was tried, 0 or more.
        confidence: Coverage, between 0 and 1.

    Returns:
        Lower and upper end in [0, 1]; None without a trial.

    Raises:
        ValueError: If there are more successes than trials, or a number is negative.

    Source:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927).

    Example:
        >>> low, high = wilson_interval(0, 6)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.39)
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be 0 to trials, got {successes} of {trials}")
    if trials == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    middle = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = (
        z
        / (1 + z * z / trials)
        * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    )
    return max(0.0, middle - reach), min(1.0, middle + reach)


@cache
def _student_t_quantile(probability: float, freedom: int) -> float:
    """Invert Student's distribution: with x = √ν·tan θ the density is cos θ to the power ν − 1."""
    theta = np.linspace(-np.pi / 2, np.pi / 2, 40_001)
    density = np.cos(theta).clip(0) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(freedom) * np.tan(np.interp(probability, below / below[-1], theta)))

"""How sure a score is: intervals from resampling, and rates.

The unit is the picture, never the pair of a picture and a photo: pairs share pictures, and
intervals over pairs come out several times too narrow. Pictures of one prompt resemble each other,
so prompts are resampled with all their pictures; pictures alone only where there is one prompt.
Where a score is a mean over photos, the photos are resampled too: with six of them, another six
would give another score. `docs/statistics.md` shows how often the intervals hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from dreamloom.evaluation.stats.tests import student_quantile

Interval = tuple[float, float]
"""Lower and upper end."""

_FEW_ROWS = 5  # fewer prompts, pictures or photos: their resamples have too often no spread
_FARTHEST = 3  # times Student's reach: beyond, skew cannot be told from one odd picture


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

    @property
    def members(self) -> Float[np.ndarray, "rows units"]:
        """Which pictures (1, else 0) belong to each row that is drawn: a prompt, or a picture."""
        if len(set(self.clusters)) == 1:
            return np.eye(len(self.clusters))
        return np.eye(max(self.clusters) + 1)[:, list(self.clusters)]


@dataclass(frozen=True)
class Sampled:
    """A score of the sample, and the same score of each resample (nan where it is undefined).

    Args:
        value: The score.
        resampled: The score of each resample.
        error: The score's standard error, where there is a formula for it.
        errors: The standard error within each resample, where drawing enough rows allows that.
        freedom: Degrees of freedom of ``error``.
    """

    value: float
    resampled: Float[np.ndarray, " resamples"]
    error: float | None = None
    errors: Float[np.ndarray, " resamples"] | None = None
    freedom: float = math.inf


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
    """Draw resamples: prompts with replacement, each with all its pictures, and photos.

    One prompt's pictures are drawn singly. Drawing them singly within drawn prompts as well would
    count their differences twice, and make intervals up to 1.4 times too wide.

    Args:
        clusters: For each picture, what it shares with others, such as its prompt.
        photos: How many photos the pictures are compared with; 0 for scores without photos.
        resamples: How many resamples, 1 or more.
        confidence: Coverage of the intervals, between 0 and 1.
        seed: The same seed gives the same draws.

    Raises:
        ValueError: If there is no picture, no resample, or the confidence is no proportion.

    Source:
        Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8, their
        first way of drawing nested samples. Photos cross them as in Owen, The Pigeonhole Bootstrap
        (arXiv:0712.1111).
    """
    if not clusters:
        raise ValueError("there must be at least one picture")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"resamples must be 1 or more and confidence between 0 and 1, "
            f"got {resamples} and {confidence}"
        )
    rng = np.random.default_rng(seed)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    of_unit = np.array([numbers[name] for name in clusters])
    prompts = len(numbers)
    rows = prompts if prompts > 1 else len(clusters)
    drawn = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples) / rows
    units = drawn[:, of_unit] / np.bincount(of_unit)[of_unit] if prompts > 1 else drawn
    weights = np.zeros((resamples, 0))
    if photos:
        weights = rng.multinomial(photos, np.full(photos, 1 / photos), size=resamples) / photos
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
    members = draws.members
    table = members @ values.reshape(len(values), -1) / members.sum(axis=1, keepdims=True)
    rows, columns = table.shape
    photos = draws.photos if values.ndim == 2 else np.ones((len(draws.units), 1))
    value = float(table.mean())
    even = np.full((1, rows), 1 / rows), np.full((1, columns), 1 / columns)
    _, variance, freedom = _spread(table - value, *even)
    resampled, variances, _ = _spread(table - value, draws.units @ members.T, photos)
    enough = rows >= _FEW_ROWS and (columns == 1 or columns >= _FEW_ROWS)
    return Sampled(
        value,
        value + resampled,
        error=math.sqrt(variance[0]),
        errors=np.sqrt(variances) if enough else None,
        freedom=float(freedom[0]),
    )


def _spread(
    table: Float[np.ndarray, "rows columns"],
    rows: Float[np.ndarray, "resamples rows"],
    columns: Float[np.ndarray, "resamples columns"],
) -> tuple[
    Float[np.ndarray, " resamples"],
    Float[np.ndarray, " resamples"],
    Float[np.ndarray, " resamples"],
]:
    """Give the weighted mean of a table, the mean's variance, and its degrees of freedom.

    Rows and columns are two crossed samples: both carry to the mean what is peculiar to them, and
    what is peculiar to single cells must not be counted with both.

    Source:
        The two-way layout with random effects: Searle, Casella and McCulloch, Variance Components
        (1992), section 4.5. Degrees of freedom: Satterthwaite, An Approximate Distribution of
        Estimates of Variance Components (1946).
    """
    by_row = columns @ table.T
    by_column = rows @ table
    mean = (rows * by_row).sum(axis=1)
    of_rows = (rows * by_row**2).sum(axis=1) - mean**2
    of_columns = (columns * by_column**2).sum(axis=1) - mean**2
    of_cells = (columns * (rows @ table**2)).sum(axis=1) - mean**2 - of_rows - of_columns
    free_rows, free_columns = table.shape[0] - 1, table.shape[1] - 1
    first, second, both = (
        spread.clip(0) / free if free else np.zeros(len(mean))
        for spread, free in (
            (of_rows, free_rows),
            (of_columns, free_columns),
            (of_cells, free_rows * free_columns),
        )
    )
    variance = np.maximum(first + second - both, np.maximum(first, second))
    doubt = sum(
        part**2 / free
        for part, free in (
            (first, free_rows),
            (second, free_columns),
            (both, free_rows * free_columns),
        )
        if free
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.where(doubt > 0, variance**2 / doubt, max(1, free_rows))
    return mean, variance, freedom.clip(1)


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
    """Give a score's interval: from its resamples, but never narrower than Student's.

    A mean's resamples are read in units of their own standard errors, which allows for skew and
    for few prompts. Other scores have the percentiles of their resamples, moved outward as far as
    Student's t is wider than the normal distribution.

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
    if sampled.error is not None:
        down, up = _studentise(sampled, sampled.error, confidence)
        return sampled.value + down, sampled.value + up
    quantile = student_quantile((1 - confidence) / 2, independent - 1)
    widened = math.sqrt(independent / (independent - 1)) * quantile
    tail = NormalDist().cdf(widened)
    low, high = np.nanquantile(sampled.resampled, [tail, 1 - tail])
    if not (np.isfinite(low) and np.isfinite(high)):
        return None
    known = sampled.resampled[~np.isnan(sampled.resampled)]
    reach = widened * float(known.std()) if np.isfinite(known).all() else 0.0
    return float(min(low, sampled.value + reach)), float(max(high, sampled.value - reach))


def _studentise(sampled: Sampled, error: float, confidence: float) -> Interval:
    """Say how far the ends lie from the score, the lower one first."""
    tail = (1 - confidence) / 2
    student = -student_quantile(tail, sampled.freedom)
    low = high = student
    if sampled.errors is not None:
        # A resample without any spread says nothing about how far off it is. Of many such, or of
        # spreads that nearly vanish, nothing can be learnt beyond Student's.
        fit = sampled.errors > 1e-6 * error
        if fit.mean() > 0.99:
            off = (sampled.resampled[fit] - sampled.value) / sampled.errors[fit]
            far = _FARTHEST * student
            below, above = np.quantile(off.clip(-far, far), [tail, 1 - tail])
            low, high = max(student, float(above)), max(student, -float(below))
    return -low * error, high * error


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
    quantile = -student_quantile((1 - confidence) / 2, count - 1)
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

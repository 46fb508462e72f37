"""What can be told from chance: permutation tests, many of them at once, and Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

MOST_EXACT = 16
"""With up to so many differences every way of flipping their signs is tried."""


def sign_flip_p(
    differences: Sequence[float] | Float[np.ndarray, " prompts"],
    *,
    flips: int = 19_999,
    seed: int = 0,
) -> float:
    """Give the p-value of differences that would as well be negative if nothing had changed.

    If both sides are alike, each difference could have come out with the other sign. The p-value
    is the share of all such flips whose mean lies as far from 0 as the one that was found, on
    either side.

    Args:
        differences: One for each independent unit: a prompt, or a seed of one prompt.
        flips: How many random flips are tried where there are more than `MOST_EXACT` differences.
        seed: The same seed gives the same flips.

    Returns:
        In (0, 1]; 1 where every difference is 0.

    Raises:
        ValueError: If there is no difference, or one is no number.

    Source:
        Fisher, The Design of Experiments (1935), section 21. The 1 that is added where flips are
        random: Phipson and Smyth, Permutation P-values Should Never Be Zero (arXiv:1603.05766).

    Example:
        >>> sign_flip_p([0.1, 0.2, 0.3, 0.1, 0.2, 0.3])
        0.03125
    """
    values = np.asarray(differences, dtype=float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("there must be at least one difference, and each must be a number")
    # Sums that are equal but for rounding count as equal.
    found = abs(values.sum()) - 1e-9 * np.abs(values).sum()
    if values.size <= MOST_EXACT:
        return float((np.abs(_list_signs(values.size) @ values) >= found).mean())
    as_far = np.abs(_draw_signs(values.size, flips, seed) @ values) >= found
    return float((1 + as_far.sum()) / (1 + flips))


# Scores that are compared together have the same prompts, and so the same flips.
@lru_cache(maxsize=2)
def _list_signs(size: int) -> Float[np.ndarray, "flips prompts"]:
    # A flip of all signs has the same distance from 0, so half of the flips will do.
    numbers = np.arange(2 ** (size - 1))
    return 1.0 - 2.0 * ((numbers[:, None] >> np.arange(size)) & 1)


@lru_cache(maxsize=2)
def _draw_signs(size: int, flips: int, seed: int) -> Float[np.ndarray, "flips prompts"]:
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, size))


def smallest_p(units: int, flips: int = 19_999) -> float:
    """Give the smallest p-value that `sign_flip_p` can reach: all differences on one side.

    Example:
        >>> smallest_p(6)
        0.03125
    """
    return 2.0 ** (1 - units) if units <= MOST_EXACT else 1 / (1 + flips)


def correct_by_holm(p_values: Sequence[float]) -> list[float]:
    """Raise p-values so that of all true null hypotheses together few are rejected.

    Args:
        p_values: Of one family of tests, each in [0, 1].

    Returns:
        The corrected p-values, in the same order: rejecting those up to α makes one false
        rejection or more with a probability of at most α.

    Source:
        Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).

    Example:
        >>> correct_by_holm([0.03, 0.01, 0.04])
        [0.06, 0.03, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def student_p(value: float, error: float, freedom: float | int) -> float:
    """Give the two-sided p-value of a mean that would be 0 if nothing had changed.

    Args:
        value: The mean.
        error: Its standard error, 0 or more.
        freedom: Degrees of freedom, 1 or more.

    Returns:
        In [0, 1]; without any spread, 1 for a mean of 0, and 0 otherwise.

    Source:
        Student, The Probable Error of a Mean (1908).
    """
    if error == 0:
        return float(value == 0)
    angles, below = _tabulate_student(round(float(freedom), 2))
    angle = math.atan(-abs(value / error) / math.sqrt(freedom))
    return float(2 * np.interp(angle, angles, below))


def student_quantile(probability: float, freedom: float | int) -> float:
    """Invert Student's distribution.

    Args:
        probability: Between 0 and 1.
        freedom: Degrees of freedom, 1 or more.
    """
    angles, below = _tabulate_student(round(float(freedom), 2))
    return float(math.sqrt(freedom) * np.tan(np.interp(probability, below, angles)))


@lru_cache(maxsize=16)
def _tabulate_student(
    freedom: float,
) -> tuple[Float[np.ndarray, " angles"], Float[np.ndarray, " angles"]]:
    """Tabulate Student's distribution: for x = √ν·tan θ the density is cos θ to the power ν − 1."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 10_001)
    density = np.cos(angles).clip(0) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angles, below / below[-1]

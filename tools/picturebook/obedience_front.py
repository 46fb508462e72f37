"""The front of obedience against identity: what an adapter gives of the one for the other.

Two ways to teach cannot be compared at one weight of their adapters: the one may obey more only
because it shows less of the subject. Drawn at several weights, each way leaves a curve, from the
base model, which obeys and knows nobody, to an adapter that knows one face and nothing else. What
lies below the best of its points is its area; a larger one gives more of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

EQUAL_OBEDIENCE = (0.75, 0.95)
"""The shares of obeyed attributes between which identities are compared."""

_POINTS_BETWEEN = 201
_LEVELS = 501


@dataclass(frozen=True)
class FrontPoint:
    """What an adapter does at one weight.

    Args:
        weight: The adapter's weight; 0 is the base model.
        identity: The identity lift of portraits and of prompts that contradict nothing.
        obedience: The share of asked attributes that are seen, contradicting ones too.
    """

    weight: float
    identity: float
    obedience: float


def measure_area(points: Sequence[FrontPoint]) -> float:
    """Measure the area below the front, 0 to 1, over identity lifts of 0 to 1.

    At each identity it counts the best obedience that some weight reaches with that identity or a
    higher one; between neighbouring weights both are taken to change evenly.

    Source:
        The hypervolume of two aims with the reference point (0, 0): Zitzler and Thiele,
        Multiobjective Optimization Using Evolutionary Algorithms (1998).

    Example:
        >>> obeys, knows = FrontPoint(0, 0.0, 1.0), FrontPoint(1, 1.0, 1.0)
        >>> round(measure_area([obeys, knows]), 2)
        1.0
    """
    identity, obedience = _trace(points)
    levels = np.linspace(0, 1, _LEVELS)
    return float(np.mean([_best(obedience, identity >= level) for level in levels]))


def identity_at_obedience(points: Sequence[FrontPoint]) -> float:
    """Give the mean identity, 0 to 1, that the front has at shares of obeyed attributes alike.

    At each share of `EQUAL_OBEDIENCE` it counts the best identity that some weight reaches with
    that obedience or a higher one; none where no weight obeys so much.

    Example:
        >>> points = [FrontPoint(0, 0.0, 1.0), FrontPoint(1, 0.8, 0.97), FrontPoint(2, 1.0, 0.2)]
        >>> round(identity_at_obedience(points), 1)
        0.8
    """
    identity, obedience = _trace(points)
    levels = np.linspace(*EQUAL_OBEDIENCE, _LEVELS)
    return float(np.mean([_best(identity, obedience >= level) for level in levels]))


def _trace(
    points: Sequence[FrontPoint],
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Follow the curve through the points in the order of their weights, finely."""
    if not points:
        raise ValueError("there must be at least one point")
    ordered = sorted(points, key=lambda point: point.weight)
    steps = np.linspace(0, len(ordered) - 1, (len(ordered) - 1) * _POINTS_BETWEEN + 1)
    places = np.arange(len(ordered))
    identity = np.interp(steps, places, [point.identity for point in ordered])
    obedience = np.interp(steps, places, [point.obedience for point in ordered])
    return identity.clip(0, 1), obedience.clip(0, 1)


def _best(values: Float[np.ndarray, " n"], allowed: np.ndarray) -> float:
    return float(values[allowed].max()) if allowed.any() else 0.0

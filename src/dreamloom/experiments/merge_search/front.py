"""Several aims at once: what is kept of each, together and side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_STRETCHES = 1000


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
    one, other = _rank(first), _rank(second)
    one, other = one - one.mean(), other - other.mean()
    return float((one @ other) / math.sqrt((one @ one) * (other @ other)))


def _rank(values: Sequence[float]) -> Float[np.ndarray, " things"]:
    """Number values from the lowest up; equal ones share the mean of their places."""
    listed = np.asarray(values, float)
    below = (listed[:, None] > listed).sum(axis=1)
    alike = (listed[:, None] == listed).sum(axis=1)
    ranks: Float[np.ndarray, " things"] = below + (alike - 1) / 2
    return ranks

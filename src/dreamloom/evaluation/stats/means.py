"""Means of shares that must not make up for each other."""

from __future__ import annotations

import math
from collections.abc import Sequence


def harmonic_mean(shares: Sequence[float]) -> float:
    """Give the harmonic mean of shares, each cut to between 0 and 1: none makes up for another.

    Args:
        shares: One or more.

    Example:
        >>> harmonic_mean([0.5, 1.5]), harmonic_mean([-0.1, 0.9])
        (0.6666666666666666, 0.0)
    """
    cut = [min(1.0, max(0.0, share)) for share in shares]
    others = [math.prod(cut[:place] + cut[place + 1 :]) for place in range(len(cut))]
    return len(cut) * math.prod(cut) / sum(others) if any(others) else 0.0

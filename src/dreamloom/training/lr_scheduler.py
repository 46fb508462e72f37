"""The learning-rate scheduler: warm-up, and how the learning rate falls after it."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer

Schedule = Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"]
"""How the learning rate goes after the warm-up; see `rate_factor`."""


def set_rates(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to a share of its full one; see `rate_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * factor


def rate_factor(
    update: int,
    schedule: Schedule,
    warmup: int,
    updates: int,
    *,
    cycles: int = 3,
    power: float = 2.0,
) -> float:
    """The learning rate of an update as a share of the full one.

    In the warm-up it rises evenly and reaches 1 with the last update of it. Afterwards, with x the
    part of the rest that is done, it is 1 (``constant``), 1 − x (``linear``), (1 + cos π x) / 2
    (``cosine``), the same ``cycles`` times over (``cosine_restarts``), or (1 − x)^power
    (``polynomial``).

    Args:
        update: Which update, from 0 and below ``updates``.
        schedule: How the rate goes after the warm-up.
        warmup: Updates of the warm-up, 0 or more.
        updates: All updates.
        cycles: Falls of ``cosine_restarts``, 1 or more.
        power: Exponent of ``polynomial``, above 0.

    Returns:
        A share above 0 and up to 1.
    """
    if update < warmup:
        return (update + 1) / warmup
    done = (update - warmup) / max(1, updates - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - done
    if schedule == "polynomial":
        return float((1 - done) ** power)
    if schedule == "cosine_restarts":
        if (update - warmup) * cycles % max(1, updates - warmup) == 0:
            return 1.0  # Rounding must not make the end of a fall of a restart.
        done = done * cycles % 1
    return 0.5 * (1 + math.cos(math.pi * done))

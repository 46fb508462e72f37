"""Ways to make one adapter out of several: one small function each, listed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dreamloom.adapters import Adapter
from dreamloom.combine.weighted_sum import weighted_sum

Method = Callable[[Sequence[Adapter], Sequence[float]], Adapter]

METHODS: dict[str, Method] = {"sum": weighted_sum}
"""Every method by name; adding one is a function and a line."""

__all__ = ["METHODS", "Method", "weighted_sum"]

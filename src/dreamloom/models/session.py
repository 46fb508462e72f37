"""The session: the base model that a process works with, loaded once with its memory options."""

from __future__ import annotations

from dreamloom.core.device import Runtime
from dreamloom.models.base import NO_SAVINGS, MemoryOptions, Model
from dreamloom.models.families import load_model

_OPEN: dict[tuple[str, Runtime, MemoryOptions], Model] = {}


def open_base(base: str, runtime: Runtime, options: MemoryOptions = NO_SAVINGS) -> Model:
    """Load a base model, or take it again if it is the one that this process last worked with.

    One is kept: another takes its place, and its memory before it is loaded.

    Args:
        base: What ``--base`` names.
        runtime: Where and how precisely to compute.
        options: How it spares memory.

    Raises:
        BaseModelError: As `load_model`.
    """
    key = (base, runtime, options)
    if key not in _OPEN:
        _OPEN.clear()
        _OPEN[key] = load_model(base, runtime, options)
    return _OPEN[key]

"""Two sets of changes, layer by layer: how far apart they are, and what one of them leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def compare_changes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compare what a file says with what a program makes of it.

    Args:
        wanted: The change of each layer that the file changes.
        found: The change that the program made, of any layers; zeros count as none.

    Returns:
        ``layers``, how many there are; ``left_out`` and ``added``, the names of those that only one
        side has; ``error``, the largest ‖found − wanted‖ / ‖wanted‖ of the others, ``worst`` where.
    """
    applied = {name for name, change in found.items() if change.abs().max() > 0}
    errors = {
        name: float((found[name].double() - change.double()).norm() / change.double().norm())
        for name, change in wanted.items()
        if name in applied
    }
    worst = max(errors, key=lambda name: errors[name], default="")
    return {
        "layers": len(wanted),
        "left_out": sorted(set(wanted) - applied),
        "added": sorted(applied - set(wanted)),
        "error": errors.get(worst, 0.0),
        "worst": worst,
    }

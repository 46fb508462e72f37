"""The example pictures that come with the package: a person drawn six times, and a style."""

from __future__ import annotations

from pathlib import Path

from dreamloom.core.errors import DreamLoomError


def examples_folder() -> Path:
    """Return the folder of the example photos: in the package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "examples"
    beside = Path(__file__).parents[3] / "examples"
    for folder in (inside, beside):
        if folder.is_dir():
            return folder
    raise DreamLoomError(
        f"The example photos are missing: neither {inside} nor {beside} is there.",
        "Install DreamLoom again.",
    )

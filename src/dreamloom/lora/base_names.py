"""The base model's name in an adapter's header, without the folders of anybody's machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dreamloom.core.run_folder import RunFolder

BASE_KEY = "dreamloom.base"
FINGERPRINT_KEY = "dreamloom.base_fingerprint"
_BUILT_IN = {"picturebook", "sdxl"}


def publish_base(base: str) -> str:
    """Name a base model as an adapter tells it to others.

    Names and hub ids stay; of a folder or a file only the last part does, for the rest says
    nothing elsewhere, and much about whose machine it was.
    """
    is_place = base not in {"", *_BUILT_IN} and (
        _exists(base)
        or Path(base).is_absolute()
        or base.startswith(("~", "."))
        or base.count("/") > 1
        or re.match(r"[A-Za-z]:|.*\\", base) is not None
        or base.lower().endswith(".safetensors")
    )
    if not is_place:
        return base
    parts = [part for part in re.split(r"[\\/]", base) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else Path(base).resolve().name


def _exists(place: str) -> bool:
    """Say whether a path leads somewhere; a header's text may be anything, also no path."""
    try:
        return Path(place).exists()
    except (OSError, ValueError):
        return False


def recall_base(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Complete the base model's name where the adapter still lies in the run that trained it.

    There the run's record says which folder or file the name means.

    Args:
        path: The adapter's file: a run's own, or one of its validation samples'.
        metadata: What its header says.
    """
    name, told = metadata.get(BASE_KEY, ""), metadata.get(FINGERPRINT_KEY)
    for folder in (path.parent, *path.parents[2:3]):
        record = RunFolder(folder).read_record("train") if name else None
        if record and told and record.base.get("fingerprint") == told:
            place = record.base.get("name", "")
            if _exists(place) and publish_base(place) == name:
                return {**metadata, BASE_KEY: place}
    return dict(metadata)

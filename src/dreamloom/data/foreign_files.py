"""Foreign files: what lies in a run's folders and is not DreamLoom's is never replaced."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dreamloom.core.errors import DreamLoomError, RunFolderError
from dreamloom.core.manifests import MANIFEST, read_class_image_set, read_photo_set
from dreamloom.core.run_folder import TEMPORARY, RunFolder
from dreamloom.data.photos.listing import name_some

# What file managers leave in every folder.
_LEFT_BY_SYSTEMS = {".ds_store", "thumbs.db", "desktop.ini"}


def list_foreign_files(folder: Path, own: Collection[str], pattern: str = "") -> list[str]:
    """List what lies in a folder and has none of these names, nor one of the pattern.

    What file managers and interrupted writes leave behind does not count.
    """
    if not folder.is_dir():
        return [folder.name] if folder.exists() else []
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in own
        and not path.name.startswith(TEMPORARY)
        and path.name.lower() not in _LEFT_BY_SYSTEMS
        and not (pattern and path.match(pattern))
    )


def refuse_foreign_photos(run: RunFolder) -> None:
    """Keep ``run.photos`` from being replaced if it holds what is not of the set that it holds.

    Raises:
        RunFolderError: If so.
    """
    own = _list_recorded(run, "photos")
    with suppress(DreamLoomError):
        photos = read_photo_set(run.photos).photos
        own |= {MANIFEST, *(name for photo in photos for name in (photo.file, photo.mask))}
    _refuse(run.photos, list_foreign_files(run.photos, own))


def refuse_foreign_class_images(run: RunFolder, journals: str) -> None:
    """Keep ``run.priors`` from being replaced if it holds what is not of the set that it holds.

    Args:
        run: Whose class images they are.
        journals: Pattern of the names of unfinished lists.

    Raises:
        RunFolderError: If so.
    """
    own = _list_recorded(run, "priors")
    with suppress(DreamLoomError):
        images = read_class_image_set(run.priors)
        own |= {MANIFEST, *images.files, *(one.file for one in images.drawn)}
    _refuse(run.priors, list_foreign_files(run.priors, own, journals))


def _list_recorded(run: RunFolder, stage: str) -> set[str]:
    record = run.read_record(stage)
    return {Path(name).name for name in record.outputs} if record else set()


def _refuse(folder: Path, foreign: list[str]) -> None:
    if foreign:
        raise RunFolderError(
            f"{folder} would be replaced, and holds what DreamLoom did not put there: "
            f"{name_some(foreign)}.",
            "Move that elsewhere, or name another --out.",
        )

"""What passes between stages: the photos, the class images and the drawn pictures of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from dreamloom.errors import DreamLoomError
from dreamloom.rundir import file_sha256, fingerprint, write_text


class _Listed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Photo(_Listed):
    """One photo as training sees it: upright, RGB, shorter side scaled to the resolution."""

    file: str
    """The prepared copy, relative to its set's folder; it carries no EXIF and no location."""
    source: str
    """The name of the photo it was made from."""
    source_sha256: str
    """Hash of the original file."""
    original_px: tuple[int, int]
    """Height and width of the upright original."""
    scaled_px: tuple[int, int]
    """Height and width of the prepared copy."""
    caption: str = ""
    """The prompt that this picture is trained with; empty takes the run's own."""
    issues: tuple[str, ...] = ()
    """What is not ideal about it, each in one sentence."""


class PhotoSet(_Listed):
    """The photos of one subject."""

    folder: Path
    resolution_px: int
    photos: tuple[Photo, ...]
    notes: tuple[str, ...] = ()
    """What holds for the set as a whole: ignored files, near-duplicates, too few."""

    @property
    def fingerprint(self) -> str:
        """Hash over the originals and the resolution: what a result depends on."""
        return fingerprint(
            [(photo.source_sha256, photo.caption) for photo in self.photos], self.resolution_px
        )

    def paths(self) -> list[Path]:
        """The prepared copies, in order."""
        return [self.folder / photo.file for photo in self.photos]


class PriorSet(_Listed):
    """Class images: square pictures at the training resolution."""

    folder: Path
    prompt: str
    resolution_px: int
    files: tuple[str, ...]
    made_from: str
    """Fingerprint of base model, prompt, sampler and seeds; or of the user's files."""

    def paths(self) -> list[Path]:
        """The class images, in order."""
        return [self.folder / file for file in self.files]


class Picture(_Listed):
    """One drawn picture and everything that it was drawn from."""

    file: str
    prompt: str
    category: str = ""
    """The kind of change the prompt asks for: photo, scene, style, attribute, view, accessory."""
    seed: int
    scheduler: str
    steps: int
    guidance: float


class WornAdapter(_Listed):
    """An adapter that was worn while drawing."""

    file: str
    sha256: str
    weight: float


class ImageSet(_Listed):
    """A folder of drawn pictures with its manifest."""

    folder: Path
    base: dict[str, str]
    """The base model, as `families.base.BaseIdentity.as_dict`."""
    adapters: tuple[WornAdapter, ...] = ()
    subject: str = ""
    """The phrase that names the subject in prompts, where an adapter told it."""
    class_noun: str = ""
    resolution_px: int
    pictures: tuple[Picture, ...]

    def paths(self) -> list[Path]:
        """The pictures' files, in order."""
        return [self.folder / picture.file for picture in self.pictures]

    def select(self, **wanted: object) -> ImageSet:
        """Keep the pictures whose fields equal the given ones, such as ``prompt=…, steps=50``."""
        kept = tuple(
            picture
            for picture in self.pictures
            if all(getattr(picture, name) == value for name, value in wanted.items())
        )
        return self.model_copy(update={"pictures": kept})

    @property
    def fingerprint(self) -> str:
        """Hash over the manifest and the pictures' bytes."""
        hashes = [file_sha256(path) for path in self.paths()]
        return fingerprint(self.model_dump(mode="json", exclude={"folder"}), hashes)


MANIFEST = "manifest.json"


def write_manifest(images: PhotoSet | PriorSet | ImageSet) -> Path:
    """Write a set's list of pictures beside them; return its path."""
    path = images.folder / MANIFEST
    write_text(path, images.model_dump_json(indent=2, exclude={"folder"}) + "\n")
    return path


def read_image_set(folder: Path) -> ImageSet:
    """Read a folder of drawn pictures.

    Raises:
        DreamLoomError: If the folder has no manifest, or a damaged one.
    """
    return _read(ImageSet, folder)


def read_photo_set(folder: Path) -> PhotoSet:
    """Read a folder of prepared photos; raises like `read_image_set`."""
    return _read(PhotoSet, folder)


def read_prior_set(folder: Path) -> PriorSet:
    """Read a folder of class images; raises like `read_image_set`."""
    return _read(PriorSet, folder)


_Set = TypeVar("_Set", PhotoSet, PriorSet, ImageSet)


def _read(kind: type[_Set], folder: Path) -> _Set:
    path = folder / MANIFEST
    try:
        listed = dict(json.loads(path.read_text(encoding="utf-8")))
        return kind.model_validate({**listed, "folder": folder})
    except FileNotFoundError:
        raise DreamLoomError(
            f"{folder} has no {MANIFEST}, so it is not a folder that DreamLoom wrote.",
            "Name a folder made by DreamLoom.",
        ) from None
    except (ValueError, TypeError, OSError) as error:
        raise DreamLoomError(f"{path} is damaged: {error}.", "Make that folder again.") from None


def image_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The folder's files with one of the suffixes (lower case, with dot), sorted by name."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in suffixes
    )

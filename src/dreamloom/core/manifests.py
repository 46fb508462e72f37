"""Manifests: the photos, class images and drawn pictures that pass between a run's stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import AliasChoices, Field, ValidationError, model_serializer, model_validator

from dreamloom.core.errors import DreamLoomError
from dreamloom.core.run_folder import file_sha256, fingerprint, write_text
from dreamloom.core.toml_files import ClosedModel

CropShape: TypeAlias = Literal["square", "buckets"]
"""Crops are squares, or of the bucket nearest to the photo's own shape; see `data.buckets`."""


PromptStyle: TypeAlias = Literal["photo", "art"]
"""What a prompt asks for: something that looks like a photo, or art."""

FaceShown: TypeAlias = Literal["yes", "partial", "no"]
"""How much of the subject's face a right picture shows; partial is covered or turned away."""

SubjectChange: TypeAlias = Literal[
    "age",
    "clothes",
    "colour",
    "expression",
    "eyes",
    "glasses",
    "hair",
    "hat",
    "pose",
    "shape",
    "skin",
    "surface",
    "teeth",
]
"""What of a subject a prompt may change. Eyes: their colour, or that they are closed or covered;
surface: what it seems made of or covered with; teeth: that they show."""


SetRole: TypeAlias = Literal[
    "base",
    "subject",
    "subject without class images",
    "subject with class images",
    "style",
    "merged",
]
"""Who drew a set of pictures: the base model alone, an adapter of the subject (where it is known,
taught without or with class images), one of a style, or a merge."""

SetPurpose: TypeAlias = Literal["main", "merge", "table", "grid"]
"""What a set is drawn for: to show what was taught, to stand beside a merge, to compare schedulers
and steps, or as a cell of a grid, which has a sheet of its own."""


class Photo(ClosedModel):
    """One photo as training sees it: upright, RGB, scaled until it just covers its crops."""

    file: str
    """The prepared copy, relative to its set's folder; it carries no EXIF and no location."""
    source: str
    """The name of the photo it was made from."""
    source_sha256: str
    """Hash of the original file."""
    original_px: tuple[int, int]
    """Height and width of the upright original."""
    scaled_px: tuple[int, int]
    """Height and width of the prepared copy; neither is less than the crop's."""
    bucket_px: tuple[int, int] = (0, 0)
    """Height and width of the crops cut from it; unless told, those of its largest square."""
    caption: str = ""
    """The prompt that this picture is trained with; empty takes the run's own."""
    given_box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom of the subject in the upright original, where the user told."""
    box_px: tuple[int, int, int, int] | None = None
    """Top, left, bottom and right of what crops must keep, in the prepared copy, where known."""
    mask: str = ""
    """The prepared mask, relative to the folder: 8-bit grey of the copy's size, white where the
    subject is; empty without one."""
    mask_sha256: str = ""
    """Hash of the original mask file; empty without one."""
    issues: tuple[str, ...] = ()
    """What is not ideal about it, each in one sentence."""

    @model_validator(mode="before")
    @classmethod
    def _cut_squares(cls, given: Any) -> Any:
        if isinstance(given, dict) and "bucket_px" not in given and given.get("scaled_px"):
            side = min(given["scaled_px"])
            return {**given, "bucket_px": (side, side)}
        return given


class PhotoFacts(NamedTuple):
    """What a prepared photo is made from."""

    source_sha256: str
    caption: str = ""
    given_box: tuple[float, float, float, float] | None = None
    mask_sha256: str = ""


def fingerprint_facts(
    photos: Sequence[PhotoFacts], resolution_px: int, shape: CropShape, step_px: int
) -> str:
    """Hash what a set of photos is made from, in its order; see `PhotoSet.fingerprint`."""
    steps = step_px if shape == "buckets" else None
    return fingerprint([list(facts) for facts in photos], resolution_px, shape, steps)


class PhotoSet(ClosedModel):
    """The photos of one subject."""

    folder: Path
    resolution_px: int
    """Side of a square of the area that is trained on."""
    shape: CropShape = "square"
    step_px: int = 64
    """Sides of buckets are multiples of it; it means nothing for squares."""
    photos: tuple[Photo, ...]
    notes: tuple[str, ...] = ()
    """What holds for the set as a whole: ignored files, near-duplicates, too few."""

    @property
    def fingerprint(self) -> str:
        """Hash over the originals, their captions, boxes and masks, and how they are cut."""
        facts = [
            PhotoFacts(photo.source_sha256, photo.caption, photo.given_box, photo.mask_sha256)
            for photo in self.photos
        ]
        return fingerprint_facts(facts, self.resolution_px, self.shape, self.step_px)

    def paths(self) -> list[Path]:
        """The prepared copies, in order."""
        return [self.folder / photo.file for photo in self.photos]


class DrawnClassImage(ClosedModel):
    """A class image that the base model drew."""

    file: str
    seed: int
    """The seed of its noise."""
    sha256: str
    """Hash of the file."""


def choose_prompt(number: int, prompt: str, more: Sequence[str]) -> str:
    """Choose the prompt of a class image by its number, from 0.

    Two of three show just the class; every third takes one of the further prompts, in turn, so that
    a larger set begins with the smaller one.
    """
    return more[number // 3 % len(more)] if more and number % 3 == 2 else prompt


class ClassImageSet(ClosedModel):
    """Class images: square pictures at the training resolution."""

    folder: Path
    prompt: str
    resolution_px: int
    files: tuple[str, ...]
    """The images to train with."""
    made_from: str
    """Fingerprint of base model, prompt, sampler and seeds; or of the user's files."""
    recipe: dict[str, str | int | float] = Field(default_factory=dict)
    """What they were drawn from, by name; empty for the user's own."""
    drawn: tuple[DrawnClassImage, ...] = ()
    """All that were drawn so, which can be more than are used; none for the user's own."""
    more_prompts: tuple[str, ...] = ()
    """Prompts of every third image, in turn, beside the one of the rest."""

    def prompts(self) -> list[str]:
        """The prompt of each image, in order."""
        return [choose_prompt(n, self.prompt, self.more_prompts) for n in range(len(self.files))]

    def paths(self) -> list[Path]:
        """The class images, in order."""
        return [self.folder / file for file in self.files]


def _leave_out_defaults(one: ClosedModel, written: dict[str, Any], *names: str) -> dict[str, Any]:
    """Leave some fields out of what is written, where they stand as they do by default."""
    fields = type(one).model_fields
    plain = {name for name in names if getattr(one, name) == fields[name].default}
    return {name: value for name, value in written.items() if name not in plain}


class Picture(ClosedModel):
    """One drawn picture and everything that it was drawn from."""

    file: str
    prompt: str
    category: str = ""
    """The kind of change the prompt asks for: photo, scene, style, attribute, view, accessory …"""
    style: PromptStyle | None = None
    """Whether the prompt asks for a photo or for art; None where nobody said."""
    face: FaceShown | None = None
    """How much of the subject's face must show; None where nobody said."""
    may_change: tuple[SubjectChange, ...] | None = None
    """What of the subject may differ from its photos; None where nobody said."""
    check: str = ""
    """A question that a right picture answers with yes; empty where nobody wrote one."""
    seed: int
    scheduler: str
    steps: int
    guidance: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The part of the drawing that was guided, from 0 to 1."""
    cache_interval: int = 1
    """Steps from one computing of the deep levels to the next."""
    negative_prompt: str = ""
    """What guidance led away from, instead of the empty prompt."""
    prompt_weights: bool = False
    """Whether weights that are written in the prompts were read."""
    size_px: tuple[int, int] | None = None
    """Height and width, where they were asked for; else its set's resolution, a square."""
    guidance_rescale: float = 0.0
    """How far guided predictions were scaled back to the spread of the unguided ones."""
    cfg_zero_star: bool = False
    """Whether the unconditional half was scaled to fit the other."""

    @model_serializer(mode="wrap")
    def _leave_plain(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # Plainly drawn, it is written, and so fingerprinted, as before there were these.
        return _leave_out_defaults(
            self,
            write(self),
            "guidance_interval",
            "cache_interval",
            "negative_prompt",
            "prompt_weights",
            "size_px",
            "guidance_rescale",
            "cfg_zero_star",
        )

    @property
    def sampler(self) -> str:
        """How it was drawn, for readers."""
        words = [self.scheduler.upper(), f"{self.steps} steps", f"guidance {self.guidance:g}"]
        if self.guidance_interval != (0.0, 1.0):
            words[-1] += " from {:g} to {:g}".format(*self.guidance_interval)
        if self.guidance_rescale:
            words.append(f"rescaled by {self.guidance_rescale:g}")
        if self.cfg_zero_star:
            words.append("CFG-Zero*")
        if self.cache_interval > 1:
            words.append(f"deep levels every {self.cache_interval} steps")
        if self.size_px:
            words.append(f"{self.size_px[1]} × {self.size_px[0]} px")
        if self.prompt_weights:
            words.append("prompt weights read")
        if self.negative_prompt:
            words.append(f'negative prompt "{self.negative_prompt}"')
        return ", ".join(words)


class AdapterEntry(ClosedModel):
    """An adapter that was worn while drawing."""

    file: str
    sha256: str
    weight: float
    """Its weight; where that follows the drawing, the strongest that it reaches."""
    lora_schedule: str = Field("", validation_alias=AliasChoices("lora_schedule", "pace"))
    """How it follows the drawing, as `LoraSchedule` tells it; empty for a plain weight."""

    def __str__(self) -> str:
        """The file, its weight and its schedule, for readers."""
        schedule = f" ({self.lora_schedule})" if self.lora_schedule else ""
        return f"{self.file} × {self.weight:g}{schedule}"

    @model_serializer(mode="wrap")
    def _leave_plain(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # It is written, and so fingerprinted, as ever: plainly, or with the schedule as its pace.
        written = _leave_out_defaults(self, write(self), "lora_schedule")
        return {"pace" if key == "lora_schedule" else key: v for key, v in written.items()}


class ImageSet(ClosedModel):
    """A folder of drawn pictures with its manifest."""

    folder: Path
    base: dict[str, str]
    """The base model, as `models.base.BaseIdentity.as_dict`."""
    adapters: tuple[AdapterEntry, ...] = ()
    subject: str = ""
    """The phrase that names the subject in prompts, where an adapter told it."""
    class_noun: str = ""
    resolution_px: int
    role: SetRole | None = None
    """Who drew it; None where nobody said."""
    purpose: SetPurpose = "main"
    pictures: tuple[Picture, ...]

    @model_serializer(mode="wrap")
    def _leave_plain(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # Without a role it is written, and so fingerprinted, as before there were roles.
        return _leave_out_defaults(self, write(self), "role", "purpose")

    def paths(self) -> list[Path]:
        """The pictures' files, in order."""
        return [self.folder / picture.file for picture in self.pictures]

    def select(self, **wanted: object) -> ImageSet:
        """Keep the pictures whose fields equal the given ones, such as ``prompt=…, steps=50``."""
        selected = tuple(
            picture
            for picture in self.pictures
            if all(getattr(picture, name) == value for name, value in wanted.items())
        )
        return self.model_copy(update={"pictures": selected})

    @property
    def base_name(self) -> str:
        """The base model's name; empty where nobody knows it."""
        return self.base.get("name", "")

    @property
    def fingerprint(self) -> str:
        """Hash over the manifest and the pictures' bytes."""
        hashes = [file_sha256(path) for path in self.paths()]
        return fingerprint(self.model_dump(mode="json", exclude={"folder"}), hashes)


MANIFEST = "manifest.json"


def write_manifest(images: PhotoSet | ClassImageSet | ImageSet) -> Path:
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


def read_class_image_set(folder: Path) -> ClassImageSet:
    """Read a folder of class images; raises like `read_image_set`."""
    return _read(ClassImageSet, folder)


_Set = TypeVar("_Set", PhotoSet, ClassImageSet, ImageSet)


_HOLDS: dict[type[ClosedModel], str] = {
    PhotoSet: "prepared photos",
    ClassImageSet: "class images",
    ImageSet: "drawn pictures",
}
_OWN: dict[type[ClosedModel], str] = {
    PhotoSet: "photos",
    ClassImageSet: "files",
    ImageSet: "pictures",
}
"""What each kind of set alone calls its content."""


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
    except ValidationError as error:
        for other, what in _HOLDS.items():
            if other is not kind and isinstance(listed.get(_OWN[other]), list):
                raise DreamLoomError(
                    f"{folder} holds {what}, not {_HOLDS[kind]}.",
                    f"Name a folder of {_HOLDS[kind]}.",
                ) from None
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        said = f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise DreamLoomError(f"{path} is damaged: {said}.", "Make that folder again.") from None
    except (ValueError, TypeError, OSError) as error:
        raise DreamLoomError(f"{path} is damaged: {error}.", "Make that folder again.") from None


def image_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The folder's files with one of the suffixes (lower case, with dot), sorted by name."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in suffixes
    )

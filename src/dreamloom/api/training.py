"""Training: six photos in, an adapter out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from rich.markup import escape

from dreamloom.api.options import Options, PathLike, load_settings, show_progress
from dreamloom.api.results import FileResult, Result
from dreamloom.core.errors import ConfigError
from dreamloom.core.manifests import read_photo_set
from dreamloom.core.run_folder import Record, RunFolder
from dreamloom.core.toml_files import offer
from dreamloom.data.examples import examples_folder
from dreamloom.data.photos.check import PhotoCheck
from dreamloom.data.photos.check import check_photos as check_folder
from dreamloom.display.progress_lines import say_seconds
from dreamloom.display.tables import render_photo_check
from dreamloom.evaluation.photo_faces import check_photos_and_faces
from dreamloom.lora.readers import tell_readers
from dreamloom.pipeline.train import train_folder

if TYPE_CHECKING:
    from rich.console import RenderableType

_EXAMPLES = ("pixel-art", "rraj")


@dataclass(frozen=True, repr=False)
class CheckedPhotos(Result):
    """What is usable of a folder of photos, what is not ideal, and what to add.

    Attributes:
        check: All of it, photo by photo.
    """

    check: PhotoCheck

    @property
    def usable(self) -> bool:
        """Whether the folder can be taught."""
        return self.check.usable

    def _render(self) -> Iterator[RenderableType]:
        return render_photo_check(self.check)


def check_photos(
    folder: PathLike, resolution_px: int = 1024, *, faces: bool = False, base: str = "sdxl"
) -> CheckedPhotos:
    """Check a folder of photos before teaching it.

    Args:
        folder: Where the photos lie, with captions, boxes and masks beside them where there are.
        resolution_px: Side in pixels to train at, 8 to 16384.
        faces: Whether to look for faces, too.
        base: The base model, which says what they are looked for in: ``picturebook`` is taught
            drawings, others photographs.

    Raises:
        PhotoError: If there is no such folder, or no photo in it.
    """
    if faces:
        return CheckedPhotos(check_photos_and_faces(Path(folder), resolution_px, base))
    return CheckedPhotos(check_folder(Path(folder), resolution_px))


def example(name: Literal["rraj", "pixel-art"] = "rraj") -> Path:
    """Find the example pictures that come with the package, for `train` on ``picturebook``.

    Args:
        name: ``rraj``, six drawings of one person, or ``pixel-art``, twelve in one style.

    Raises:
        ConfigError: If there are no examples of that name.
    """
    folder = examples_folder()
    if name not in _EXAMPLES:
        raise ConfigError(f"There are no examples {name!r}.", offer(name, _EXAMPLES))
    return folder / name


@dataclass(frozen=True, repr=False)
class TrainedAdapter(FileResult):
    """An adapter that was taught, and the run that it lies in; it stands for its file.

    Attributes:
        run: The run's folder: settings, records, photos, checkpoints, pictures.
        subject: The phrase that calls the subject in prompts.
        class_noun: What the subject is one of.
        base: The base model.
        record: What the training did: inputs, settings, seconds, peak memory in MiB, results.
    """

    run: Path
    subject: str
    class_noun: str
    base: str
    record: Record

    @property
    def path(self) -> Path:
        """The adapter's .safetensors file."""
        return RunFolder(self.run).adapter

    @property
    def photos(self) -> list[Path]:
        """The photos as they were taught: upright, scaled, without location data."""
        return read_photo_set(RunFolder(self.run).photos).paths()

    def _render(self) -> Iterator[RenderableType]:
        yield f"[bold]The adapter:[/bold] {escape(str(self.path))}"
        yield escape(f"It knows “{self.subject}” and was taught to {self.base}.")
        took, peak = say_seconds(self.record.seconds), self.record.peak_mib
        yield escape(f"Training took {took} and {peak:.0f} MiB at most.")
        yield escape(tell_readers(self.path))


def train(
    photos: PathLike,
    subject: str | None = None,
    *,
    class_noun: str | None = None,
    base: str | None = None,
    out: PathLike | None = None,
    prior: PathLike | None = None,
    resume: bool = False,
    **options: Unpack[Options],
) -> TrainedAdapter:
    """Teach a base model one subject from a folder of photos.

    A run that is finished is not trained again, and one that was stopped goes on where it was.

    Args:
        photos: The folder.
        subject: A rare word and the class noun, such as ``"rraj person"``. None is for a run that
            is resumed.
        class_noun: What the subject is one of: person, dog, backpack; None takes the phrase's last
            word.
        base: ``picturebook``, ``sdxl``, a hub id, a folder in diffusers' layout or a .safetensors
            checkpoint.
        out: The run's folder; None takes ``runs/`` and the subject.
        prior: Where class images come from: ``generated`` (the default), ``base``, ``none``, or a
            folder of your own.
        resume: Go on with the run in ``out``, which must exist, with its own settings.
        **options: See `Options`.

    Raises:
        PhotoError: If a photo cannot be read or there is none.
        ConfigError: If a setting is unknown or not allowed, or the subject has no name.
        BaseModelError: If the base model cannot be found or read.
        RunFolderError: If ``out`` holds something else, or a run with other settings or photos.
        TrainingError: If the loss is not finite.
    """
    given = {"subject.phrase": subject, "subject.class_noun": class_noun}
    config = load_settings(options, {**given, "base": base, "prior": prior})
    with show_progress(options) as observe:
        run, config, record = train_folder(
            Path(photos), config, None if out is None else Path(out), resume, observe
        )
    named = config.subject
    return TrainedAdapter(run.path, named.phrase, named.class_noun, config.base, record)

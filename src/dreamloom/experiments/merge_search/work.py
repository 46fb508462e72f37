"""The pieces of a search's work: one candidate's pictures, drawn and looked at, and kept at once.

A candidate has a folder of its own for everything that it ever draws, so that a picture that an
earlier round has drawn is not drawn again, and a search that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.events import Observer, silent
from dreamloom.core.manifests import (
    MANIFEST,
    AdapterEntry,
    ImageSet,
    Picture,
    read_image_set,
    read_photo_set,
    write_manifest,
)
from dreamloom.core.run_folder import RunFolder, atomic_path, write_json
from dreamloom.evaluation.encoders.base import EncoderKind
from dreamloom.evaluation.scoring import pick_encoders
from dreamloom.experiments.merge_search.candidates import MergeWeights
from dreamloom.experiments.merge_search.embeddings import MeasuredImage, PictureJudge, References
from dreamloom.inference.generate import make_sampler
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.reading import read_adapter
from dreamloom.models.base import Model, Sampler, Shot
from dreamloom.models.session import follow_noise_schedule
from dreamloom.pipeline.session import open_session

ENDS = {
    "base": MergeWeights((0.0,), (0.0,)),
    "subject": MergeWeights((1.0,), (0.0,)),
    "style": MergeWeights((0.0,), (1.0,)),
}
"""What every candidate is placed between: nothing worn, and each adapter alone."""

SUBJECT_PHOTOS, STYLE_PHOTOS = "subject", "style"
"""Folders with the prepared photos of the subject, and with the pictures in the style."""

_KEY_DIGITS = 16


@dataclass(frozen=True)
class SearchWork:
    """What all pieces of a search share.

    Args:
        root: The search's folder.
        config: Settled settings.
        files: The subject's adapter, and the style's.
        hashes: SHA-256 of both files.
        prompts: Lists of prompts that are drawn together; see `embeddings.References`.
        encoders: Which encoders look.
        eyes: Fingerprint of their keys: what others have seen is not taken for theirs.
        has_style_photos: Whether pictures in the style were given.
        drawn: The style's own drawings, by file, that stand for the style otherwise.
    """

    root: Path
    config: LoomConfig
    files: tuple[Path, Path]
    hashes: tuple[str, str]
    prompts: tuple[tuple[str, ...], ...]
    encoders: EncoderKind
    eyes: str
    has_style_photos: bool
    drawn: tuple[str, ...] = ()

    def folder(self, name: str) -> Path:
        """Where the pictures of a candidate, or of an end, lie."""
        return RunFolder(self.root).images / name

    def measured_file(self, name: str) -> Path:
        """What was seen in them."""
        return self.root / "looks" / self.eyes[:_KEY_DIGITS] / f"{name}.json"


@dataclass(frozen=True)
class Piece:
    """What one candidate shall draw, and whether it is looked at.

    Args:
        table: What all pieces share.
        candidate: The weights.
        name: Of the candidate, or of an end.
        shots: Prompts and seeds.
        steps: Denoising steps.
        measured: Whether the pictures are looked at, too.
    """

    table: SearchWork
    candidate: MergeWeights
    name: str
    shots: tuple[Shot, ...]
    steps: int
    measured: bool = True

    @property
    def files(self) -> list[str]:
        """The pictures' names, in the order of the shots."""
        return [_name_file(self.table, shot, self.steps) for shot in self.shots]


def do_piece(piece: Piece, observe: Observer = silent) -> list[MeasuredImage]:
    """Draw and look at what is missing; what was seen comes in the order of the shots."""
    del observe
    images = _draw_missing(piece)
    if not piece.measured:
        return []
    known = read_measured(piece.table.measured_file(piece.name))
    unseen = [picture for picture in images.pictures if picture.file not in known]
    wanted = [picture for picture in unseen if picture.file in set(piece.files)]
    if wanted:
        judge = _seat_judge(piece.table)
        seen = judge.measured(images.model_copy(update={"pictures": tuple(wanted)}))
        known |= {picture.file: one for picture, one in zip(wanted, seen, strict=True)}
        write_json(piece.table.measured_file(piece.name), known)
    return [known[file] for file in piece.files]


def read_measured(path: Path) -> dict[str, MeasuredImage]:
    """Read what was seen in a candidate's pictures; nothing if the file is absent or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {file: MeasuredImage.model_validate(one) for file, one in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def count_pictures(table: SearchWork) -> int:
    """Count every picture that a search has drawn, in this call or an earlier one."""
    folders = RunFolder(table.root).images.glob(f"*/{MANIFEST}")
    return sum(len(read_image_set(path.parent).pictures) for path in folders)


def _name_file(table: SearchWork, shot: Shot, steps: int) -> str:
    prompts = list(dict.fromkeys(text for some in table.prompts for text in some))
    return f"{steps:03d}-{prompts.index(shot.prompt):03d}-{shot.seed:04d}.png"


def _draw_missing(piece: Piece) -> ImageSet:
    table, config = piece.table, piece.table.config
    images = _read_drawn(piece)
    there = {picture.file for picture in images.pictures}
    wanted = [
        (file, shot)
        for file, shot in dict(zip(piece.files, piece.shots, strict=True)).items()
        if file not in there
    ]
    if not wanted:
        return images
    model, adapters = _prepare(table)
    sampler = make_sampler(model, config.generate, config.generate.schedulers[0], piece.steps)
    batch = config.generate.batch
    with model.apply_adapters(piece.candidate.weigh(*adapters)):
        for start in range(0, len(wanted), batch):
            some = wanted[start : start + batch]
            drawn = model.sample([shot for _, shot in some], sampler, batch=batch)
            for (file, _), image in zip(some, drawn, strict=True):
                with atomic_path(images.folder / file) as temporary:
                    image.save(temporary)
            pictures = tuple(_describe(file, shot, sampler) for file, shot in some)
            images = images.model_copy(update={"pictures": images.pictures + pictures})
            write_manifest(images)
    return images


def _read_drawn(piece: Piece) -> ImageSet:
    folder = piece.table.folder(piece.name)
    if (folder / MANIFEST).is_file():
        images = read_image_set(folder)
        kept = tuple(one for one in images.pictures if (folder / one.file).is_file())
        return images.model_copy(update={"pictures": kept})
    model, _ = _prepare(piece.table)
    subject, style = (
        AdapterEntry(file=path.name, sha256=sha256, weight=sum(side) / len(side))
        for path, sha256, side in zip(
            piece.table.files,
            piece.table.hashes,
            (piece.candidate.subject, piece.candidate.style),
            strict=True,
        )
    )
    return ImageSet(
        folder=folder,
        base=model.identity.as_dict(),
        adapters=tuple(active for active in (subject, style) if active.weight != 0),
        subject=piece.table.config.subject.phrase,
        class_noun=piece.table.config.subject.class_noun,
        resolution_px=model.advice.resolution_px,
        pictures=(),
    )


def _describe(file: str, shot: Shot, sampler: Sampler) -> Picture:
    return Picture(
        file=file,
        prompt=shot.prompt,
        style="art",
        seed=shot.seed,
        **asdict(sampler),
    )


def _prepare(table: SearchWork) -> tuple[Model, tuple[Adapter, Adapter]]:
    """Load the base model and both adapters, once per process."""
    model, _ = open_session(table.config)
    adapters = _read_adapters(table.files, table.hashes)
    follow_noise_schedule(model, adapters)
    return model, adapters


@lru_cache(maxsize=1)
def _read_adapters(files: tuple[Path, Path], hashes: tuple[str, str]) -> tuple[Adapter, Adapter]:
    del hashes  # of the content, so that another file of the same name is read anew
    return read_adapter(files[0]), read_adapter(files[1])


def _seat_judge(table: SearchWork) -> PictureJudge:
    """Load the encoders and look at the references, once per process."""
    config = table.config
    words = config.subject.phrase, config.subject.class_noun
    return _seat_once(
        table.root,
        (table.encoders, config.device, *words),
        table.eyes,
        table.prompts,
        table.has_style_photos,
        table.drawn,
    )


@lru_cache(maxsize=1)
def _seat_once(
    root: Path,
    how: tuple[EncoderKind, str, str, str],
    eyes: str,
    prompts: tuple[tuple[str, ...], ...],
    has_style_photos: bool,
    drawn: tuple[str, ...],
) -> PictureJudge:
    del eyes
    kind, device, phrase, class_noun = how
    run, style = RunFolder(root), None
    if not has_style_photos:
        every = read_image_set(run.images / "style")
        style = every.model_copy(
            update={"pictures": tuple(one for one in every.pictures if one.file in drawn)}
        )
    references = References(
        photos=read_photo_set(RunFolder(root / SUBJECT_PHOTOS).photos),
        style=read_photo_set(RunFolder(root / STYLE_PHOTOS).photos) if has_style_photos else None,
        drawn=style,
        prompts=prompts,
        phrase=phrase,
        class_noun=class_noun,
    )
    return PictureJudge(pick_encoders(kind, "", device), references)


def select_pictures(table: SearchWork, name: str, shots: Sequence[Shot], steps: int) -> ImageSet:
    """Read some of a candidate's pictures, in the order of the shots."""
    images = read_image_set(table.folder(name))
    by_file = {picture.file: picture for picture in images.pictures}
    wanted = [by_file[_name_file(table, shot, steps)] for shot in shots]
    return images.model_copy(update={"pictures": tuple(wanted)})

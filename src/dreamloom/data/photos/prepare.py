"""Preparing a subject's photos: upright copies that just cover their crops, and their masks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dreamloom.core.errors import PhotoError
from dreamloom.core.events import (
    Note,
    Observer,
    Progress,
    StageDone,
    StageSkipped,
    StageStarted,
    silent,
)
from dreamloom.core.manifests import (
    CropShape,
    Photo,
    PhotoFacts,
    PhotoSet,
    fingerprint_facts,
    read_photo_set,
    write_manifest,
)
from dreamloom.core.run_folder import Record, RunFolder, atomic_folder
from dreamloom.data.foreign_files import refuse_foreign_photos
from dreamloom.data.image_io import scale_mask, scale_to
from dreamloom.data.photos.check import (
    MeasuredPhoto,
    forget_pixels,
    judge_set,
    list_shapes,
    measure_photo,
    say_companions,
)
from dreamloom.data.photos.listing import Listing, count, gather_facts, list_photos, refuse_own


def fingerprint_photos(
    folder: Path,
    resolution_px: int,
    shape: CropShape = "square",
    step_px: int = 64,
    *,
    keep_lines: bool = False,
) -> str:
    """Predict the fingerprint of the `PhotoSet` that `load_photos` makes of a folder.

    Files are hashed, but no picture is decoded: this is quick, and finds no unreadable photo.

    Raises:
        PhotoError: If the folder is missing, is a file or holds no picture; if a file in it may
            not be read; or if captions or metadata.jsonl are not as they should be.
    """
    facts = gather_facts(list_photos(folder, keep_lines=keep_lines))
    return fingerprint_facts(facts, resolution_px, shape, step_px)


def load_photos(
    folder: Path,
    run: RunFolder,
    resolution_px: int,
    observe: Observer = silent,
    *,
    shape: CropShape = "square",
    step_px: int = 64,
    keep_lines: bool = False,
) -> PhotoSet:
    """Prepare a subject's photos: upright copies, scaled, without metadata, under ``run.photos``.

    Each photo is scaled until it just covers its crop; nothing is cut off. What is not ideal
    about a photo or the set is noted and does no harm to the others. A text file of a photo's
    name (IMG_1.txt) is its caption, the prompt that it is trained with, and a picture
    IMG_1.mask.png its mask. A file metadata.jsonl may give captions, masks and boxes, one photo
    a line: ``{"file_name": "IMG_1.jpg", "text": …, "box": [left, top, right, bottom], "mask":
    …}``, with boxes in pixels of the upright photo. Where there is a mask and no box, the box is
    the one around what the mask marks. If the same photos were prepared before, nothing is done.
    ``run.photos`` appears whole or not at all.

    Args:
        folder: Where the photos lie, not in folders of their own; other files are ignored.
        run: The run that the copies are for.
        resolution_px: Side of a square of the area that will be trained on.
        observe: Hears of the progress and of every issue.
        shape: Crops are squares, or of the bucket nearest to each photo's own shape.
        step_px: Sides of buckets are multiples of it; see `dreamloom.data.buckets.suggest_step`.
        keep_lines: Whether the lines of a caption stay apart, for each is a caption of its own;
            else they are joined to one.

    Raises:
        PhotoError: If the folder is missing, is a file, is ``run.photos`` itself, or holds no
            picture; if captions or metadata.jsonl are not as they should be; or if pictures or
            masks cannot be used, each of which is named with its reason.
    """
    started = time.perf_counter()
    refuse_own(folder, run.photos)
    listing = list_photos(folder, keep_lines=keep_lines)
    facts = gather_facts(listing)
    settings: dict[str, str | int] = {"resolution_px": resolution_px, "shape": shape}
    if shape == "buckets":
        settings["step_px"] = step_px
    inputs = _name_inputs(listing, facts) | {name: str(value) for name, value in settings.items()}
    if run.finished("photos", inputs):
        observe(StageSkipped("photos", f"the {len(listing.pictures)} photos are prepared already"))
        return read_photo_set(run.photos)
    refuse_foreign_photos(run)
    observe(StageStarted("photos", f"{count(listing.pictures, 'photo')} in {folder}"))
    shapes = list_shapes(resolution_px, shape, step_px)
    with atomic_folder(run.photos) as fresh:
        photos: list[Photo] = []
        measured: list[MeasuredPhoto] = []

        def prepare(path: Path, name: str) -> None:
            one = measure_photo(path, listing.metadata[path], shapes)
            photos.append(_write_copy(one, facts[listing.pictures.index(path)], fresh / name))
            for text in (*one.checked.issues, *one.checked.remarks):
                is_issue = text in one.checked.issues
                observe(Note("photos", f"{one.checked.file} {text}", warning=is_issue))
            measured.append(forget_pixels(one))

        prepare_each(listing.pictures, prepare, "photos", observe)
        notes = (*listing.notes, *judge_set(measured))
        for note in notes:
            observe(Note("photos", note, warning=note not in listing.notes))
        prepared = PhotoSet(
            folder=fresh,
            resolution_px=resolution_px,
            shape=shape,
            step_px=step_px,
            photos=tuple(photos),
            notes=notes,
        )
        write_manifest(prepared)
    seconds = time.perf_counter() - started
    issues = {photo.source: photo.issues for photo in photos if photo.issues}
    run.write_record(
        Record(
            stage="photos",
            inputs=inputs,
            settings=settings,
            outputs=run.hash_outputs(*sorted(run.photos.iterdir())),
            results={"photos": len(photos), "issues": issues, "notes": notes},
            seconds=seconds,
        )
    )
    troubled = sum(bool(one.checked.issues) for one in measured)
    beside = [
        sum(map(bool, found))
        for found in zip(*((p.caption, p.mask, p.given_box) for p in photos), strict=True)
    ]
    told = f", {say_companions(*beside)}" if any(beside) else ""
    observe(StageDone("photos", seconds, f"{count(photos, 'photo')}, {troubled} with issues{told}"))
    return prepared.model_copy(update={"folder": run.photos})


def _name_inputs(listing: Listing, facts: Sequence[PhotoFacts]) -> dict[str, str]:
    inputs = {}
    for path, fact in zip(listing.pictures, facts, strict=True):
        inputs[f"photo {path.name}"] = fact.source_sha256
        if fact.caption:
            inputs[f"caption {path.name}"] = fact.caption
        if fact.given_box:
            inputs[f"box {path.name}"] = json.dumps(fact.given_box)
        if fact.mask_sha256:
            inputs[f"mask {path.name}"] = fact.mask_sha256
    return inputs


def _write_copy(one: MeasuredPhoto, facts: PhotoFacts, target: Path) -> Photo:
    """Write a photo's copy and mask, scaled; return what the manifest says of them."""
    scale_to(one.image, one.scaled_px).save(target)
    mask = target.with_suffix(".mask.png") if one.mask else None
    if one.mask and mask:
        scale_mask(one.mask, one.scaled_px).save(mask)
    return Photo(
        file=target.name,
        source=one.checked.file,
        source_sha256=one.sha256,
        original_px=one.original_px,
        scaled_px=one.scaled_px,
        bucket_px=one.bucket_px,
        caption=facts.caption,
        given_box=facts.given_box,
        box_px=one.box_px,
        mask=mask.name if mask else "",
        mask_sha256=facts.mask_sha256,
        issues=one.checked.issues + one.checked.remarks,
    )


def prepare_each(
    paths: Sequence[Path], prepare: Callable[[Path, str], None], stage: str, observe: Observer
) -> None:
    """Prepare every picture under a new name; one error then tells of all that cannot be used."""
    refused = []
    digits = max(2, len(str(len(paths) - 1)))
    for index, path in enumerate(paths):
        try:
            prepare(path, f"{index:0{digits}d}.png")
        except PhotoError as error:
            refused.append(error)
        observe(Progress(stage, "prepare", index + 1, len(paths)))
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise PhotoError(
            f"{len(refused)} of {len(paths)} pictures cannot be used: "
            + " ".join(error.problem for error in refused),
            " ".join(dict.fromkeys(error.hint for error in refused)),
        )

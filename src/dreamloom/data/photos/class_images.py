"""Class images of the user's own, prepared like those that the base model draws."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dreamloom.core.events import Note, Observer, StageDone, StageSkipped, StageStarted, silent
from dreamloom.core.manifests import ClassImageSet, read_class_image_set, write_manifest
from dreamloom.core.run_folder import Record, RunFolder, atomic_folder, fingerprint
from dreamloom.data.image_io import crop_centre, open_upright, scale_shorter_side
from dreamloom.data.photos.check import refuse_sliver
from dreamloom.data.photos.listing import count, hash_file, list_class_images, name_some, refuse_own
from dreamloom.data.photos.prepare import is_prepared, prepare_each


def load_class_images(
    folder: Path, run: RunFolder, resolution_px: int, prompt: str, observe: Observer = silent
) -> ClassImageSet:
    """Prepare class images of the user's own: centred squares of one size under ``run.priors``.

    If the same images were prepared before, nothing is done. ``run.priors`` appears whole or not
    at all.

    Args:
        folder: Where the images lie, not in folders of their own; other files are ignored.
        run: The run that the copies are for.
        resolution_px: Side of the squares.
        prompt: What the images show, in the words they are trained with.
        observe: Hears of the progress and of what was enlarged or ignored.

    Raises:
        PhotoError: As `load_photos`.
    """
    started = time.perf_counter()
    refuse_own(folder, run.priors)
    listing = list_class_images(folder)
    made_from = fingerprint([hash_file(path) for path in listing.pictures], resolution_px)
    inputs = {"class_images": made_from, "prompt": prompt, "resolution_px": str(resolution_px)}
    if is_prepared(run, "priors", inputs):
        known = len(listing.pictures)
        observe(StageSkipped("priors", f"the {known} class images are prepared already"))
        return read_class_image_set(run.priors)
    observe(StageStarted("priors", f"{count(listing.pictures, 'class image')} in {folder}"))
    with atomic_folder(run.priors) as fresh:
        names, small = _crop_squares(listing.pictures, fresh, resolution_px, observe)
        notes = list(listing.notes)
        if small:
            notes.append(
                f"enlarged {count(small, 'class image')} smaller than {resolution_px} pixels: "
                f"{name_some(small)}"
            )
        for note in notes:
            observe(Note("priors", note))
        prepared = ClassImageSet(
            folder=fresh,
            prompt=prompt,
            resolution_px=resolution_px,
            files=tuple(names),
            made_from=made_from,
        )
        write_manifest(prepared)
    seconds = time.perf_counter() - started
    run.write_record(
        Record(
            stage="priors",
            inputs=inputs,
            settings={"kind": "folder", "prompt": prompt, "resolution_px": resolution_px},
            outputs=run.hash_outputs(*sorted(run.priors.iterdir())),
            results={"class_images": len(names), "notes": notes},
            seconds=seconds,
        )
    )
    observe(StageDone("priors", seconds, count(names, "class image")))
    return prepared.model_copy(update={"folder": run.priors})


def _crop_squares(
    paths: Sequence[Path], fresh: Path, resolution_px: int, observe: Observer
) -> tuple[list[str], list[str]]:
    """Write the class images; return their names and the names of those that were enlarged."""
    names: list[str] = []
    small: list[str] = []

    def prepare(path: Path, name: str) -> None:
        image = open_upright(path)
        refuse_sliver(path, image)
        square = crop_centre(image)
        if square.width < resolution_px:
            small.append(path.name)
        scale_shorter_side(square, resolution_px).save(fresh / name)
        names.append(name)

    prepare_each(paths, prepare, "priors", observe)
    return names, small

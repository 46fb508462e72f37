"""Class images, by which training keeps the base model's idea of the class: drawn, or one's own."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamloom.core.config.settings import PriorsConfig
from dreamloom.core.device import measure_effort, seed_for
from dreamloom.core.errors import ConfigError, DreamLoomError
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
    MANIFEST,
    ClassImageSet,
    DrawnClassImage,
    choose_prompt,
    read_class_image_set,
    write_manifest,
)
from dreamloom.core.run_folder import (
    Record,
    RunFolder,
    atomic_folder,
    atomic_path,
    file_sha256,
    fingerprint,
)
from dreamloom.core.toml_files import offer
from dreamloom.data.foreign_files import refuse_foreign_class_images
from dreamloom.data.image_io import crop_centre, open_upright, scale_shorter_side
from dreamloom.data.photos.check import refuse_sliver
from dreamloom.data.photos.listing import count, hash_file, list_class_images, name_some, refuse_own
from dreamloom.data.photos.prepare import prepare_each
from dreamloom.models.base import Model, Sampler, Shot

BATCH = 8

# A new set waits in a folder of its recipe's name until it is complete. Each process notes what
# it draws in a journal of its own, so that nothing drawn is lost and none writes over another's.
_WAITING = ".priors-"
_JOURNALS = "drawn-*.jsonl"


@dataclass(frozen=True)
class _Recipe:
    """What class images are drawn from; image number n is a function of this and n."""

    prompt: str
    sampler: Sampler
    seed: int
    resolution_px: int
    base: str
    more_prompts: tuple[str, ...] = ()

    @property
    def named(self) -> dict[str, str | int | float]:
        more = {"further prompts": " | ".join(self.more_prompts)} if self.more_prompts else {}
        return {
            "prompt": self.prompt,
            **more,
            "base model": self.base,
            "scheduler": self.sampler.scheduler,
            "steps": self.sampler.steps,
            "guidance": self.sampler.guidance,
            "seed": self.seed,
            "resolution_px": self.resolution_px,
        }

    @property
    def made_from(self) -> str:
        return fingerprint(self.named)


@dataclass(frozen=True)
class _Shelf:
    """Where images of a recipe lie, and which are there, with the bytes that were written."""

    folder: Path
    drawn: dict[int, DrawnClassImage]
    replaces: str
    """Why images in the run cannot be used, if there are such."""
    listed: dict[str, str]
    """The hash of each image that belongs to a finished set, whether it is there or not."""

    def lack(self, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if number not in self.drawn]


def make_class_images(
    run: RunFolder,
    model: Model,
    prompt: str,
    config: PriorsConfig,
    seed: int,
    resolution_px: int,
    observe: Observer = silent,
) -> ClassImageSet:
    """Draw the class images that are missing in ``priors/``, and put the set together.

    Each image has a seed of its own, derived from the run's seed and its number, so the set does
    not depend on the batch, and a larger set begins with the smaller one. Images of the same
    recipe (prompt, base model, sampler, seed, resolution) are kept if their bytes are as they
    were written; of more than are asked for the first are used, and none is deleted. Images of
    another recipe are never used: the new set takes their place once it is complete. What was
    drawn before an interruption is taken up again.

    Args:
        run: Where the images and the record go.
        model: The base model that will be trained; no adapter may be active or attached.
        prompt: The class prompt, such as ``a photo of a person``.
        config: Resolved settings: nothing is ``auto`` any more; of its ``prompts`` every third
            image takes one, in turn, and they are written out (`LoomConfig.worded_priors`).
        seed: The run's seed.
        resolution_px: Side of the images: what will be trained on.
        observe: Told of progress.

    Raises:
        ConfigError: If the scheduler is unknown.
        RunFolderError: If ``priors/`` holds another set with files that are not of it.
        BaseModelError: If the base model draws what is not finite.
    """
    recipe = _make_recipe(model, prompt, config, seed, resolution_px)
    shelf = _find_shelf(run, recipe)
    numbers = range(config.count)
    missing = shelf.lack(numbers)
    inputs = {"recipe": recipe.made_from, "count": str(config.count)}
    if not missing and shelf.folder == run.priors and run.finished("priors", inputs):
        observe(StageSkipped("priors", "already drawn"))
        return _describe_set(shelf.folder, recipe, shelf.drawn, config.count)
    observe(StageStarted("priors", _announce(prompt, config.count, len(missing))))
    if shelf.replaces:
        observe(Note("priors", shelf.replaces))
    lost = {
        name: sha256 for name, sha256 in shelf.listed.items() if int(Path(name).stem) in missing
    }
    if lost:
        text = f"lost or changed since they were drawn, and drawn again: {name_some(list(lost))}"
        observe(Note("priors", text, warning=True))
    with measure_effort(model.runtime) as effort:
        drawn = {**shelf.drawn, **_draw(shelf, model, recipe, numbers, (0, 1), observe)}
        write_manifest(_describe_set(shelf.folder, recipe, drawn, config.count))
        _put_in_place(shelf.folder, run)
    others = [one.file for one in drawn.values() if lost.get(one.file, one.sha256) != one.sha256]
    if others:
        text = (
            f"not the same to the last bit as before, so a training learns otherwise: {others[0]}"
        )
        observe(Note("priors", text, warning=True))
    priors = _describe_set(run.priors, recipe, drawn, config.count)
    run.write_record(
        Record(
            stage="priors",
            inputs=inputs,
            settings=config.model_dump(mode="json"),
            outputs=run.hash_outputs(run.priors / MANIFEST, *priors.paths()),
            results={"count": config.count, "prompt": prompt, "drawn": len(missing)},
            base=model.identity.as_dict(),
            seed=seed,
            runtime=model.runtime.name,
            seconds=effort.seconds,
            peak_mib=effort.peak_mib,
        )
    )
    observe(StageDone("priors", effort.seconds, str(run.priors)))
    return priors


def draw_class_images(
    run: RunFolder,
    model: Model,
    prompt: str,
    config: PriorsConfig,
    seed: int,
    resolution_px: int,
    observe: Observer = silent,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Draw one process's share of the class images; `make_class_images` puts them together.

    Several processes call this at the same time, each with its own share; when all have
    returned, one calls `make_class_images`, and after that the others may, too, to read the set.

    Args:
        run: As `make_class_images`, like the other arguments.
        model: The process's own copy of the base model.
        prompt: The class prompt.
        config: Resolved settings.
        seed: The run's seed.
        resolution_px: Side of the images.
        observe: Told of the progress of this share.
        share: The process's rank, from 0, and how many processes there are. Image n is drawn by
            the process whose rank is the remainder of n.

    Returns:
        How many images were drawn.

    Raises:
        ConfigError: If the scheduler is unknown.
        ValueError: If the rank is not below the number of processes.
    """
    rank, processes = share
    if not 0 <= rank < processes:
        raise ValueError(f"the rank must be from 0 to {processes - 1}, got {rank}")
    recipe = _make_recipe(model, prompt, config, seed, resolution_px)
    numbers = range(rank, config.count, processes)
    return len(_draw(_find_shelf(run, recipe), model, recipe, numbers, share, observe))


def _make_recipe(
    model: Model, prompt: str, config: PriorsConfig, seed: int, resolution_px: int
) -> _Recipe:
    if config.scheduler not in model.schedulers:
        raise ConfigError(
            f"priors.scheduler = {config.scheduler!r} is unknown.",
            offer(config.scheduler, model.schedulers),
        )
    model.check_sampler(config.scheduler, config.steps)
    sampler = Sampler(config.scheduler, config.steps, float(config.guidance))
    more = () if config.prompts == "auto" else config.prompts
    if any("{" in text for text in more):
        raise ValueError("further class prompts must be written out; see LoomConfig.worded_priors")
    return _Recipe(prompt, sampler, seed, resolution_px, model.identity.fingerprint, more)


def _announce(prompt: str, count: int, missing: int) -> str:
    if missing == count:
        return f"{count} pictures of “{prompt}”"
    if missing:
        return f"{missing} of {count} pictures of “{prompt}”; the others were drawn before"
    return f"{count} pictures of “{prompt}”, all drawn before"


def _name(number: int) -> str:
    return f"{number:04d}.png"


def _find_shelf(run: RunFolder, recipe: _Recipe) -> _Shelf:
    """Find where images of a recipe lie or shall lie, and which of them are there unharmed."""
    try:
        old = read_class_image_set(run.priors)
    except DreamLoomError:
        old = None
    if old and old.made_from == recipe.made_from:
        listed = {one.file: one.sha256 for one in old.drawn}
        return _Shelf(run.priors, _find_unharmed(run.priors, old.drawn), "", listed)
    refuse_foreign_class_images(run, _JOURNALS)
    waiting = run.path / f"{_WAITING}{recipe.made_from[:16]}"
    replaces = _name_differences(old, recipe) if run.priors.exists() else ""
    return _Shelf(waiting, _find_unharmed(waiting, ()), replaces, {})


def _find_unharmed(folder: Path, listed: Sequence[DrawnClassImage]) -> dict[int, DrawnClassImage]:
    """Find the images whose bytes are those that were written; the others do not count."""
    found = {}
    for one in (*listed, *_read_journals(folder)):
        path = folder / one.file
        if path.is_file() and file_sha256(path) == one.sha256:
            found[int(path.stem)] = one
    return dict(sorted(found.items()))


def _read_journals(folder: Path) -> Iterator[DrawnClassImage]:
    for path in sorted(folder.glob(_JOURNALS)):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                yield DrawnClassImage.model_validate_json(line)
            except ValueError:
                # Empty, or cut off when the process died: that image is drawn again.
                continue


def _name_differences(old: ClassImageSet | None, recipe: _Recipe) -> str:
    if old is None:
        return "priors/ holds no set that can be read; a new one takes its place when complete"
    differing = [name for name, value in recipe.named.items() if old.recipe.get(name) != value]
    how = f"drawn with another {', '.join(differing)}" if old.recipe else "made otherwise"
    return (
        f"the {len(old.files)} class images of “{old.prompt}” in priors/ were {how}: they are not "
        "used, and the new ones take their place when complete"
    )


def _draw(
    shelf: _Shelf,
    model: Model,
    recipe: _Recipe,
    numbers: Sequence[int],
    share: tuple[int, int],
    observe: Observer,
) -> dict[int, DrawnClassImage]:
    """Draw those of the numbered images that the shelf lacks."""
    missing = shelf.lack(numbers)
    drawn: dict[int, DrawnClassImage] = {}
    done = len(numbers) - len(missing)
    observe(Progress("priors", "drawing class images", done, len(numbers)))
    if missing:
        shelf.folder.mkdir(parents=True, exist_ok=True)
    journal = shelf.folder / _JOURNALS.replace("*", f"{share[0]}-of-{share[1]}")
    for start in range(0, len(missing), BATCH):
        some = missing[start : start + BATCH]
        shots = [
            Shot(
                choose_prompt(number, recipe.prompt, recipe.more_prompts),
                seed_for(recipe.seed, "prior", number),
            )
            for number in some
        ]
        images = model.sample(shots, recipe.sampler, recipe.resolution_px, batch=BATCH)
        for number, shot, image in zip(some, shots, images, strict=True):
            path = shelf.folder / _name(number)
            with atomic_path(path) as temporary:
                image.save(temporary)
            drawn[number] = DrawnClassImage(
                file=path.name, seed=shot.seed, sha256=file_sha256(path)
            )
            with journal.open("a", encoding="utf-8") as file:
                # The line break comes first: it ends a line that was cut off.
                file.write("\n" + json.dumps(drawn[number].model_dump()))
        observe(Progress("priors", "drawing class images", done + len(drawn), len(numbers)))
    return drawn


def _describe_set(
    folder: Path, recipe: _Recipe, drawn: dict[int, DrawnClassImage], count: int
) -> ClassImageSet:
    return ClassImageSet(
        folder=folder,
        prompt=recipe.prompt,
        resolution_px=recipe.resolution_px,
        files=tuple(_name(number) for number in range(count)),
        made_from=recipe.made_from,
        recipe=recipe.named,
        drawn=tuple(drawn[number] for number in sorted(drawn)),
        more_prompts=recipe.more_prompts,
    )


def _put_in_place(folder: Path, run: RunFolder) -> None:
    """Let a complete set take the place of the old one, and clear away what helped to make it."""
    if folder != run.priors:
        old = run.path / f"{_WAITING}old"
        shutil.rmtree(old, ignore_errors=True)
        if run.priors.exists():
            run.priors.rename(old)
        folder.rename(run.priors)
    for journal in run.priors.glob(_JOURNALS):
        journal.unlink()
    for leftover in run.path.glob(f"{_WAITING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


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
    if run.finished("priors", inputs):
        known = len(listing.pictures)
        observe(StageSkipped("priors", f"the {known} class images are prepared already"))
        return read_class_image_set(run.priors)
    refuse_foreign_class_images(run, _JOURNALS)
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

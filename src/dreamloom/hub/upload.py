"""The files of an upload: adapter, card and pictures, written anew, with nothing else of a run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dreamloom.core.config.loading import load_run_settings
from dreamloom.core.errors import HubError
from dreamloom.core.run_folder import Record, RunFolder, atomic_folder, write_text
from dreamloom.hub.card import SDXL_LICENCE, CardFacts, find_base, make_card
from dreamloom.hub.samples import (
    FOLDER,
    DrawnSet,
    Samples,
    choose_samples,
    find_drawn_set,
    write_sample,
)
from dreamloom.lora.locating import DIFFUSERS_NAME, is_hub_name
from dreamloom.lora.modelspec import HASH_KEY, TAGS_KEY, TENSOR_HASH_KEY
from dreamloom.lora.readers import tell_readers
from dreamloom.lora.tensors import open_tensors, save_tensors
from dreamloom.lora.token_embeddings import list_token_files, tokens_folder
from dreamloom.models.weight_files import SDXL_ID

CARD = "README.md"
_HASHES = (HASH_KEY, TENSOR_HASH_KEY)
_MOST_NAMED = 5

LEFT_OUT = frozenset((TAGS_KEY, "ss_dataset_dirs", "dreamloom.config", "dreamloom.photos"))
"""Header entries that an upload has not: the captions and how often each was seen, the settings of
the run's machine (the card has those of the training), and the photos' fingerprint."""


@dataclass(frozen=True)
class UploadRequest:
    """What the user wants to push.

    Args:
        run: The run's folder.
        name: The repository, ``name`` or ``user/name``.
        pictures: The set that sample pictures are from; None chooses one.
        samples: How many pictures at most; 0 for none.
        licence: The hub's name of it; empty takes SDXL's own, where that is the base.
    """

    run: Path
    name: str
    pictures: str | None = None
    samples: int = 8
    licence: str = ""


@dataclass(frozen=True)
class Upload:
    """What was written.

    Args:
        folder: Where.
        files: Every file, as it is called in the repository.
        notes: What the user should know, each in a sentence.
    """

    folder: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]


def check_name(name: str) -> None:
    """Refuse a name that the hub does not allow.

    Raises:
        HubError: If so.
    """
    if not is_hub_name(name):
        raise HubError(
            f"{name!r} cannot name a repository on the hub.",
            "Write NAME or USER/NAME: up to 96 letters without accents, digits, -, _ and ., "
            "neither beginning nor ending with - or ., without -- and .., and not ending in .git.",
        )


def write_upload(request: UploadRequest, folder: Path) -> Upload:
    """Write everything that would be uploaded into a new folder, to be looked at.

    Raises:
        HubError: As `fill_upload`; or if something lies there already.
    """
    check_name(request.name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HubError(f"{folder} is there already, and is not empty.", "Name a new folder.")
    repository = request.name if "/" in request.name else f"USER/{request.name}"
    with atomic_folder(folder) as fresh:
        upload = fill_upload(request, repository, fresh)
    return Upload(folder, upload.files, upload.notes)


def fill_upload(request: UploadRequest, repository: str, folder: Path) -> Upload:
    """Write the files of an upload into an empty folder.

    Args:
        request: What is to be pushed.
        repository: The repository in full, for the card.
        folder: Where.

    Raises:
        HubError: If the run has no finished adapter, or one that training did not write; or there
            is no such set of pictures.
        ConfigError: If the run's settings cannot be read.
    """
    run = RunFolder(request.run)
    record = _read_training(run)
    config = load_run_settings(run.settings_file)
    weights = folder / DIFFUSERS_NAME
    header = _write_adapter(run.adapter, weights)
    drawn = find_drawn_set(run, request.pictures)
    subject = config.subject.phrase
    samples = choose_samples(drawn, subject, request.samples) if drawn else Samples()
    pictures = []
    for number, picture in enumerate(samples.pictures, start=1):
        assert drawn is not None
        file = f"{FOLDER}/{number:02d}.png"
        write_sample(drawn.images.folder / picture.file, folder / file)
        pictures.append((file, picture))
    base = find_base(record, config)
    facts = CardFacts(
        repository=repository,
        weights=weights.name,
        config=config,
        base=base,
        photos=int(header.get("ss_num_train_images", 0)),
        class_images=int(record.results.get("class_images", 0)),
        readers=tell_readers(weights),
        licence=request.licence or (SDXL_LICENCE if base.hub_id == SDXL_ID else ""),
        pictures=pictures,
        drawn_as=_tell_rule(drawn, samples) if drawn else "",
        card=drawn.card if drawn else None,
        words=_copy_words(run.adapter, weights),
    )
    write_text(folder / CARD, str(make_card(facts)))
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    notes = samples.notes
    if drawn is None:
        notes = (
            f"the card has no pictures and no scores: no set in {run.path} was drawn by its "
            "adapter alone",
        )
    return Upload(folder, tuple(files), notes)


def _read_training(run: RunFolder) -> Record:
    """Read the record of the training that wrote the adapter which lies there."""
    record = run.read_record("train")
    if not run.adapter.is_file() or record is None:
        inside = sorted(path.parent.name for path in run.path.glob(f"*/{run.adapter.name}"))
        listed = ", ".join(str(run.path / name) for name in inside[:_MOST_NAMED])
        raise HubError(
            f"{run.path} is no run with a finished adapter.",
            f"Name one of these: {listed}."
            if inside
            else "Name the folder that 'dreamloom train' wrote; an unfinished run goes on with "
            "--resume.",
        )
    if changed := run.list_changed(record):
        raise HubError(
            f"{run.path / changed[0]} is not as this run's training wrote it.",
            "A card would tell of another adapter; push the run that it is from.",
        )
    return record


def _write_adapter(source: Path, target: Path) -> dict[str, str]:
    """Write the adapter without what is the user's own affair; give its header as it was."""
    tensors, header = open_tensors(source)
    kept = {key: text for key, text in header.items() if key not in LEFT_OUT}
    save_tensors(target, tensors, kept, [key for key in _HASHES if key in header])
    return header


def _copy_words(source: Path, target: Path) -> dict[str, str]:
    """Copy the files of an adapter's new words beside its copy; name each word's."""
    words = {}
    for file in list_token_files(source):
        place = tokens_folder(target) / file.name
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
        word = open_tensors(file)[1].get("dreamloom.word", file.stem)
        words[word] = place.relative_to(target.parent).as_posix()
    return words


def _tell_rule(drawn: DrawnSet, samples: Samples) -> str:
    """Say how the pictures were drawn and chosen."""
    worn = drawn.images.adapters[0]
    schedule = f" ({worn.lora_schedule})" if worn.lora_schedule else ""
    return (
        f"Drawn with this adapter at a weight of {worn.weight:g}{schedule}. Nobody picked them: "
        f"they are {samples.rule}, from a set of {len(drawn.images.pictures)} pictures."
    )
